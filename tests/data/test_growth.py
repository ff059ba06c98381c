"""Vocabularies that grow from day to day, against dicts; their files."""

import random

import numpy as np
import polars as pl
import pytest

from dqrm import UserError
from dqrm.data import growth
from dqrm.data.growth import Policy
from dqrm.data.vocabulary import Vocabulary
from extension_helpers import Reference


def run_of(keys):
    """A day's counts as `Counter.finish` gives them."""
    frame = pl.DataFrame({"key": pl.Series(keys, dtype=pl.UInt32), "first": np.arange(len(keys))})
    return frame.group_by("key").agg(pl.len().alias("count"), pl.col("first").min()).sort("key")


def test_a_thousand_days_keep_the_size_of_a_table():
    """Each day 60 of 120 active ids, 2 of which are replaced every day; ids unseen for 10 days are evicted."""
    draw, policy = random.Random(3), Policy(min_count=2, decay=0.9, evict_after=10)
    reference, known, rare, sizes = Reference(2, 0.9, 10), None, None, []
    for day in range(1000):
        keys = [2 * day + draw.randint(0, 119) for _ in range(60)]
        run = run_of(keys)
        grown = growth.first_day(run, 2) if day == 0 else growth.next_day(known, rare, run, day, policy)
        known, rare = grown.vocabulary, grown.rare
        reference.next(keys)
        sizes.append((known.rows, rare.height))
        if day % 100 == 99:
            reference.check(known, rare)
    # 120 active ids, and those of the last days that are not evicted yet.
    assert max(rows for rows, _ in sizes) < 140
    assert max(height for _, height in sizes) < 120
    known, rare = grown.vocabulary, grown.rare
    for day in range(1000, 1050):
        grown = growth.next_day(known, rare, run_of([2 * day + draw.randint(0, 119) for _ in range(60)]), day, Policy())
        known, rare = grown.vocabulary, grown.rare
    assert known.rows > 180  # without eviction it grows


@pytest.mark.parametrize("seed", range(30))
def test_random_days_against_dicts(seed):
    """Empty days, one key, extreme keys, and policies that change from day to day."""
    draw = random.Random(seed)
    reference, known, rare = Reference(draw.choice([1, 2, 5])), None, None
    pool = [0, 1, 2**31, 2**32 - 1, *(draw.randrange(2**32) for _ in range(draw.choice([0, 3, 40])))]
    for day in range(12):
        keys = draw.choices(pool, k=draw.choice([0, 1, 2, 30, 200]))
        if day == 0:
            grown = growth.first_day(run_of(keys), reference.min_count)
        else:
            reference.min_count = draw.choice([1, 2, 5, 10**9])
            reference.decay = draw.choice([1.0, 1.0, 0.5, 0.1, 0.0]) if day > 4 else 1.0
            reference.evict_after = draw.choice([None, 1, 2, 5])
            policy = Policy(reference.min_count, reference.decay, reference.evict_after)
            grown = growth.next_day(known, rare, run_of(keys), day, policy)
        before = dict(reference.row)
        reference.next(keys)
        known, rare = grown.vocabulary, grown.rare
        reference.check(known, rare)
        assert grown.new + grown.reused == len(reference.row.keys() - before.keys())
        assert grown.freed == len(before.keys() - reference.row.keys())
        vacant = reference.size - 1 - len(reference.row)
        assert grown.counts() == {
            "new": grown.new, "reused": grown.reused, "freed": grown.freed, "vacant": vacant, "rare": rare.height
        }  # fmt: skip


@pytest.mark.parametrize(
    "columns",
    [
        {"key": ["b", "a"], "count": [1, 1], "last": [0, 0]},
        {"key": ["a", None], "count": [1, 1], "last": [0, 0]},
        {"key": [1, 2], "count": [1, 1], "last": [0, 0]},
        {"key": ["a", "b"], "last": [0, 0]},
        {"key": ["a", "b"], "count": ["1", "1"], "last": [0, 0]},
    ],
)
def test_rare_ids_are_read_as_they_were_written(tmp_path, columns):
    path = tmp_path / "rare.parquet"
    sound = growth.rare_frame(pl.Series(["", "é"]), np.array([0.5, 3.0]), np.array([1, 2], np.int32))
    growth.write_rare(sound, path)
    assert growth.read_rare(path, pl.String).equals(sound)
    pl.DataFrame(columns).with_columns(pl.col("last").cast(pl.Int32)).write_parquet(path)
    with pytest.raises(UserError, match=r"rare.parquet is damaged: its (columns are|keys are not distinct)"):
        growth.read_rare(path, pl.String)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rare.parquet cannot be read as Parquet"):
        growth.read_rare(path, pl.String)


def test_vacant_rows_survive_bytes_and_files(tmp_path):
    known = Vocabulary(pl.Series(["a", "b"]), np.array([4, 2], np.int32), np.array([1.5, 2.0]), 6,
                       np.array([3, 0], np.int32), np.array([3, 4], np.int32))  # fmt: skip
    known.write(tmp_path / "v.parquet")
    for again in (Vocabulary.read(tmp_path / "v.parquet"), Vocabulary.read(known.to_bytes())):
        assert (again.rows, again.table_rows.tolist()) == (6, [4, 2])
        assert again.digest() == known.digest()
    assert again.since is None
    read = Vocabulary.read(tmp_path / "v.parquet")
    assert (read.since.tolist(), read.last.tolist(), read.counts.tolist()) == ([3, 0], [3, 4], [1.5, 2.0])
    empty = Vocabulary(pl.Series([], dtype=pl.String), np.empty(0, np.int32), np.empty(0), 4)
    assert Vocabulary.read(empty.to_bytes()).rows == 4
    for rows in ([5, 6], [0, 2], [2, 2]):
        wrong = with_rows(known, rows)
        with pytest.raises(UserError, match="its table rows are not 1 to 5, each once"):
            Vocabulary.read(wrong.to_bytes())


def with_rows(known, rows):
    return Vocabulary(known.keys, np.array(rows, np.int32), known.counts, known.rows)


def test_the_digest_is_of_keys_and_rows():
    keys, rows = pl.Series(["a", "b"]), np.array([1, 2], np.int32)
    digests = {
        Vocabulary(pl.Series(texts), np.array(order, np.int32), None).digest()
        for texts in (["a", "b"], ["ab", ""], ["", "ab"], ["a", "c"])
        for order in ([1, 2], [2, 1])
    }
    assert len(digests) == 8
    assert Vocabulary(keys, rows, np.array([7, 8])).digest() in digests
    numbers = Vocabulary(pl.Series([1, 2], dtype=pl.UInt32), rows, None).digest()
    assert numbers not in digests
