"""Staged chunks -> the arrays of the splits: keys are mapped to table rows, chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import folder
from dqrm.data.ahead import ahead
from dqrm.data.growth import first_day
from dqrm.data.splits import TRAIN, Splits
from dqrm.data.staging import Staging
from dqrm.data.vocabulary import Counter, Vocabulary, count_chunk
from dqrm.files import flush

Array = NDArray[Any]


def count(staged: Staging, column: int, splits: Splits, train_only: bool) -> pl.DataFrame:
    """The run of one column's keys over the training rows, or over all: key, count, first position; sorted by key."""
    counter = Counter()
    for run in ahead(_runs(staged, column, splits, train_only)):
        counter.add(run)
    return counter.finish()


def _runs(staged: Staging, column: int, splits: Splits, train_only: bool) -> Iterator[pl.DataFrame]:
    row, position = 0, 0
    for rows, (keys, codes, lengths) in zip(staged.rows, staged.codes(column)):
        counted = None
        if train_only:
            counted = splits[row : row + rows] == TRAIN
            if lengths is not None:
                counted = np.repeat(counted, lengths)
        yield count_chunk(keys, codes, counted, position, sum(staged.entries[column]))
        row += rows
        position += len(codes)


class Translations:
    """The table row of every chunk's distinct keys, int32: all columns in one file, since a process may have no more
    files open than many a log has columns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self._starts: list[list[int] | None] = []

    def add(self, staged: Staging, column: int, vocabulary: Vocabulary) -> None:
        """Append the next column, chunk by chunk."""
        self._append(staged, column, vocabulary.lookup)

    def add_hashed(self) -> None:
        """Append a column whose codes are table rows already."""
        self._starts.append(None)

    def add_groups(self, staged: Staging) -> None:
        """Append the group: numbers in order of first appearance in the log, -1 where it is missing."""
        column, group = len(staged.plan.keys), staged.plan.group
        no_missing = group is not None and group.kind == "id"  # those of a file are all categories, 0 too
        vocabulary = first_day(count(staged, column, np.empty(0, np.uint8), False), 1).vocabulary

        def number(keys: pl.Series) -> Array:
            numbers = vocabulary.lookup(keys) - 1
            if no_missing:
                return numbers.astype(np.int32)
            missing = (keys == ("" if keys.dtype == pl.String else 0)).to_numpy()
            return np.where(missing, -1, numbers).astype(np.int32)

        self._append(staged, column, number)

    def _append(self, staged: Staging, column: int, number: Callable[[pl.Series], Array]) -> None:
        starts = []
        with self._path.open("ab") as file:
            for (keys,) in ahead(staged.read(chunk, f"keys{column}") for chunk in range(len(staged.rows))):
                starts.append(file.tell())
                file.write(_bytes(number(keys)))
        self._starts.append(starts)

    def read(self, staged: Staging, chunk: int) -> list[Callable[[Array], Array]]:
        """Per column, a function from the codes of one chunk to table rows."""
        with self._path.open("rb") as file:
            return [
                np.asarray if starts is None
                else self._read(file, starts[chunk], staged.distinct[n][chunk]).__getitem__
                for n, starts in enumerate(self._starts)
            ]  # fmt: skip

    @staticmethod
    def _read(file: IO[bytes], start: int, count: int) -> Array:
        file.seek(start)
        return np.frombuffer(file.read(4 * count), np.int32)


class Writer:
    """The arrays of one split, appended to. No file stays open: of multi-valued columns there may be thousands.

    Attributes:
        rows, clicks: so far. values: ids so far in each multi-valued column. largest: of each dense column the largest
            magnitude, float32 [D]; None before there are rows.

    more: names of arrays with one number per row, besides the usual ones.
    """

    def __init__(self, path: Path, plan_multi: list[int], more: Sequence[str] = ()) -> None:
        path.mkdir()
        self._path = path
        self.rows, self.clicks = 0, 0
        self.largest: Array | None = None
        self.values = dict.fromkeys(plan_multi, 0)
        names = [folder.DENSE, folder.IDS, folder.LABEL, *more]
        self.weight = 0.0
        for number in plan_multi:
            names += [folder.values_file(number), folder.offsets_file(number)]
        self._names = names
        for name in names:
            self._append(name, np.zeros(0, "u1"))
        for number in plan_multi:
            self._append(folder.offsets_file(number), np.zeros(1, "<i8"))

    def add(self, dense: Array, ids: Array, labels: Array) -> None:
        """Rows: dense float32 [n, D], ids int32 [n, T], labels uint8 [n]."""
        for name, array in ((folder.DENSE, dense), (folder.IDS, ids), (folder.LABEL, labels)):
            self._append(name, array)
        largest = np.abs(dense).max(axis=0)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self.rows += len(labels)
        self.clicks += int(labels.sum())

    def add_weights(self, weights: Array) -> None:
        """The weights of the same rows, float32 [n]."""
        self._append(folder.WEIGHT, weights)
        self.weight += float(weights.sum(dtype=np.float64))

    def add_groups(self, groups: Array) -> None:
        """The groups of the same rows, int32 [n], -1 for none."""
        self._append(folder.GROUP, groups)

    def add_bags(self, number: int, values: Array, lengths: Array) -> None:
        """The ids of the same rows in a multi-valued column: values int32 [L], lengths [n]."""
        self._append(folder.values_file(number), values)
        ends = self.values[number] + np.cumsum(lengths, dtype=np.int64)
        self._append(folder.offsets_file(number), ends)
        self.values[number] += len(values)

    def finish(self) -> None:
        """Returns when all is on disk."""
        for name in self._names:
            flush(self._path / name)

    def _append(self, name: str, array: Array) -> None:
        with (self._path / name).open("ab") as file:
            file.write(_bytes(array))


def _bytes(array: Array) -> memoryview:
    """What numpy's own `tofile` writes, which cannot say why it failed."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_splits(
    staged: Staging, splits: Splits, translated: Translations, output: Path, advance: Callable[[int], None]
) -> list[Writer]:
    """Write the arrays of all splits into `output`; returns their writers, with rows, clicks and values.

    translated: the model's columns, then the group, if there is one.
    """
    keys, weighted, group = staged.plan.keys, staged.plan.weight is not None, len(staged.plan.keys)
    grouped = staged.plan.group is not None
    single = [n for n, key in enumerate(keys) if not key.multi]
    multi = [n for n, key in enumerate(keys) if key.multi]
    names = ["label", *(f"codes{n}" for n in range(len(keys))), *(f"lengths{n}" for n in multi)]
    width = len(staged.plan.dense)
    names += ["dense"] * (width > 0) + ["weight"] * weighted + [f"codes{group}"] * grouped
    more = [folder.WEIGHT] * weighted + [folder.GROUP] * grouped
    writers = [Writer(output / name, multi, more) for name in folder.SPLITS]
    row = 0
    chunks = ahead(staged.read(chunk, *names) for chunk in range(len(staged.rows)))
    for chunk, (rows, read) in enumerate(zip(staged.rows, chunks)):
        arrays = {name: series.to_numpy() for name, series in zip(names, read)}
        dense = arrays["dense"].reshape(rows, width) if width else np.empty((rows, 0), np.float32)
        ids = np.empty((rows, len(single)), np.int32)
        maps = translated.read(staged, chunk)
        for at, n in enumerate(single):
            ids[:, at] = maps[n](arrays[f"codes{n}"])
        here = splits[row : row + rows]
        for split, writer in enumerate(writers):
            chosen = here == split
            if not chosen.any():
                continue
            whole = bool(chosen.all())
            part = slice(None) if whole else chosen
            writer.add(dense[part], ids[part], arrays["label"][part])
            if weighted:
                writer.add_weights(arrays["weight"][part])
            if grouped:
                writer.add_groups(maps[group](arrays[f"codes{group}"][part]))
            for n in multi:
                lengths, values = arrays[f"lengths{n}"], maps[n](arrays[f"codes{n}"])
                writer.add_bags(n, values if whole else values[np.repeat(chosen, lengths)], lengths[part])
        row += rows
        advance(rows)
    for writer in writers:
        writer.finish()
    return writers
