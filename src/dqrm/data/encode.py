"""Staged chunks -> the arrays of the splits: keys are mapped to table rows, chunk by chunk."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import folder
from dqrm.data.ahead import ahead
from dqrm.data.journal import Journal
from dqrm.data.splits import Splits
from dqrm.data.staging import Staging
from dqrm.files import flush
from dqrm.kernels import logs

Array = NDArray[Any]
# Of a column, the table row (of the group: the number) of each of sorted keys.
Numbers = Callable[[int], Callable[[pl.Series], Array]]


class Translations:
    """The table row of every chunk's distinct keys, int32: all columns in one file, since a process may have no more
    files open than many a log has columns.

    starts: of each column that is there, where the chunks' rows begin; None: its codes are table rows already.
    """

    def __init__(self, path: Path, starts: Sequence[list[int] | None]) -> None:
        self._path, self._starts = path, list(starts)

    def add(self, staged: Staging, column: int, number: Callable[[pl.Series], Array] | None) -> list[int] | None:
        """Append the next column, chunk by chunk; returns where its chunks begin."""
        starts: list[int] | None = None if number is None else []
        if number is not None and starts is not None:
            at = max((each[-1] + 4 * staged.distinct[n][-1] for n, each in enumerate(self._starts) if each), default=0)
            self._path.touch()
            with self._path.open("r+b") as file:
                file.seek(at)
                for (keys,) in ahead(staged.read(chunk, f"keys{column}") for chunk in range(len(staged.rows))):
                    starts.append(file.tell())
                    file.write(_bytes(number(keys)))
            flush(self._path)
        self._starts.append(starts)
        return starts

    def read(self, staged: Staging, chunk: int) -> list[Array | None]:
        """Per column, the table row of each code of one chunk; None: the codes are table rows."""
        if not any(self._starts):
            return [None] * len(self._starts)
        with self._path.open("rb") as file:
            return [
                None if starts is None else self._read(file, starts[chunk], staged.distinct[n][chunk])
                for n, starts in enumerate(self._starts)
            ]

    @staticmethod
    def _read(file: IO[bytes], start: int, count: int) -> Array:
        file.seek(start)
        return np.frombuffer(file.read(4 * count), np.int32)


class Writer:
    """One part's share of the arrays of one split, written where it belongs: the same bytes, however often. No file
    stays open: of multi-valued columns there may be thousands.

    first: rows before the share. values: ids before it in each multi-valued column.

    Attributes:
        rows, clicks: so far, in this share. values: ids so far in each multi-valued column. largest: of each dense
            column the largest magnitude, float32 [D]; None before there are rows.
    """

    def __init__(self, path: Path, first: int, values: dict[int, int]) -> None:
        self._path, self._first, self._first_values = path, first, values
        self.rows, self.clicks = 0, 0
        self.values = dict.fromkeys(values, 0)
        self.largest: Array | None = None
        self._written: set[str] = set()

    def add(self, dense: Array, ids: Array, labels: Array) -> None:
        """Rows: dense float32 [n, D], ids int32 [n, T], labels uint8 [n]; after their weights, groups and bags."""
        for name, array in ((folder.DENSE, dense), (folder.IDS, ids), (folder.LABEL, labels)):
            self._put(name, array)
        largest = np.abs(dense).max(axis=0)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self.rows += len(labels)
        self.clicks += int(labels.sum())

    def add_bags(self, number: int, values: Array, lengths: Array) -> None:
        """The ids of the next rows in a multi-valued column: values int32 [L], lengths [n]."""
        first = self._first_values[number] + self.values[number]
        self._put(folder.values_file(number), values, first)
        ends = first + np.cumsum(lengths, dtype=np.int64)
        self._put(folder.offsets_file(number), ends, self._first + self.rows + 1)
        self.values[number] += len(values)

    def add_column(self, name: str, array: Array) -> None:
        """One number for each of the next rows: weights float32 [n], or groups int32 [n], -1 for none."""
        self._put(name, array)

    def take_written(self) -> list[Path]:
        """The files that were written to since the last call."""
        written, self._written = self._written, set()
        return [self._path / name for name in written]

    def record(self) -> dict[str, Any]:
        """What has been written, for `restore`."""
        largest = None if self.largest is None else self.largest.tolist()
        values = {str(number): count for number, count in self.values.items()}
        return {"rows": self.rows, "clicks": self.clicks, "values": values, "largest": largest}

    def restore(self, record: dict[str, Any]) -> None:
        """Go on behind what was written before."""
        self.rows, self.clicks = record["rows"], record["clicks"]
        self.values = {int(number): count for number, count in record["values"].items()}
        self.largest = None if record["largest"] is None else np.array(record["largest"], np.float32)

    def _put(self, name: str, array: Array, at: int | None = None) -> None:
        """Write an array at item or row `at` of a file; None: at the next row."""
        at = self._first + self.rows if at is None else at
        with (self._path / name).open("r+b") as file:
            file.seek(at * array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64)))
            file.write(_bytes(array))
        self._written.add(name)


def _bytes(array: Array) -> memoryview:
    """What numpy's own `tofile` writes, which cannot say why it failed."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def create(path: Path, multi: Sequence[int], more: Sequence[str]) -> None:
    """Make the files of a split's arrays, where they are not there. more: names besides the usual ones."""
    path.mkdir(exist_ok=True)
    names = [folder.DENSE, folder.IDS, folder.LABEL, *more, *map(folder.values_file, multi)]
    for name in names:
        (path / name).touch()
    for number in multi:
        with (path / folder.offsets_file(number)).open("ab") as file:
            if not file.tell():
                file.write(bytes(8))


def write_splits(
    staged: Staging,
    splits: Splits,
    numbers: Numbers,
    writers: Sequence[Writer],
    advance: Callable[[int], None],
) -> None:
    """Write a part's share of the arrays of all splits. It resumes behind what has been written.

    splits: of the part's rows. numbers: of the columns' keys. writers: one of each split.
    """
    keys, weighted, group = staged.plan.keys, staged.plan.weight is not None, len(staged.plan.keys)
    grouped = staged.plan.group is not None
    journal = Journal(staged.folder / "encoded.jsonl")
    translated = _translate(staged, numbers, journal)
    single = [n for n, key in enumerate(keys) if not key.multi]
    multi = [n for n, key in enumerate(keys) if key.multi]
    names = ["label", *(f"codes{n}" for n in range(len(keys))), *(f"lengths{n}" for n in multi)]
    width = len(staged.plan.dense)
    names += ["dense"] * (width > 0) + ["weight"] * weighted + [f"codes{group}"] * grouped
    done = [line["writers"] for line in journal.lines if "writers" in line]
    for writer, record in zip(writers, done[-1] if done else ()):
        writer.restore(record)
    row = sum(staged.rows[: len(done)])
    advance(row)
    chunks = ahead(staged.read(chunk, *names) for chunk in range(len(done), len(staged.rows)))
    with _Steps(journal) as steps:
        for chunk, read in enumerate(chunks, len(done)):
            rows = staged.rows[chunk]
            arrays = {name: series.to_numpy() for name, series in zip(names, read)}
            dense = arrays["dense"].reshape(rows, width) if width else np.empty((rows, 0), np.float32)
            ids = np.empty((rows, len(single)), np.int32)
            maps = translated.read(staged, chunk)
            for at, n in enumerate(single):
                _put_column(ids, at, arrays[f"codes{n}"], maps[n])
            here = splits[row : row + rows]
            for split, writer in enumerate(writers):
                chosen = here == split
                if not chosen.any():
                    continue
                whole = bool(chosen.all())
                part = slice(None) if whole else chosen
                if weighted:
                    writer.add_column(folder.WEIGHT, arrays["weight"][part])
                if grouped:
                    writer.add_column(folder.GROUP, _mapped(maps[group], arrays[f"codes{group}"][part]))
                for n in multi:
                    lengths, values = arrays[f"lengths{n}"], _mapped(maps[n], arrays[f"codes{n}"])
                    writer.add_bags(n, values if whole else values[np.repeat(chosen, lengths)], lengths[part])
                writer.add(dense[part], ids[part], arrays["label"][part])
            steps.done(writers)
            row += rows
            advance(rows)


def _mapped(table_rows: Array | None, codes: Array) -> Array:
    return codes if table_rows is None else table_rows[codes]


def _put_column(ids: Array, column: int, codes: Array, table_rows: Array | None) -> None:
    """ids[:, column] = the table rows of the codes."""
    if logs.available() and (codes.dtype == np.int32 if table_rows is None else codes.itemsize <= 4):
        logs.put_column(codes, table_rows, ids, column)
    else:
        ids[:, column] = _mapped(table_rows, codes)


class _Steps:
    """Tell the journal of each chunk once it is on disk, while the next one is written."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: Any = None

    def __enter__(self) -> "_Steps":
        return self

    def done(self, writers: Sequence[Writer]) -> None:
        """A chunk has been written."""
        self._wait()
        paths = [path for writer in writers for path in writer.take_written()]
        self._waiting = self._thread.submit(self._tell, paths, [writer.record() for writer in writers])

    def _tell(self, paths: Sequence[Path], records: list[dict[str, Any]]) -> None:
        for path in paths:
            flush(path)
        self._journal.add({"writers": records})

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()


def _translate(staged: Staging, numbers: Numbers, journal: Journal) -> Translations:
    """The table rows of the chunks' keys: of the model's columns, then of the group."""
    known = [line["starts"] for line in journal.lines if "starts" in line]
    translated = Translations(staged.folder / "rows.i32", known)
    hashed = staged.plan.hashing is not None
    for column in range(len(known), len(staged.plan.keys) + (staged.plan.group is not None)):
        hashes = hashed and column < len(staged.plan.keys)
        starts = translated.add(staged, column, None if hashes else numbers(column))
        journal.add({"starts": starts})
    return translated
