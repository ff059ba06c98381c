"""What a report reads of runs and studies: leniently, since one damaged file must not hide the others.

What cannot be used is left out and said in `notes`. Numbers that are not finite are not numbers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqrm.errors import UserError, printable
from dqrm.training.run import Run

Line = dict[str, Any]
_STUDY = "study.json"
_LONGEST, _HUGE = 60, 1e150


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else, and for a magnitude that sums of it may not have."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _HUGE else None


def table_of(value: Any) -> dict[str, Any]:
    """The value if it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}


def shown(text: Any) -> str:
    """A name as the page shows it: control characters escaped, not endless."""
    name = printable(str(text))
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        info, summary: run.json and summary.json; empty where there is none. lines: of metrics.jsonl with a step, by
            kind, in order. notes: what could not be read.
    """

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """Sections of the configuration."""
        found = table_of(self.info.get("config") or self.summary.get("config"))
        return {str(name): values for name, values in found.items() if isinstance(values, dict)}

    @property
    def data(self) -> dict[str, Any]:
        return table_of(self.info.get("data"))

    def figure(self, *keys: str) -> float | None:
        """A number in the summary."""
        found: Any = self.summary
        for key in keys:
            found = table_of(found).get(key)
        return number(found)

    def points(self, kind: str, name: str) -> dict[int, float]:
        """The values of a figure by step."""
        found = ((int(line["step"]), number(line.get(name))) for line in self.lines.get(kind, []))
        return {step: value for step, value in found if value is not None}

    def epoch_ends(self) -> dict[int, int]:
        """The last step of each whole epoch."""
        ends = {}
        for line in self.lines.get("evaluation", []):
            if (epoch := number(line.get("epoch"))) is not None:
                ends[int(epoch)] = int(line["step"])
        done = self.figure("epochs")
        return {epoch: step for epoch, step in ends.items() if epoch <= (max(ends) - 1 if done is None else done)}


@dataclass(frozen=True)
class Series:
    """What has a name on the page: a run, or a study's variant with a run per seed."""

    name: str
    records: tuple[Record, ...]
    seeds: tuple[int, ...] = ()

    @property
    def first(self) -> Record:
        return self.records[0] if self.records else Record(Path())


@dataclass(frozen=True)
class Subject:
    """What a page reports on.

    Attributes:
        series: the baseline first. failures: of a study's runs: (variant, seed, why).
    """

    title: str
    study: bool
    series: tuple[Series, ...]
    failures: tuple[tuple[str, str, str], ...] = ()

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.series]

    def notes(self) -> list[str]:
        """Everything that could not be read."""
        return [
            f"{each.name}{f', {record.path.name}' if self.study else ''}: {note}"
            for each in self.series
            for record in each.records
            for note in record.notes
        ]


def read(paths: Sequence[str | Path]) -> Subject:
    """The runs, or the one study, in these folders.

    Raises:
        UserError: there is no such run or study, or a study is not alone.
    """
    folders = [Path(path) for path in paths]
    studies = [folder for folder in folders if (folder / _STUDY).is_file()]
    if studies and len(folders) > 1:
        raise UserError(f"{studies[0]} is a study, expected it alone, or runs")
    if studies:
        return _study(studies[0])
    # `Run.open` says what is wrong with a folder that is no run.
    records = [read_run(folder, Run.open(folder).info) for folder in folders]
    names = _labels(folders)
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return Subject(title, False, tuple(Series(name, (record,)) for name, record in zip(names, records)))


def read_run(path: Path, info: dict[str, Any], noted: Sequence[str] = ()) -> Record:
    """What can be read of a run folder, besides `info`, its run.json; `noted`: what was wrong with that."""
    notes: list[str] = list(noted)
    summary = table_of(_json(path / "summary.json", notes))
    if not summary and len(notes) == len(noted):
        notes.append("the run is not finished: it has no summary.json")
    lines: dict[str, list[Line]] = {}
    if "ptq" in summary:  # quantized after training: there was none
        return Record(path, info, summary, lines, tuple(notes))
    for line in _lines(path / "metrics.jsonl", notes):
        lines.setdefault(str(line.get("kind")), []).append(line)
    if not lines.get("evaluation"):
        notes.append("metrics.jsonl has no evaluation")
    return Record(path, info, summary, lines, tuple(notes))


def _json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read ({shown(error)})")
        return None


def _lines(path: Path, notes: list[str]) -> Iterator[Line]:
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"metrics.jsonl could not be read ({error.strerror})")
        return
    lost = 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and (number(line.get("step")) or -1) >= 0:
            yield line
        else:
            lost += 1
    if lost:
        notes.append(f"{lost} of {len(texts)} lines of metrics.jsonl could not be read")


def _labels(folders: Sequence[Path]) -> list[str]:
    """Short names of the folders, each another one."""
    for parts in range(1, 6):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len({*names}) == len(names):
            break
    return _distinct([shown(name) for name in names])


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where one repeats: two lines of a plot must not become one."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    count: dict[str, int] = {}
    found = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        found.append(f"{name} ({count[name]})" if seen[name] > 1 else name)
    return found


def _study(folder: Path) -> Subject:
    notes: list[str] = []
    content = table_of(_json(folder / _STUDY, notes))
    if notes:
        raise UserError(f"{folder / _STUDY} is not JSON: damaged, or not written by dqrm")
    variants = content.get("variants")
    described = variants if isinstance(variants, list) else []
    names = [str(each["name"]) for each in described if isinstance(each, dict) and "name" in each]
    names = [name for name in names if Path(name).name == name]  # a name, not a path to another folder
    baseline = content.get("baseline")
    names.sort(key=lambda name: name != baseline)
    labels = _distinct([shown(name) for name in names])
    series = [_variant(label, folder / "runs" / name) for label, name in zip(labels, names)]
    failed = content.get("failures")
    failures = [each for each in (failed if isinstance(failed, list) else []) if isinstance(each, dict)]
    return Subject(
        shown(content.get("title") or content.get("name") or folder.resolve().name),
        True,
        tuple(each for each in series if each.records),
        tuple((shown(f.get("variant")), shown(f.get("seed")), printable(str(f.get("error")))) for f in failures)
        + tuple((each.name, "all", "no run was found") for each in series if not each.records),
    )


def _variant(label: str, folder: Path) -> Series:
    found = {}
    try:
        paths = list(folder.glob("seed-*"))
    except (OSError, ValueError):  # no name that a folder can have
        paths = []
    for path in paths:
        seed, notes = path.name.removeprefix("seed-"), list[str]()
        if seed.isdecimal() and path.is_dir():
            info = table_of(_json(path / "run.json", notes))
            found[int(seed)] = read_run(path, info, notes)
    return Series(label, tuple(found[seed] for seed in sorted(found)), tuple(sorted(found)))
