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

from dqrm.errors import UserError

Array = NDArray[Any]

KEY_TYPES = (pl.UInt32, pl.UInt64, pl.String)
# The digest of `Vocabulary.to_bytes` stands in the metadata of the Parquet file, over all of it but these digits.
_SEAL, _DIGITS = b"dqrm-sha256:", 64


class Vocabulary:
    """Rows 1 to K of a table in order of first appearance. Row 0 is for keys that are unseen or rare.

    keys: sorted. table_rows: int32 [K]. counts: integers [K], None if unknown.
    """

    def __init__(self, keys: pl.Series, table_rows: Array, counts: Array | None) -> None:
        self.keys, self.table_rows, self.counts = keys, table_rows, counts

    @property
    def rows(self) -> int:
        """Rows of the table, row 0 included."""
        return len(self.keys) + 1

    def lookup(self, keys: pl.Series) -> Array:
        """The table row of each of the sorted keys, int32; 0 where it has none."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int32)
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
            UserError: it cannot be read, is damaged, or its rows are not 1 to K, one for each of K distinct keys.
        """
        where = str(source) if isinstance(source, Path) else where
        frame = _read(source, where)
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
        whole = not len(keys) or (table_rows.min() >= 1 and table_rows.max() <= len(keys))
        if not whole or (np.bincount(table_rows, minlength=1)[1:] != 1).any():
            raise UserError(f"{where} is damaged: its table rows are not 1 to {len(keys)}, each once")
        return cls(keys, table_rows, frame["count"].to_numpy() if "count" in columns else None)

    def to_bytes(self) -> bytes:
        """A Parquet file with the columns key and row, by key, which `read` knows from a damaged one.

        Polars may abort the process on a damaged Parquet file, so damage must be detected before.
        """
        buffer, empty = io.BytesIO(), b"0" * _DIGITS
        frame = pl.DataFrame({"key": self.keys, "row": self.table_rows.astype(np.int32)})
        frame.write_parquet(buffer, compression="zstd", metadata={"dqrm": (_SEAL + empty).decode()})
        data = buffer.getvalue()
        at = data.rindex(_SEAL + empty) + len(_SEAL)
        return data[:at] + _digest(data, at) + data[at + _DIGITS :]

    def write(self, path: Path) -> None:
        """A Parquet file with the columns key, row and count, by row."""
        frame = pl.DataFrame({"key": self.keys, "row": self.table_rows, "count": self.counts})
        try:
            frame.sort("row").with_columns(pl.col("count").cast(pl.Int64)).write_parquet(path)
        except pl.exceptions.PolarsError as error:  # a full disk
            raise OSError(str(error)) from None


def _read(source: Path | bytes, where: str) -> pl.DataFrame:
    if isinstance(source, bytes):
        at = source.rfind(_SEAL) + len(_SEAL)
        if at < len(_SEAL) or source[at : at + _DIGITS] != _digest(source, at):
            raise UserError(f"{where} is damaged, or was not written by dqrm")
    try:
        # Opened here: polars would take brackets in the name of a folder for a pattern.
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise UserError(f"{where} cannot be read as Parquet ({error})") from None


def _digest(data: bytes, at: int) -> bytes:
    """Of all but the digits at `at`."""
    digest, view = hashlib.sha256(), memoryview(data)
    digest.update(view[:at])
    digest.update(view[at + _DIGITS :])
    return digest.hexdigest().encode()


def count_chunk(keys: pl.Series, codes: Array, counted: Array | None, position: int, total: int) -> pl.DataFrame:
    """The run of one chunk: (key, count, first position) of each key that occurs, sorted by key.

    keys: sorted and distinct. codes: which of them each entry is. counted: which entries count (None: all).
    position: that of the first entry, of `total` in all chunks.
    """
    # Half the memory, unless there are too many to count so.
    integer = np.uint32 if total < 2**32 else np.int64
    positions = np.arange(position, position + len(codes), dtype=integer)
    if counted is not None:
        codes, positions = codes[counted], positions[counted]
    counts = np.bincount(codes, minlength=len(keys))
    first = np.zeros(len(keys), integer)
    first[codes[::-1]] = positions[::-1]  # of several values for one place the last stays
    return pl.DataFrame({"key": keys, "count": counts.astype(integer), "first": first}).filter(pl.col("count") > 0)


class Counter:
    """Merge of runs of counted keys."""

    def __init__(self) -> None:
        self._runs: list[pl.DataFrame] = []

    def add(self, run: pl.DataFrame) -> None:
        """One chunk's run, as `count_chunk` makes it."""
        self._runs.append(run)
        while len(self._runs) > 1 and self._runs[-2].height <= 2 * self._runs[-1].height:
            self._merge()

    def finish(self, min_count: int) -> Vocabulary:
        """The vocabulary of the keys seen at least `min_count` times."""
        while len(self._runs) > 1:
            self._merge()
        run = self._runs.pop().filter(pl.col("count") >= min_count)
        table_rows = np.empty(run.height, np.int32)
        table_rows[np.argsort(run["first"].to_numpy())] = np.arange(1, run.height + 1, dtype=np.int32)
        return Vocabulary(run["key"], table_rows, run["count"].to_numpy())

    def _merge(self) -> None:
        newer, older = self._runs.pop(), self._runs.pop()
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
