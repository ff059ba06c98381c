"""The table row of each key.

Every chunk's distinct keys are a sorted run (key, count, first position). Runs of like size are merged as they come, so
that the work stays n log n and the memory near the vocabulary's own, however many chunks there are.
"""

import hashlib
import io
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.budget import Budget
from dqrm.errors import UserError
from dqrm.kernels import logs

Array = NDArray[Any]

KEY_TYPES = (pl.UInt32, pl.UInt64, pl.String)
# The digest of `Vocabulary.to_bytes` stands in the metadata of the Parquet file, over all of it but these digits.
_SEAL, _DIGITS = b"dqrm-sha256:", 64
# The metadata that has the number of the table's rows, where it is not that of the keys and 1.
_ROWS = "dqrm.rows"
# Keys hashed at once.
_PIECE = 1 << 17


class Vocabulary:
    """The table row of each of K keys. Row 0 is for keys that are unseen or rare.

    Attributes:
        keys: sorted and distinct. table_rows: int32 [K], each 1 or more, distinct.
        counts: int64 [K], or float64 where they decay; None if unknown.
        rows: rows of the table: row 0, those of the keys, and vacant ones, whose keys were evicted.
        since: int32 [K], the day on which each key was given its row. last: int32 [K], the last day on which it was
            seen. None: both are day 0, that of a dataset which extends no other.
    """

    def __init__(
        self,
        keys: pl.Series,
        table_rows: Array,
        counts: Array | None,
        rows: int | None = None,
        since: Array | None = None,
        last: Array | None = None,
    ) -> None:
        self.keys, self.table_rows, self.counts = keys, table_rows, counts
        self.rows = len(keys) + 1 if rows is None else rows
        self.since, self.last = since, last

    def as_of(self, day: int, rows: int) -> "Vocabulary":
        """Only the keys whose rows were theirs on that day already, when the table had `rows` rows."""
        if self.since is None:
            return self
        known = self.since <= day
        counts = None if self.counts is None else self.counts[known]
        last = None if self.last is None else self.last[known]
        return Vocabulary(self.keys.filter(pl.Series(known)), self.table_rows[known], counts, rows,
                          self.since[known], last)  # fmt: skip

    def digest(self) -> str:
        """SHA-256 of the keys and their rows, in hexadecimal: equal where every key has the same row.

        Of the sorted keys: numbers as little-endian bytes, or texts as UTF-8 and their lengths in bytes (uint32),
        then of the rows (int32).
        """
        digest = hashlib.sha256()
        for at in range(0, len(self.keys), _PIECE):
            keys = self.keys[at : at + _PIECE]
            if keys.dtype == pl.String:
                digest.update("".join(keys.to_list()).encode())
                digest.update(keys.str.len_bytes().to_numpy().astype("<u4").tobytes())
            else:
                digest.update(keys.to_numpy().tobytes())
        digest.update(np.ascontiguousarray(self.table_rows, "<i4").data)
        return digest.hexdigest()

    def lookup(self, keys: pl.Series) -> Array:
        """The table row of each of the sorted keys, int32; 0 where it has none."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int32)
        if self.keys.dtype == keys.dtype == pl.UInt32 and logs.available():
            table_rows = np.ascontiguousarray(self.table_rows, np.int32)
            return logs.find_sorted(self.keys.to_numpy(), table_rows, keys.to_numpy())
        # With both sides sorted a binary search walks through memory in order, which no hash table does.
        at = np.minimum(self.keys.search_sorted(keys).to_numpy(), len(self.keys) - 1)
        known = (self.keys.gather(at) == keys).to_numpy()
        return np.where(known, self.table_rows[at], 0).astype(np.int32)

    def find(self, keys: Sequence[Any]) -> Array:
        """As `lookup`, for a few keys in any order: each takes about a microsecond, and `lookup` hundreds for all."""
        table_rows = np.zeros(len(keys), np.int32)
        for at, key in enumerate(keys):
            place = bisect_left(self.keys, key)
            if place < len(self.keys) and self.keys[place] == key:
                table_rows[at] = self.table_rows[place]
        return table_rows

    @classmethod
    def read(cls, source: Path | bytes, where: str = "the vocabulary") -> "Vocabulary":
        """A dataset's vocabulary file, or what `to_bytes` made; `where` names the latter in messages.

        Raises:
            UserError: it cannot be read, is damaged, or its rows are not 1 to K, one for each of K distinct keys (of an
                extended vocabulary: distinct and rows of its table).
        """
        where = str(source) if isinstance(source, Path) else where
        frame, rows = _read(source, where)
        columns = dict(frame.schema)
        if columns.get("key") not in KEY_TYPES or columns.get("row") != pl.Int32 or sum(frame.null_count().row(0)):
            raise UserError(
                f"{where} is not a vocabulary: its columns are {columns}, expected key and row, none missing"
            )
        if isinstance(source, Path):
            frame = frame.sort("key")
        keys, table_rows = frame["key"].rechunk(), frame["row"].to_numpy()
        # Compared, since a file may claim that it is sorted.
        if not (keys[1:] > keys[:-1]).all():
            raise UserError(f"{where} is damaged: its keys are not distinct and sorted")
        highest = len(keys) if rows is None else rows - 1
        inside = not len(keys) or (table_rows.min() >= 1 and table_rows.max() <= highest)
        if not inside or (np.bincount(table_rows, minlength=1)[1:] > 1).any():
            raise UserError(f"{where} is damaged: its table rows are not 1 to {highest}, each once")
        numbers = {name: frame[name].to_numpy() for name in ("count", "since", "last") if name in columns}
        return cls(keys, table_rows, numbers.get("count"), rows, numbers.get("since"), numbers.get("last"))

    def to_bytes(self) -> bytes:
        """A Parquet file with the columns key and row, by key, which `read` knows from a damaged one.

        Polars may abort the process on a damaged Parquet file, so damage must be detected before.
        """
        buffer, empty = io.BytesIO(), b"0" * _DIGITS
        frame = pl.DataFrame({"key": self.keys, "row": self.table_rows.astype(np.int32)})
        # Without vacant rows the file is that of older versions.
        vacant = {} if self.rows == len(self.keys) + 1 else {_ROWS: str(self.rows)}
        frame.write_parquet(buffer, compression="zstd", metadata={"dqrm": (_SEAL + empty).decode(), **vacant})
        data = buffer.getvalue()
        at = data.rindex(_SEAL + empty) + len(_SEAL)
        return data[:at] + _digest(data, at) + data[at + _DIGITS :]

    def write(self, path: Path) -> None:
        """A Parquet file with the columns key, row and count, by row; of an extended vocabulary also since and last."""
        columns: dict[str, Any] = {"key": self.keys, "row": self.table_rows, "count": self.counts}
        metadata = {}
        if self.since is not None:
            columns |= {"since": self.since, "last": self.last}
            metadata[_ROWS] = str(self.rows)
        frame = pl.DataFrame(columns).sort("row")
        if not frame["count"].dtype.is_float():
            frame = frame.with_columns(pl.col("count").cast(pl.Int64))
        write_frame(frame, path, metadata)


def write_frame(frame: pl.DataFrame, path: Path, metadata: dict[str, str]) -> None:
    """Write a Parquet file; raises OSError where the disk is full."""
    try:
        frame.write_parquet(path, metadata=metadata)
    except pl.exceptions.PolarsError as error:
        raise OSError(str(error)) from None


def _read(source: Path | bytes, where: str) -> tuple[pl.DataFrame, int | None]:
    """The columns, and the rows of the table where the file says how many."""
    if isinstance(source, bytes):
        at = source.rfind(_SEAL) + len(_SEAL)
        if at < len(_SEAL) or source[at : at + _DIGITS] != _digest(source, at):
            raise UserError(f"{where} is damaged, or was not written by dqrm")
    try:
        # Opened here: polars would take brackets in the name of a folder for a pattern.
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            rows = pl.read_parquet_metadata(file).get(_ROWS)
            file.seek(0)
            return pl.read_parquet(file), None if rows is None else int(rows)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read as Parquet ({error})") from None


def _digest(data: bytes, at: int) -> bytes:
    """Of all but the digits at `at`."""
    digest, view = hashlib.sha256(), memoryview(data)
    digest.update(view[:at])
    digest.update(view[at + _DIGITS :])
    return digest.hexdigest().encode()


def position_type(total: int) -> Any:
    """The type of counts and positions among so many entries: half the memory, unless there are too many for it."""
    return pl.UInt32 if total < 2**32 else pl.Int64


def count_chunk(keys: pl.Series, codes: Array, counted: Array | None, position: int, total: int) -> pl.DataFrame:
    """The run of one chunk: (key, count, first position) of each key that occurs, sorted by key.

    keys: sorted and distinct. codes: which of them each entry is. counted: which entries count (None: all).
    position: that of the first entry, of `total` in all chunks.
    """
    integer = np.uint32 if position_type(total) == pl.UInt32 else np.int64
    if integer is np.uint32 and codes.dtype.kind == "u" and codes.itemsize <= 4 and logs.available():
        run = pl.DataFrame([keys.alias("key"), *_counted(codes, counted, position, len(keys))])
        return run if counted is None else run.filter(pl.col("count") > 0)
    positions = np.arange(position, position + len(codes), dtype=integer)
    if counted is not None:
        codes, positions = codes[counted], positions[counted]
    counts = np.bincount(codes, minlength=len(keys))
    first = np.zeros(len(keys), integer)
    first[codes[::-1]] = positions[::-1]  # of several values for one place the last stays
    return pl.DataFrame({"key": keys, "count": counts.astype(integer), "first": first}).filter(pl.col("count") > 0)


def _counted(codes: Array, counted: Array | None, position: int, distinct: int) -> tuple[pl.Series, pl.Series]:
    counts, first = logs.count_codes(np.ascontiguousarray(codes), counted, position, distinct)
    return pl.Series("count", counts), pl.Series("first", first)


def _key_bytes(run: pl.DataFrame) -> int:
    """What the keys take beyond 4 bytes each."""
    return max(0, int(run["key"].estimated_size()) - 4 * run.height)


class Counter:
    """Merge of runs of counted keys.

    budget: of the memory. what: is counted, for messages.

    Raises:
        OverBudget: the runs cannot be merged within the budget, or the vocabulary not be written.
    """

    def __init__(self, budget: Budget | None = None, what: str = "a column") -> None:
        self._runs: list[pl.DataFrame] = []
        self._budget, self._what, self._merged = budget or Budget(), what, 0

    def add(self, run: pl.DataFrame) -> None:
        """One chunk's run, as `count_chunk` makes it."""
        self._runs.append(run)
        while len(self._runs) > 1 and self._runs[-2].height <= 2 * self._runs[-1].height:
            self._merge()

    def finish(self) -> pl.DataFrame:
        """All chunks' run: key, count, first; sorted by key."""
        while len(self._runs) > 1:
            self._merge()
        run = self._runs.pop()
        if self._budget.limited:
            self._budget.require_write(run.height, _key_bytes(run), self._merged, self._what)
        return run

    def _merge(self) -> None:
        newer, older = self._runs.pop(), self._runs.pop()
        if self._budget.limited:
            total = self._merged = newer.height + older.height
            self._budget.require_merge(total, _key_bytes(newer) + _key_bytes(older), self._what)
        if set(older.dtypes) == set(newer.dtypes) == {pl.UInt32} and logs.available():
            a, b = (tuple(column.to_numpy() for column in run) for run in (older, newer))
            self._runs.append(pl.DataFrame(dict(zip(older.columns, logs.merge_runs(a, b)))))  # type: ignore[arg-type]
            return
        both = older.merge_sorted(newer, "key")
        keys, counts = both["key"], both["count"].to_numpy()
        starts = (keys != keys.shift()).fill_null(True).arg_true().to_numpy()
        if not len(starts):
            self._runs.append(both)
            return
        self._runs.append(
            pl.DataFrame(
                {
                    "key": keys.gather(starts),
                    "count": np.add.reduceat(counts, starts, dtype=counts.dtype),
                    "first": np.minimum.reduceat(both["first"].to_numpy(), starts),
                }
            )
        )
