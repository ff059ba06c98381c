"""Vocabularies that grow from day to day: known keys keep their rows, new ones get vacant or appended rows.

The first day is the same: it extends a vocabulary without keys.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.vocabulary import Vocabulary, write_frame
from dqrm.errors import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class Policy:
    """Which keys have rows. min_count: least count of a key that gets one. decay: factor on all counts each day.

    evict_after: days without a key after which it loses its row, and its counts; None: never.
    """

    min_count: int = 1
    decay: float = 1.0
    evict_after: int | None = None


@dataclass(frozen=True)
class Grown:
    """A vocabulary of one day.

    vocabulary: key -> row. rare: the keys without a row, sorted (key, count, last). new, reused: rows given to new
    keys, appended and vacant ones. freed: rows that lost their keys on this day, also those that were reused at once.
    """

    vocabulary: Vocabulary
    rare: pl.DataFrame
    new: int
    reused: int
    freed: int

    def counts(self) -> dict[str, int]:
        """For dataset.json."""
        vacant = self.vocabulary.rows - 1 - len(self.vocabulary.keys)
        return {"new": self.new, "reused": self.reused, "freed": self.freed, "vacant": vacant, "rare": self.rare.height}


def first_day(run: pl.DataFrame, min_count: int) -> Grown:
    """The vocabulary of a dataset that extends no other: rows 1 to K in order of first appearance.

    run: of the day, as `Counter.finish` gives it.
    """
    frequent = run["count"] >= min_count
    kept, rare = run.filter(frequent), run.filter(~frequent)
    table_rows = np.empty(kept.height, np.int32)
    table_rows[np.argsort(kept["first"].to_numpy())] = np.arange(1, kept.height + 1, dtype=np.int32)
    made = Vocabulary(kept["key"], table_rows, kept["count"].to_numpy())
    return Grown(made, rare_frame(rare["key"], rare["count"].to_numpy(), None), kept.height, 0, 0)


def next_day(known: Vocabulary, rare: pl.DataFrame, run: pl.DataFrame, day: int, policy: Policy) -> Grown:
    """The vocabulary one day on.

    A count is `decay * count of the day before + occurrences on this day`. Keys that were not seen for `evict_after`
    days are forgotten. A key without a row that is seen and has `min_count` gets one, in order of first appearance:
    vacant rows first, from the lowest, then new ones at the end.

    known, rare: of the day before. run: of this day, as `Counter.finish` gives it. day: its number.
    """
    has_row = _is_in(run["key"], known.keys)
    frame = _frame(known)
    decayed = policy.decay != 1 or frame["count"].dtype.is_float() or rare["count"].dtype.is_float()
    frame, rare, run = (
        each.with_columns(pl.col("count").cast(pl.Float64 if decayed else pl.Int64)) for each in (frame, rare, run)
    )
    old = _counted(frame, run.filter(pl.Series(has_row)), day, policy)
    fresh = _counted(rare, run.filter(pl.Series(~has_row)), day, policy, add=True)
    promoted = (fresh["count"] >= policy.min_count) & (fresh["last"] == day)
    added = fresh.filter(promoted).sort("first")
    vacant = np.ones(known.rows, bool)
    vacant[0] = False
    vacant[old["row"].to_numpy()] = False
    free = np.flatnonzero(vacant)[: added.height]
    appended = added.height - len(free)
    rows = known.rows + appended
    given = np.concatenate([free, np.arange(known.rows, rows)]).astype(np.int32)
    added = added.with_columns(row=pl.Series(given), since=pl.lit(day, pl.Int32)).sort("key")
    names = ["key", "row", "count", "since", "last"]
    whole = old.select(names).merge_sorted(added.select(names), "key")
    given, counts, since, last = (whole[name].to_numpy() for name in names[1:])
    vocabulary = Vocabulary(whole["key"].rechunk(), given, counts, rows, since, last)
    left = fresh.filter(~promoted).select("key", "count", "last")
    return Grown(vocabulary, left, appended, len(free), len(known.keys) - old.height)


def rare_frame(keys: pl.Series, counts: Array, last: Array | None) -> pl.DataFrame:
    """Keys without rows: key (sorted), count int64 or float64, last int32 (None: day 0)."""
    last = np.zeros(len(keys), np.int32) if last is None else last
    counts = counts if counts.dtype.kind == "f" else counts.astype(np.int64)
    return pl.DataFrame({"key": keys, "count": counts, "last": last})


def write_rare(rare: pl.DataFrame, path: Path) -> None:
    """A Parquet file with the columns key, count and last, by key."""
    write_frame(rare, path, {})


def read_rare(path: Path, key: Any) -> pl.DataFrame:
    """What `write_rare` wrote, of keys of that type.

    Raises:
        UserError: it is something else.
    """
    try:
        with path.open("rb") as file:
            frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error})") from None
    kinds = dict(frame.schema)
    counted = kinds.get("count") in (pl.Int64, pl.Float64) and kinds.get("last") == pl.Int32
    if kinds.get("key") != key or not counted or sum(frame.null_count().row(0)):
        raise UserError(f"{path} is damaged: its columns are {kinds}, expected key, count and last, none missing")
    keys = frame["key"].rechunk()
    if not (keys[1:] > keys[:-1]).all():
        raise UserError(f"{path} is damaged: its keys are not distinct and sorted")
    return frame


def _frame(known: Vocabulary) -> pl.DataFrame:
    zeros = np.zeros(len(known.keys), np.int32)
    assert known.counts is not None
    return pl.DataFrame(
        {
            "key": known.keys,
            "row": known.table_rows,
            "count": known.counts if known.counts.dtype.kind == "f" else known.counts.astype(np.int64),
            "since": zeros if known.since is None else known.since,
            "last": zeros if known.last is None else known.last,
        }
    )


def _counted(known: pl.DataFrame, run: pl.DataFrame, day: int, policy: Policy, add: bool = False) -> pl.DataFrame:
    """The known keys with the counts of this day, without those that are forgotten.

    add: keys of the run that are not known are added, and the column `first`, -1 where a key was not seen.
    """
    counts, last = known["count"].to_numpy().copy(), known["last"].to_numpy().copy()
    if policy.decay != 1:
        counts *= policy.decay
    seen, keys = run["count"].to_numpy(), known["key"]
    at = keys.search_sorted(run["key"]).to_numpy() if len(keys) else np.zeros(run.height, np.int64)
    there = _is_in(run["key"], keys)
    counts[at[there]] += seen[there]
    last[at[there]] = day
    known = known.with_columns(count=pl.Series(counts), last=pl.Series(last))
    if add:
        first = np.full(known.height, -1, np.int64)
        first[at[there]] = run["first"].cast(pl.Int64).to_numpy()[there]
        known = known.with_columns(first=pl.Series(first))
        added = run.filter(pl.Series(~there)).select(
            "key", "count", pl.lit(day, pl.Int32).alias("last"), pl.col("first").cast(pl.Int64)
        )
        known = known.merge_sorted(added, "key")
    if policy.evict_after is not None:
        known = known.filter(day - pl.col("last") < policy.evict_after)
    return known


def _is_in(keys: pl.Series, sorted_keys: pl.Series) -> Array:
    """Which of the sorted keys are in another sorted series."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    at = np.minimum(sorted_keys.search_sorted(keys).to_numpy(), len(sorted_keys) - 1)
    contained: Array = (sorted_keys.gather(at) == keys).to_numpy()
    return contained
