"""Writes the arrays of the splits: keys become table rows, chunk by chunk."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import folder
from dqrm.data.ahead import ahead
from dqrm.data.splits import TRAIN, Splits
from dqrm.data.staging import Staging
from dqrm.data.vocabulary import Counter, Vocabulary, count_chunk

Array = NDArray[Any]


def build_vocabulary(staged: Staging, column: int, splits: Splits, train_only: bool, min_count: int) -> Vocabulary:
    """Counts one column over the training rows, or over all."""
    counter = Counter()
    for run in ahead(_runs(staged, column, splits, train_only)):
        counter.add(run)
    return counter.finish(min_count)


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


def translate(staged: Staging, column: int, vocabulary: Vocabulary, path: Path) -> None:
    """Writes the table row of every chunk's distinct keys, int32, one chunk after the other."""
    with path.open("wb") as file:
        for (keys,) in ahead(staged.read(chunk, f"keys{column}") for chunk in range(len(staged.rows))):
            vocabulary.lookup(keys).tofile(file)


class Writer:
    """The arrays of one split, appended to."""

    def __init__(self, path: Path, plan_multi: list[int]) -> None:
        path.mkdir()
        self.rows, self.clicks = 0, 0
        self.values = dict.fromkeys(plan_multi, 0)
        names = [folder.DENSE, folder.IDS, folder.LABEL]
        for number in plan_multi:
            names += [folder.values_file(number), folder.offsets_file(number)]
        self._files = {name: (path / name).open("wb") for name in names}
        for number in plan_multi:
            np.zeros(1, "<i8").tofile(self._files[folder.offsets_file(number)])

    def add(self, dense: Array, ids: Array, labels: Array) -> None:
        """Rows: dense float32 [n, D], ids int32 [n, T], labels uint8 [n]."""
        for name, array in ((folder.DENSE, dense), (folder.IDS, ids), (folder.LABEL, labels)):
            np.ascontiguousarray(array).tofile(self._files[name])
        self.rows += len(labels)
        self.clicks += int(labels.sum())

    def add_bags(self, number: int, values: Array, lengths: Array) -> None:
        """The ids of the same rows in a multi-valued column: values int32 [L], lengths [n]."""
        values.tofile(self._files[folder.values_file(number)])
        ends = self.values[number] + np.cumsum(lengths, dtype=np.int64)
        ends.tofile(self._files[folder.offsets_file(number)])
        self.values[number] += len(values)

    def close(self, durable: bool) -> None:
        """`durable`: not before all is on disk."""
        for file in self._files.values():
            if durable:
                file.flush()
                os.fsync(file.fileno())
            file.close()


def write_splits(
    staged: Staging, splits: Splits, translated: list[Path], output: Path, advance: Callable[[int], None]
) -> list[Writer]:
    """Writes the arrays of all splits into `output`. The result has their rows, clicks and values."""
    keys = staged.plan.keys
    single = [n for n, key in enumerate(keys) if not key.multi]
    multi = [n for n, key in enumerate(keys) if key.multi]
    names = ["label", *(f"codes{n}" for n in range(len(keys))), *(f"lengths{n}" for n in multi)]
    width = len(staged.plan.dense)
    if width:
        names.append("dense")
    writers = [Writer(output / name, multi) for name in folder.SPLITS]
    files = [path.open("rb") for path in translated]
    done, row = False, 0
    try:
        chunks = ahead(staged.read(chunk, *names) for chunk in range(len(staged.rows)))
        for chunk, (rows, read) in enumerate(zip(staged.rows, chunks)):
            found = {name: series.to_numpy() for name, series in zip(names, read)}
            dense = found["dense"].reshape(rows, width) if width else np.empty((rows, 0), np.float32)
            ids = np.empty((rows, len(single)), np.int32)
            maps = [np.fromfile(file, np.int32, staged.distinct[n][chunk]) for n, file in enumerate(files)]
            for at, n in enumerate(single):
                ids[:, at] = maps[n][found[f"codes{n}"]]
            here = splits[row : row + rows]
            for split, writer in enumerate(writers):
                chosen = here == split
                if not chosen.any():
                    continue
                whole = bool(chosen.all())
                part = slice(None) if whole else chosen
                writer.add(dense[part], ids[part], found["label"][part])
                for n in multi:
                    lengths, values = found[f"lengths{n}"], maps[n][found[f"codes{n}"]]
                    writer.add_bags(n, values if whole else values[np.repeat(chosen, lengths)], lengths[part])
            row += rows
            advance(rows)
        done = True
    finally:
        for file in files:
            file.close()
        for writer in writers:
            writer.close(durable=done)
    return writers
