"""The days of a log one after the other: prepare, evaluate, train, export, publish.

Each step leaves a file or a folder that is complete once it has its name, and the line of a day in days.jsonl comes
last, so the same command goes on where it was killed: what is there is not made again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqrm.artifact.file import Artifact
from dqrm.daily.config import DailyConfig, Recipe
from dqrm.daily.days import Folder, list_days, published
from dqrm.daily.scores import measure
from dqrm.data.dataset import Dataset
from dqrm.data.folder import SPLITS
from dqrm.data.listing import natural
from dqrm.data.prepare import prepare
from dqrm.distributed import launched
from dqrm.errors import UserError
from dqrm.export.config import ExportConfig
from dqrm.export.pipeline import export_run
from dqrm.files import exclusive, read_json, write_json
from dqrm.options import registered
from dqrm.training.callbacks import RedrawTables, build_callbacks
from dqrm.training.environment import Log, Progress
from dqrm.training.launch import resume, train
from dqrm.training.metrics import METRICS, Metric
from dqrm.training.run import Run


def run_daily(
    recipe: Recipe,
    logs: Sequence[str],
    output: str | Path,
    config: DailyConfig | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> list[dict[str, Any]]:
    """Train a model on each day that is not done, in order, each from the published one.

    Args:
        recipe: how a day is prepared and trained. logs: paths and globs; each match is the log of a day.
        output: the folder to create, or to continue.
        progress: called as progress(stage, done, total). log: called with lines of text.

    Returns:
        The line of each day that is done, as in days.jsonl: day, rows (by split), changes (of table rows, for days that
        extend another), before (metrics on all rows of the day, before training on it, of the published model; None on
        the first day), gate (see `_judge`; None on the first day), published, steps, seconds.

    Raises:
        UserError: a day, a log or a configuration that cannot be; another process works in `output`.
        Interrupted: Ctrl-C or SIGTERM during training.
    """
    config, folder = config or DailyConfig(), Folder(Path(output))
    _check(recipe, config)
    days = list_days(logs)
    folder.require_own()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from None
    with exclusive(folder.path / ".lock", f"another dqrm daily is working in {output}; wait for it or stop it"):
        folder.begin(recipe)
        lines = folder.done()
        left = _left(days, lines)
        total = len(lines) + len(left)
        for name, source in left.items():
            if log:
                log(f"{name} ({len(lines) + 1} of {total})")
            folder.prune(lines, config.keep)
            lines.append(_Day(name, source, folder, recipe, config, lines, progress, log).line())
            if lines[-1]["published"]:
                folder.publish(name)
            folder.finish(lines)
        newest = published(lines)
        if newest is not None and not folder.current.exists():
            folder.publish(newest)
        folder.prune(lines, config.keep)
    return lines


def _check(recipe: Recipe, config: DailyConfig) -> None:
    if launched():
        raise UserError("dqrm daily runs in one process; several ranks are for `dqrm train`, day by day")
    if _gate(config).needs_group and recipe.prepare(None).group is None:
        raise UserError(f"gate_metric is {config.gate_metric}, which needs a group column; give one in {recipe.file}")
    epochs, named = recipe.train.training.epochs, recipe.train.training.callbacks
    if epochs > 1 and any(isinstance(callback, RedrawTables) for callback in build_callbacks(named)):
        raise UserError(
            f"{recipe.file}: epochs is {epochs}, but from the second day on the callback redraw_tables would redraw "
            "the rows of the days before at epoch 2; leave epochs out (1 epoch on those days), or give callbacks "
            "without it"
        )


def _gate(config: DailyConfig) -> Metric:
    choices = {name: metric for name, metric in METRICS.items() if metric.higher_is_better is not None}
    return registered("gate_metric", config.gate_metric, choices)


def _left(days: dict[str, Path | str], lines: Sequence[dict[str, Any]]) -> dict[str, Path | str]:
    """The days that are not done.

    Raises:
        UserError: one of them is before a day that is done.
    """
    done = [line["day"] for line in lines]
    left = {name: path for name, path in days.items() if name not in done}
    for name, path in left.items():
        if done and natural(Path(name)) < natural(Path(done[-1])):
            raise UserError(f"{path} is before {done[-1]}, which is done; days are trained in order, leave it out")
    return left


@dataclass
class _Day:
    """One day. lines: of those before it."""

    name: str
    source: Path | str
    folder: Folder
    recipe: Recipe
    config: DailyConfig
    lines: Sequence[dict[str, Any]]
    progress: Progress | None
    log: Log | None
    seconds: dict[str, float] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """Do what is not done yet; the line of days.jsonl."""
        earlier = published(self.lines)
        current = None if earlier is None else Run.open(self.folder.run(earlier))
        dataset = self._timed("prepare", self._prepare)
        before = None if earlier is None else self._timed("evaluate", lambda: self._before(dataset, earlier))
        summary = self._timed("train", lambda: self._train(dataset, current))
        if not self.folder.model(self.name).exists():
            options = ExportConfig(data=str(dataset.path), calibrate=self.config.calibrate)
            self._timed("export", lambda: export_run(self.folder.run(self.name), self.folder.model(self.name), options))
        gate = None if earlier is None else self._timed("gate", lambda: self._judge(dataset, earlier))
        return {
            "day": self.name,
            "rows": dataset.rows,
            "changes": dataset.describe().get("changes"),
            "model": earlier,
            "before": before,
            "gate": gate,
            "published": gate is None or gate["passed"],
            "steps": summary["steps"],
            "seconds": self.seconds,
        }

    def _timed(self, what: str, action: Any) -> Any:
        started = time.monotonic()
        result = action()
        self.seconds[what] = round(time.monotonic() - started, 3)
        return result

    def _prepare(self) -> Dataset:
        path, before = self.folder.data(self.name), [line["day"] for line in self.lines[-1:]]
        if path.exists():
            return Dataset(path)
        extended = str(self.folder.data(before[0])) if before else None
        return prepare([self.source], path, self.recipe.prepare(extended), self.progress)

    def _measure(self, day: str, dataset: Dataset, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
        """Metrics of the model of a day, as it was exported."""
        calibration = Artifact.open(self.folder.model(day)).calibration
        return measure(Run.open(self.folder.run(day)), dataset, splits, self.progress, calibration)

    def _before(self, dataset: Dataset, current: str) -> dict[str, Any]:
        """Metrics of the published model on the whole day."""
        file = self.folder.day(self.name) / "before.json"
        if not file.exists():
            write_json(file, self._measure(current, dataset))
        metrics: dict[str, Any] = read_json(file)
        return metrics

    def _train(self, dataset: Dataset, current: Run | None) -> dict[str, Any]:
        run = self.folder.run(self.name)
        if (run / "run.json").exists():
            return resume(run, dataset, self.progress, self.log)
        start = None if current is None else current.path
        return train(dataset, run, self.recipe.train, self.progress, self.log, start_from=start)

    def _judge(self, dataset: Dataset, current: str) -> dict[str, Any]:
        """The new model against the published one: metric, margin, split, both figures, and whether it passed.

        Without a figure of one of them, as where all rows have one label, it does not pass.

        Raises:
            UserError: there are no rows to judge by.
        """
        name, margin = self.config.gate_metric, self.config.gate_margin
        split = next((each for each in ("test", "validation") if dataset.rows[each]), None)
        if split is None and margin is not None:
            raise UserError(
                f"{dataset.path} has neither test nor validation rows to judge the new model by; prepare days with "
                "some (test_fraction), or use gate_margin none"
            )
        figures: dict[str, Any] = dict.fromkeys(("published", "new"))
        if split is not None:
            days = {"published": current, "new": self.name}
            figures = {which: self._measure(day, dataset, [split])[name] for which, day in days.items()}
        passed = margin is None
        if margin is not None and None not in figures.values():
            sign = 1 if _gate(self.config).higher_is_better else -1
            passed = sign * (figures["new"] - figures["published"]) >= -margin
        if not passed and self.log:
            told = " and ".join(f"{value} ({which})" for which, value in figures.items())
            self.log(
                f"Warning: the model of {self.name} is not published: {name} on {split} is {told}, margin {margin}."
            )
        return {"metric": name, "margin": margin, "split": split, **figures, "passed": passed}
