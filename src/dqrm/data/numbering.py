"""The table rows of a log's ids: each column's vocabulary is built and written."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import folder, growth
from dqrm.data.ahead import ahead
from dqrm.data.columns import KeyColumn, Plan
from dqrm.data.counting import count
from dqrm.data.extension import Extended
from dqrm.data.journal import Journal
from dqrm.data.splits import Splits
from dqrm.data.staging import Staging
from dqrm.data.vocabulary import Vocabulary
from dqrm.files import flush

Array = NDArray[Any]
_GROUP = "group.parquet"


class Numbering:
    """The numbered columns, in the order of the schema.

    Attributes:
        columns: their entries in dataset.json. files: written, as paths in the folder. tables: what changed in each
            table, for a dataset that extends another.
    """

    def __init__(self, plan: Plan, lines: Sequence[dict[str, Any]]) -> None:
        self._plan = plan
        self.columns: list[dict[str, Any]] = [line["entry"] for line in lines]
        self.files: list[str] = [file for line in lines for file in line["files"]]
        self.tables: list[dict[str, int]] = [line["table"] for line in lines]
        self._digests: list[str | None] = [line["digest"] for line in lines]

    def digest(self) -> str:
        """SHA-256 of what decides how a row of a log becomes a model's input: equal where models can be exchanged."""
        config = self._plan.config
        content = {
            "dense": list(self._plan.dense),
            "dense_transform": config.dense_transform,
            "null_values": list(config.null_values),
            "subsample_negatives": config.subsample_negatives,
            "columns": [{**entry, "vocabulary": digest} for entry, digest in zip(self.columns, self._digests)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def number(
    parts: Sequence[Staging], splits: Splits, plan: Plan, path: Path, work: Path, extended: Extended | None, tell: Any
) -> None:
    """Count the ids of each column in all parts, give them rows, and write the vocabularies into the folder `path`;
    where ids are hashed, only record how. It resumes behind the columns that are done.

    extended: the dataset whose vocabularies are continued; None: they begin here. work: for what `load` reads.
    """
    journal = Journal(work / "numbered.jsonl")
    left = range(len(journal.lines), len(plan.keys))
    if plan.hashing is not None:
        for at in left:
            hashed = plan.hashing[at]
            entry = {**_entry(plan, plan.keys[at], hashed.rows, None), **hashed.describe()}
            journal.add({"entry": entry, "files": [], "table": {}, "digest": None})
    else:
        tell("counting ids", left.start, len(plan.keys))
        counted = splits if plan.config.vocabulary == "train" else None
        for at, run in zip(left, _in_turn(parts, left, counted)):
            journal.add(_write(plan, at, run(), path, work, extended))
            tell("counting ids", at + 1, len(plan.keys))
    if plan.group is not None and not (work / _GROUP).exists():
        grown = growth.first_day(count(parts, len(plan.keys), None), 1)
        grown.vocabulary.write(work / "group.partial")
        flush(work / "group.partial")
        (work / "group.partial").replace(work / _GROUP)


def _in_turn(parts: Sequence[Staging], columns: range, counted: Splits | None) -> Iterator[Callable[[], pl.DataFrame]]:
    """Per column, what returns its counts: while one column is written, the next one is counted. Within a budget only
    when they are asked for, so that one column's ids are in memory at a time."""
    if parts[0].plan.config.memory is not None:
        yield from (partial(count, parts, at, counted) for at in columns)
    else:
        for run in ahead(count(parts, at, counted) for at in columns):
            yield partial(_same, run)


def _same(run: pl.DataFrame) -> pl.DataFrame:
    return run


def load(plan: Plan, work: Path) -> Numbering:
    """What `number` has made."""
    return Numbering(plan, Journal(work / "numbered.jsonl").lines)


def lookup(plan: Plan, work: Path, column: int) -> Callable[[pl.Series], Array]:
    """Of a column, the table row of each of sorted keys, int32.

    Of the group, which comes after the model's columns, the number in order of first appearance in the log, -1 where it
    is missing.
    """
    if column < len(plan.keys):
        with (work / f"rows{column}.arrow").open("rb") as file:
            frame = pl.read_ipc(file)
        return Vocabulary(frame["key"], frame["row"].to_numpy(), None).lookup
    vocabulary = Vocabulary.read(work / _GROUP)
    no_missing = plan.group is not None and plan.group.kind == "id"  # those of a file are all categories, 0 too

    def numbers(keys: pl.Series) -> Array:
        found = vocabulary.lookup(keys) - 1
        if no_missing:
            return found.astype(np.int32)
        missing = (keys == ("" if keys.dtype == pl.String else 0)).to_numpy()
        return np.where(missing, -1, found).astype(np.int32)

    return numbers


def _write(plan: Plan, at: int, run: pl.DataFrame, path: Path, work: Path, extended: Extended | None) -> dict[str, Any]:
    key = plan.keys[at]
    grown = extended.grow(at, run) if extended else growth.first_day(run, plan.config.min_count)
    files = [folder.vocabulary_file(at, key.name)]
    (path / files[0]).parent.mkdir(exist_ok=True)
    grown.vocabulary.write(path / files[0])
    # Sorted by key, as they will be looked up.
    sorted_rows = pl.DataFrame({"key": grown.vocabulary.keys, "row": grown.vocabulary.table_rows})
    sorted_rows.write_ipc(work / f"rows{at}.arrow")
    if grown.rare.height:
        files.append(folder.rare_file(files[0]))
        (path / files[1]).parent.mkdir(exist_ok=True)
        growth.write_rare(grown.rare, path / files[1])
    for file in (*(path / name for name in files), work / f"rows{at}.arrow"):
        flush(file)
    entry = _entry(plan, key, grown.vocabulary.rows, files[0])
    return {"entry": entry, "files": files, "table": grown.counts(), "digest": grown.vocabulary.digest()}


def _entry(plan: Plan, key: KeyColumn, rows: int, file: str | None) -> dict[str, Any]:
    return {
        "name": key.name,
        "rows": rows,
        "multi": key.multi,
        "parts": list(key.parts),
        "key": key.kind,
        "key_version": plan.key_version,
        "hash": key.hash_name() if plan.config.max_rows_per_table is not None else None,
        "vocabulary": file,
    }
