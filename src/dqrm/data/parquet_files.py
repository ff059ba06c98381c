"""Parquet files: columns, number of rows, and rows in blocks."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from polars.selectors import by_name

from dqrm.data.lines import Block
from dqrm.data.sources import Source
from dqrm.errors import UserError

# What polars raises on a file that is not the Parquet file it seems to be. A panic is no Exception of Python's.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def schema(source: Source) -> pl.Schema:
    """The columns of a Parquet file and their types.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return _scan(source, rows=False).collect_schema()
    except UNREADABLE as error:
        source.require_unchanged()
        raise UserError(f"{source.where} cannot be read as Parquet ({error})") from None


def count(source: Source) -> int:
    """How many rows a Parquet file says that it has.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return int(_scan(source, rows=False).select(pl.len()).collect().item())
    except UNREADABLE as error:
        source.require_unchanged()
        raise UserError(f"{source.where} cannot be read as Parquet ({error})") from None


def blocks(source: Source, wanted: Sequence[str], rows: int, start: int = 1) -> Iterator[Block]:
    """The wanted columns of all rows from row `start` on (the first is 1) in order, at most so many at a time.

    Raises:
        UserError: it cannot be read.
    """
    row = start
    try:
        scan = _scan(source, rows=True).select(by_name(*wanted)).slice(start - 1)
        for frame in scan.collect_batches(chunk_size=rows, maintain_order=True):
            yield Block(frame, np.arange(row, row + frame.height), end=row + frame.height)
            row += frame.height
    except UNREADABLE as error:
        source.require_unchanged()
        raise UserError(f"{source.where}, after row {row - 1}: cannot be read as Parquet ({error})") from None
    finally:
        source.release()


def _scan(source: Source, rows: bool) -> pl.LazyFrame:
    # The name is a file's, whatever brackets are in it, and what its folders name is not polars' to find.
    return pl.scan_parquet(source.scannable(rows), glob=False, hive_partitioning=False)
