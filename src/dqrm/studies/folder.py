"""The folder of a study, which `dqrm study` and `dqrm tune` write.

study.json                   title, data, baseline, seeds, variants with their configurations (of `dqrm tune` also the
                             fields that it chose), failures
runs/<variant>/seed-<n>/     a run folder as of `dqrm train`; of post-training quantization only metrics.jsonl, with one
                             line, and summary.json, with ptq and the config of what was quantized
results.csv                  a row for each run and evaluation: on validation during training, on test at the end
results.md                   tables of means over seeds
log.txt                      what the runs printed

study.json is written first and after each run, the results after each run; a run counts as finished when it has its
summary.json.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.files import COUNT, NUMBER, OBJECT, TEXT, exclusive, read_json, replacing, require, write_json
from dqrm.studies.plan import Plan, Variant
from dqrm.training.metrics import METRICS
from dqrm.training.run import versions

FORMAT_VERSION = 1
STUDY, RESULTS, TABLES, LOG, _LOCK = "study.json", "results.csv", "results.md", "log.txt", ".lock"
_SHAPE = {
    "format_version": COUNT,
    "name": TEXT,
    "title": TEXT,
    "baseline": TEXT,
    "seeds": [COUNT],
    "data": {"path": TEXT, "fingerprint": TEXT},
    "variants": [{"name": TEXT, "source": (TEXT, None), "ptq": (OBJECT, None), "config": (OBJECT, None)}],
    "failures": [{"variant": TEXT, "seed": COUNT, "error": TEXT}],
}
_SUMMARY = {
    "best": (OBJECT, None),
    "test": (OBJECT, None),
    "stored_bytes": {"total": COUNT},
    "samples_per_second?": NUMBER,
    "exchange?": {"payload_bytes": NUMBER},
}


@dataclass(frozen=True)
class Result:
    """What is known of a run, finished or not.

    Attributes:
        evaluations: on validation, in order: lines of metrics.jsonl. summary: its summary.json; None: not finished.
    """

    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """The result in a run folder; a folder that is not there, or without any evaluation, gives an empty one.

        Raises:
            UserError: a file is damaged.
        """
        summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else None
        if summary is not None:
            require(folder / "summary.json", summary, _SUMMARY)
        return cls(list(_evaluations(folder / "metrics.jsonl")), summary)

    def test(self, metric: str) -> float | None:
        """A figure on test at the best checkpoint; None where there is none."""
        return finite(((self.summary or {}).get("test") or {}).get(metric))

    @property
    def best(self) -> dict[str, Any]:
        """Of the chosen checkpoint: step, epoch and metrics on validation; empty where there is none."""
        return (self.summary or {}).get("best") or {}

    def curve(self, metric: str) -> list[float]:
        """The figures on validation, in order."""
        return [value for line in self.evaluations if (value := finite(line.get(metric))) is not None]


def _evaluations(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            return  # a run that is being written, or was killed
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: damaged, or not written by dqrm")
        if line.get("kind") == "evaluation":
            yield line


def finite(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


@dataclass
class Folder:
    """A study's folder and what its study.json says."""

    path: Path
    name: str
    title: str
    baseline: str
    seeds: list[int]
    data: dict[str, str]
    variants: list[dict[str, Any]]
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def plan(cls, path: Path, plan: Plan, dataset: Dataset) -> "Folder":
        """The folder of a plan; nothing is written."""
        data = {"path": str(dataset.path.resolve()), "fingerprint": dataset.fingerprint}
        variants = [_described(each) for each in plan.variants]
        return cls(path, plan.name, plan.title, plan.baseline, list(plan.seeds), data, variants)

    @classmethod
    def open(cls, path: str | Path) -> "Folder":
        """The folder of a study.

        Raises:
            UserError: it is none, or of another format version.
        """
        path = Path(path)
        if not (path / STUDY).is_file():
            raise UserError(f"{path} holds no {STUDY}, expected the folder of a study")
        content = read_json(path / STUDY)
        require(path / STUDY, content, _SHAPE)
        if content["format_version"] != FORMAT_VERSION:
            theirs = content["format_version"]
            raise UserError(f"{path} is a study of format version {theirs}, this dqrm reads version {FORMAT_VERSION}")
        names = ("name", "title", "baseline", "seeds", "data", "variants", "failures")
        return cls(path, *(content[name] for name in names))

    @contextmanager
    def begun(self, resume: bool) -> Iterator[None]:
        """Inside, the folder is this process's and has its study.json.

        Raises:
            UserError: it holds something, and `resume` is False; or something else than a study on this data.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, expected the name of a folder")
        names = {each.name for each in self.path.iterdir()} - {_LOCK} if self.path.exists() else set()
        if names and not resume:
            hint = "--resume continues it, or name" if STUDY in names else "name"
            raise UserError(f"{self.path} exists and is not empty; {hint} another folder with -o")
        if names:
            earlier = Folder.open(self.path)
            if earlier.name != self.name:
                raise UserError(f"{self.path} holds {earlier.name!r}, not {self.name!r}; name another folder with -o")
            if earlier.data["fingerprint"] != self.data["fingerprint"]:
                raise UserError(f"{self.path} holds runs on other data ({earlier.data['path']}); name another folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from None
        with exclusive(self.path / _LOCK, f"another process works on {self.path}; wait for it or stop it"):
            self.write()
            yield

    def run(self, variant: str, seed: int) -> Path:
        """The folder of a run."""
        return self.path / "runs" / variant / f"seed-{seed}"

    def results(self) -> dict[str, dict[int, Result]]:
        """The results of all runs, by variant and seed."""
        return {
            each["name"]: {seed: Result.read(self.run(each["name"], seed)) for seed in self.seeds}
            for each in self.variants
        }

    def write(self) -> None:
        """study.json."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        write_json(self.path / STUDY, {"format_version": FORMAT_VERSION, "versions": versions(), **values})

    def write_results(self, results: Mapping[str, Mapping[int, Result]], tables: str) -> None:
        """results.csv of the finished runs, and results.md."""
        for name, text in ((RESULTS, results_csv(results, self.seeds)), (TABLES, tables)):
            with replacing(self.path / name, f"another process writes {self.path / name}") as partial:
                partial.write_text(text, encoding="utf-8")


def _described(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "source": variant.source,
        "ptq": asdict(variant.ptq) if variant.ptq else None,
        "config": variant.config.to_dict() if variant.config else None,
    }


def results_csv(results: Mapping[str, Mapping[int, Result]], seeds: Sequence[int]) -> str:
    """The text of results.csv: finished runs, by seed and variant; an empty cell: no figure."""
    lines = []
    for seed in seeds:
        for variant, runs in results.items():
            run = runs[seed]
            if run.summary is None:
                continue
            common = {"variant": variant, "seed": seed, "weight_bytes": run.summary["stored_bytes"]["total"]}
            lines += [{**line, **common, "split": "validation", "best": line.get("step") == run.best.get("step")}
                      for line in run.evaluations]  # fmt: skip
            if run.summary["test"]:
                chosen = {name: run.best.get(name) for name in ("epoch", "step", "train_loss")}
                times = {"train_seconds": run.summary.get("train_seconds")}
                lines.append({**run.summary["test"], **chosen, **common, **times, "split": "test", "best": True})
    first = ["variant", "seed", "split", "epoch", "step", "best", "rows", "train_loss"]
    names = [name for name in METRICS if any(finite(line.get(name)) is not None for line in lines)]
    text = io.StringIO()
    file = csv.DictWriter(text, [*first, *names, "weight_bytes", "train_seconds"], extrasaction="ignore")
    file.writeheader()
    for line in lines:
        file.writerow({name: int(value) if isinstance(value, bool) else value for name, value in line.items()})
    return text.getvalue()
