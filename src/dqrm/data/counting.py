"""Staged chunks -> the counts of each column's keys."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from dqrm.data.ahead import ahead
from dqrm.data.budget import Budget
from dqrm.data.splits import TRAIN, Splits
from dqrm.data.staging import Staging
from dqrm.data.vocabulary import Counter, count_chunk, position_type
from dqrm.files import flush


def count(parts: Sequence[Staging], column: int, splits: Splits | None) -> pl.DataFrame:
    """The run of one column's keys over the training rows, or over all (splits: None): key, count, first position;
    sorted by key. Where all rows of a part count, and it has been counted already (`precount`), its run is taken.
    """
    plan = parts[0].plan
    name = plan.keys[column].name if column < len(plan.keys) else plan.config.group
    counter = Counter(Budget(plan.config.memory), f"column {name}")
    for run in ahead(_runs(parts, column, splits)):
        counter.add(run)
    return counter.finish()


def precount(part: Staging) -> None:
    """Count each column's keys over all rows of a part, and keep the runs."""
    for column in range(len(part.plan.keys) + (part.plan.group is not None)):
        path = part.folder / f"run{column}.arrow"
        if path.exists() or (part.plan.hashing is not None and column < len(part.plan.keys)):
            continue
        beside = path.with_suffix(".partial")
        count([part], column, None).write_ipc(beside)
        flush(beside)
        beside.replace(path)


def _runs(parts: Sequence[Staging], column: int, splits: Splits | None) -> Iterator[pl.DataFrame]:
    row, position = 0, 0
    total = sum(sum(part.entries[column]) for part in parts)
    for part in parts:
        here = None if splits is None else splits[row : row + sum(part.rows)]
        row += sum(part.rows)
        path = part.folder / f"run{column}.arrow"
        if path.exists() and (here is None or not here.any()):
            with path.open("rb") as file:
                run = pl.read_ipc(file)
            kind = position_type(total)
            yield run.with_columns(pl.col("count").cast(kind), pl.col("first").cast(kind) + pl.lit(position, kind))
        else:
            yield from _chunks(part, column, here, position, total)
        position += sum(part.entries[column])


def _chunks(part: Staging, column: int, splits: Splits | None, position: int, total: int) -> Iterator[pl.DataFrame]:
    row = 0
    for rows, (keys, codes, lengths) in zip(part.rows, part.codes(column)):
        counted = None if splits is None else splits[row : row + rows] == TRAIN
        if counted is not None and counted.all():
            counted = None
        elif counted is not None and lengths is not None:
            counted = np.repeat(counted, lengths)
        yield count_chunk(keys, codes, counted, position, total)
        row += rows
        position += len(codes)
