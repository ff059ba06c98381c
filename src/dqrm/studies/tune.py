"""`dqrm tune`: search for the values of fields that are best on validation, by Optuna; its folder is that of a study.

Beside what `folder` names it holds optuna.journal, from which a search goes on, and best.yaml, the configuration of
the best trial. Each trial is a variant with one seed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dqrm.config import Config
from dqrm.console import Bars
from dqrm.data.dataset import Dataset
from dqrm.distributed import launched
from dqrm.errors import UserError
from dqrm.files import replacing
from dqrm.studies.folder import STUDY, Folder, Result, finite
from dqrm.studies.plan import Plan
from dqrm.studies.search import Range, Search
from dqrm.studies.tables import markdown
from dqrm.studies.worker import Task, perform
from dqrm.training.callbacks import Callback
from dqrm.training.launch import check
from dqrm.training.metrics import METRICS

JOURNAL, BEST = "optuna.journal", "best.yaml"
_ASKED = "asked"
# Of a trial: its variant's name; how often it was begun.
_NAME, _BEGUN = "variant", "begun"
# A trial that ends the process so many times is not tried again.
_MOST_BEGUN = 2


def run_tune(
    search: Search,
    data: str | Path,
    output: str | Path,
    trials: int,
    progress: Bars,
    seed: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Train until there are so many trials, those of before included.

    Returns:
        The best trial: {'variant', 'value' (on validation), 'config'}; empty without one.

    Raises:
        UserError: Optuna is not installed; the configuration cannot be trained on this data.
        Interrupted: Ctrl-C or SIGTERM.
    """
    optuna = _optuna()
    if launched():
        raise UserError("dqrm tune runs in one process; simulate ranks with exchange.simulate_ranks")
    dataset, first = Dataset(data), search.config({field: each.values[0] for field, each in search.ranges.items()})
    check(first, dataset)
    plan = Plan(search.name, search.title, "", (seed,), ())
    folder = Folder.plan(Path(output), plan, dataset)
    if resume and (folder.path / STUDY).is_file():
        earlier = Folder.open(folder.path)
        if earlier.seeds != [seed]:
            raise UserError(f"{output} was started with seed {earlier.seeds[0]}; give --seed {earlier.seeds[0]}")
        folder.variants, folder.baseline, folder.failures = earlier.variants, earlier.baseline, earlier.failures
    with folder.begun(resume):
        return _Tuning(optuna, search, folder, dataset, first.training.select_by, progress).run(trials)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("dqrm tune needs Optuna: `pip install 'dqrm[tune]'` adds it") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _Tuning:
    """The search in progress."""

    def __init__(
        self, optuna: Any, search: Search, folder: Folder, dataset: Dataset, metric: str, progress: Bars
    ) -> None:
        self.optuna, self.search, self.folder, self.dataset = optuna, search, folder, dataset
        self.metric, self.progress, self.seed = metric, progress, folder.seeds[0]
        self.distributions = {name: _distribution(optuna, each) for name, each in search.ranges.items()}
        backend = optuna.storages.journal.JournalFileBackend(str(folder.path / JOURNAL))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="dqrm",
            direction="maximize" if METRICS[metric].higher_is_better else "minimize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        asked = repr((search.sections, search.ranges))
        if self.study.user_attrs.get(_ASKED, asked) != asked:
            raise UserError(f"{folder.path} was started with another base or other ranges; name another folder with -o")
        self.study.set_user_attr(_ASKED, asked)
        # Of its own for each process: the same numbers again would be the trials of before.
        begun = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = optuna.samplers.TPESampler(seed=(self.seed + begun) % 2**32)

    def run(self, trials: int) -> dict[str, Any]:
        self._again()
        while len(self.folder.variants) < trials or self._waiting():
            trial = self.study.ask(self.distributions)
            trial.set_user_attr(_BEGUN, trial.user_attrs.get(_BEGUN, 0) + 1)
            self._train(trial)
            self._write()
        self._write()
        return self._best()

    def _again(self) -> None:
        """Ask once more for trials whose process was stopped or killed."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=(states.RUNNING,)):
            self.study.tell(trial.number, state=states.FAIL)
            if trial.user_attrs.get(_BEGUN, 0) < _MOST_BEGUN and trial.params:
                self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
            elif name := trial.user_attrs.get(_NAME):
                self._failed(name, f"its process ended {_MOST_BEGUN} times before it did")

    def _waiting(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,)))

    def _train(self, trial: Any) -> None:
        """Train with the values of a trial, or record why that cannot be."""
        states, pruner = self.optuna.trial.TrialState, _Pruner(trial, self.metric)
        name = trial.user_attrs.get(_NAME) or f"trial-{len(self.folder.variants):04d}"
        trial.set_user_attr(_NAME, name)
        try:
            config = self._planned(name, trial.params)
            run = self.folder.run(name, self.seed)
            task = Task(name, str(self.dataset.path), str(run), config.to_dict())
            perform(task, self.progress, self._log, [pruner])
            value = finite((Result.read(run).best.get("metrics") or {}).get(self.metric))
            if value is None:
                raise UserError(f"validation has no {self.metric}")
        except (UserError, RuntimeError, MemoryError) as error:
            self._failed(name, " ".join(str(error).split()) or type(error).__name__)
            self.study.tell(trial, state=states.FAIL)
            return
        self.study.tell(trial, *((None, states.PRUNED) if pruner.pruned else (value,)))
        pruned = ", pruned" * pruner.pruned
        self.progress.log(f"{name}: validation {self.metric} {value:.5f}{pruned}; {_told(trial.params)}")

    def _planned(self, name: str, values: Mapping[str, Any]) -> Config:
        """The configuration of a trial, which the folder has from then on.

        Raises:
            UserError: it is impossible.
        """
        if name not in (each["name"] for each in self.folder.variants):
            fields = {"fields": dict(values)}
            self.folder.variants.append({"name": name, "source": None, "ptq": None, "config": None, **fields})
            self.folder.baseline = self.folder.variants[0]["name"]
        config = self.search.config(values)
        options = replace(config.training, seed=self.seed, threads=config.training.threads or 1)
        config = replace(config, training=options)
        next(each for each in self.folder.variants if each["name"] == name)["config"] = config.to_dict()
        self.folder.write()
        check(config, self.dataset)
        return config

    def _log(self, line: str) -> None:
        if line.startswith("Warning"):
            self.progress.log(line)

    def _failed(self, name: str, why: str) -> None:
        self.folder.failures.append({"variant": name, "seed": self.seed, "error": why})
        self.progress.log(f"{name}: failed: {why}")

    def _write(self) -> None:
        results = self.folder.results()
        self.folder.write()
        self.folder.write_results(results, markdown(self.folder, results))
        if best := self._best():
            import yaml

            with replacing(self.folder.path / BEST, f"another process writes {BEST}") as partial:
                header = f"# {best['variant']}: validation {self.metric} {best['value']:.6f}\n"
                partial.write_text(header + yaml.safe_dump(best["config"], sort_keys=False), encoding="utf-8")

    def _best(self) -> dict[str, Any]:
        """The best trial that was not pruned: {'variant', 'value' on validation, 'config'}; empty without one."""
        done = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))
        if not done:
            return {}
        best = self.study.best_trial
        configs = {each["name"]: each["config"] for each in self.folder.variants}
        return {"variant": best.user_attrs[_NAME], "value": best.value, "config": configs[best.user_attrs[_NAME]]}


class _Pruner(Callback):
    """Ends a run whose validation figures are below the median of earlier trials at the same point."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric, self.pruned = trial, metric, False

    def on_evaluation(self, trainer: Any, metrics: dict[str, Any]) -> None:
        value, rows = finite(metrics[self.metric]), trainer.dataset.rows["train"]
        if value is None:
            return
        state = trainer.state
        seen = state.epoch * rows + min(state.batch * trainer.options.batch_size, rows)
        self.trial.report(value, 100 * seen // rows)  # trials have different batch sizes
        if not state.finished and self.trial.should_prune():
            self.pruned = state.finished = True


def _distribution(optuna: Any, given: Range) -> Any:
    distributions = optuna.distributions
    if given.kind == "choice":
        return distributions.CategoricalDistribution(given.values)
    if given.kind == "int":
        return distributions.IntDistribution(*given.values)
    return distributions.FloatDistribution(*given.values, log=given.kind == "log")


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in values.items())  # fmt: skip
