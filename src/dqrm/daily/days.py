"""The days of a log, and what is kept of them in the folder of `dqrm daily`.

daily.json            how days are prepared and trained (written first)
days.jsonl            a line for each day that is done (written last of each day, whole, and renamed)
current.dqrm          the published model
days/NAME/data        the dataset      days/NAME/before.json  metrics before training on it
days/NAME/run         the run          days/NAME/model.dqrm   the exported model
"""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqrm.daily.config import Recipe
from dqrm.data.listing import hidden, is_url, local, natural
from dqrm.errors import UserError
from dqrm.files import FLAG, OBJECT, TEXT, flush, read_json, require, write_json

_RECIPE, _DAYS, _CURRENT = "daily.json", "days.jsonl", "current.dqrm"
_OURS = (_RECIPE, f"{_RECIPE}.partial", ".lock")
_LINE = {"day": TEXT, "published": FLAG, "rows": OBJECT, "before": (OBJECT, None), "gate": (OBJECT, None)}


def list_days(logs: Sequence[str]) -> dict[str, Path | str]:
    """The files and folders that paths, URLs and globs name, each the log of a day, by their names in natural order.

    Raises:
        UserError: none, or two of the same name.
    """
    found: list[tuple[str, Path | str]] = []
    for text in map(local, logs):
        kept = [(name, source) for name, source in _matches(text) if not hidden(name)]
        if not kept:
            raise UserError(f"nothing matches '{text}', expected a file or a folder for each day")
        found += kept
    days: dict[str, Path | str] = {}
    for name, source in sorted(found, key=lambda each: natural(Path(each[0]))):
        if isinstance(source, Path) and not source.exists():
            raise UserError(f"there is no {source}, expected the log of a day")
        if name in days:
            raise UserError(f"{days[name]} and {source} have the same name, expected one file or folder for each day")
        days[name] = source
    return days


def _matches(text: str) -> list[tuple[str, Path | str]]:
    """What a path, a URL or a glob names, each with its name."""
    if is_url(text):
        from dqrm.data import stores

        return [(name, url) for url, name in stores.matches(text).items()]
    literal = os.path.lexists(text) or not glob.has_magic(text)
    return [(path.name, path) for path in map(Path, [text] if literal else glob.glob(text))]


@dataclass(frozen=True)
class Folder:
    """The folder of `dqrm daily`."""

    path: Path

    def day(self, name: str) -> Path:
        """What is kept of a day."""
        return self.path / "days" / name

    def data(self, name: str) -> Path:
        return self.day(name) / "data"

    def run(self, name: str) -> Path:
        return self.day(name) / "run"

    def model(self, name: str) -> Path:
        return self.day(name) / "model.dqrm"

    @property
    def current(self) -> Path:
        """The published model."""
        return self.path / _CURRENT

    def require_own(self) -> None:
        """Raise UserError if the folder holds something and is not one of `dqrm daily`."""
        others = {entry.name for entry in self.path.iterdir()} - set(_OURS) if self.path.is_dir() else set()
        if others and not (self.path / _RECIPE).exists():
            raise UserError(f"{self.path} holds {min(others)} and no {_RECIPE}; name another folder with -o")

    def begin(self, recipe: Recipe) -> None:
        """Record how days are prepared and trained, or compare it with the record.

        Raises:
            UserError: the folder was started with another configuration.
        """
        content = {"format_version": 1, "prepare": asdict(recipe.prepare(None)), "train": recipe.train.to_dict()}
        content = json.loads(json.dumps(content))
        file = self.path / _RECIPE
        if not file.exists():
            write_json(file, content)
            return
        before = read_json(file)
        require(file, before, {"prepare": OBJECT, "train": {"*": OBJECT}})
        for name, got, wanted in _differences(content, before):
            raise UserError(
                f"{recipe.file} has {name} {got}, but {self.path} was started with {wanted}; name another folder with "
                "-o"
            )

    def done(self) -> list[dict[str, Any]]:
        """The line of each day that is done.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / _DAYS
        if not file.exists():
            return []
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except ValueError:
            raise UserError(f"{file} is not JSON lines: damaged, or not written by dqrm") from None
        for line in lines:
            require(file, line, _LINE)
        return lines

    def finish(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write the lines of all days that are done."""
        partial = self.path / f"{_DAYS}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / _DAYS)
        flush(self.path)

    def publish(self, name: str) -> None:
        """Let a day's model take the place of the published one: a reader sees one of the two, whole."""
        partial = self.current.with_name(f"{_CURRENT}.partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(self.model(name), partial)
        except OSError:  # a file system without links
            shutil.copyfile(self.model(name), partial)
            flush(partial)
        os.replace(partial, self.current)
        flush(self.path)

    def prune(self, lines: Sequence[dict[str, Any]], keep: int) -> None:
        """Delete what is kept of days that are done, but of the last `keep` and of the published one."""
        wanted = {line["day"] for line in lines[-keep:]} | {published(lines)}
        for line in lines:
            if line["day"] not in wanted and self.day(line["day"]).exists():
                shutil.rmtree(self.day(line["day"]))


def published(lines: Sequence[dict[str, Any]]) -> str | None:
    """The day whose model is the published one."""
    return next((line["day"] for line in reversed(lines) if line["published"]), None)


def _differences(now: dict[str, Any], before: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    pairs = [
        (now["prepare"], before["prepare"]),
        *((now["train"][name], before["train"].get(name, {})) for name in now["train"]),
    ]
    for got, wanted in pairs:
        for name, value in got.items():
            if value != wanted.get(name):
                yield name, value, wanted.get(name)
