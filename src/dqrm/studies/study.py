"""`dqrm study`: each variant with each seed, and the tables that compare them; see `plan`, `folder`, `schedule`."""

from dataclasses import asdict, replace
from pathlib import Path

from dqrm.console import Bars
from dqrm.data.dataset import Dataset
from dqrm.distributed import launched
from dqrm.errors import UserError
from dqrm.studies.folder import LOG, Folder, Result
from dqrm.studies.plan import Plan, Variant
from dqrm.studies.schedule import Clock, perform_all
from dqrm.studies.tables import markdown
from dqrm.studies.worker import Task
from dqrm.training.launch import check

_Key = tuple[str, int]


def run_study(
    plan: Plan,
    data: str | Path,
    output: str | Path,
    progress: Bars,
    jobs: int = 1,
    resume: bool = False,
    keep: str = "best",
) -> Folder:
    """Perform the runs of a plan that are not finished, and write the folder of the study.

    Runs that fail are recorded in it (`failures`), and the others go on.

    Args:
        output: the folder to make, or with `resume` to go on with; what an earlier plan ran there is kept where this
            plan has it too.
        jobs: runs at the same time, each a process. keep: which checkpoints of finished runs, 'best' or 'all'.

    Returns:
        The folder.

    Raises:
        UserError: a variant cannot be trained on this data, or the folder is not one of this study's; nothing ran then.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the runs have saved a checkpoint.
    """
    if launched():
        raise UserError("dqrm study runs in one process; simulate ranks with exchange.simulate_ranks")
    dataset = Dataset(data)
    _require_figures(dataset)
    for variant in plan.variants:
        if variant.config:
            try:
                check(variant.config, dataset, variant.source is not None)
            except UserError as error:
                raise UserError(f"variant '{variant.name}': {error}") from None
    folder = Folder.plan(Path(output), plan, dataset)
    with folder.begun(resume):
        _Study(plan, folder, dataset, progress, jobs, keep).run()
    return folder


def _require_figures(dataset: Dataset) -> None:
    """Raise UserError unless the test split gives all figures of the tables."""
    rows, clicks = dataset.rows["test"], dataset.info["clicks"]["test"]
    if clicks in (0, rows):
        raise UserError(
            f"the test split of {dataset.path} has {rows} rows and {clicks} clicks, expected rows of both labels"
        )


class _Study:
    """The runs in progress."""

    def __init__(self, plan: Plan, folder: Folder, dataset: Dataset, progress: Bars, jobs: int, keep: str) -> None:
        self.folder, self.progress, self.keep = folder, progress, keep
        self.clock, self.jobs = Clock(jobs), jobs
        self.variants, self.imports = {each.name: each for each in plan.variants}, plan.imports
        self.results = folder.results()
        self.left: dict[_Key, Task] = {
            (variant.name, seed): self._task(variant, seed, dataset)
            for variant, seed in plan.runs()
            if self.results[variant.name][seed].summary is None
        }
        self.keys = {task.folder: key for key, task in self.left.items()}
        self.total = len(self.left)

    def _task(self, variant: Variant, seed: int, dataset: Dataset) -> Task:
        source = None if variant.source is None else str(self.folder.run(variant.source, seed))
        config = variant.config or self.variants[str(variant.source)].config
        assert config is not None
        threads = config.training.threads or 1  # the same bits however many jobs and cores there are
        config = replace(config, training=replace(config.training, seed=seed, threads=threads))
        ptq = asdict(variant.ptq) if variant.ptq else None
        folder = str(self.folder.run(variant.name, seed))
        name = f"{variant.name}, seed {seed}"
        return Task(name, str(dataset.path), folder, config.to_dict(), source, ptq, self.keep, self.imports)

    def run(self) -> None:
        self._write()
        if self.total:
            self.progress.log(f"{self.total} runs, {self.jobs} at a time")
            perform_all(list(self.left.values()), self.jobs, str(self.folder.path / LOG), self.progress, self._ended)

    def _ended(self, task: Task, why: str | None, seconds: float) -> None:
        variant, seed = key = self.keys[task.folder]
        del self.left[key]
        done = f"[{self.total - len(self.left)}/{self.total}] {task.name}: "
        if why is None:
            result = self.results[variant][seed] = Result.read(self.folder.run(variant, seed))
            self.clock.add(variant, seconds)
            auc, epoch = result.test("auc"), result.best.get("epoch")
            done += f"test AUC {'-' if auc is None else f'{auc:.5f}'}, epoch {epoch or '-'}, {_duration(seconds)}"
        else:
            self.folder.failures.append({"variant": variant, "seed": seed, "error": why})
            done += f"failed: {why}"
        if self.left:
            done += f"; about {_duration(self.clock.left([name for name, _ in self.left]))} left"
        self._write()
        self.progress.log(done)

    def _write(self) -> None:
        self.folder.write()
        self.folder.write_results(self.results, markdown(self.folder, self.results))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
