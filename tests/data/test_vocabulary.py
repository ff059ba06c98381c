"""Vocabularies as files and as bytes: the same lookups, and what is damaged is refused."""

import io
import random

import numpy as np
import polars as pl
import pytest

from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError

KEYS = {
    "hex": pl.Series([0, 7, 9, 2**32 - 1], dtype=pl.UInt32),
    "hex*hex": pl.Series([0, 2**40, 2**63 + 5, 2**64 - 1], dtype=pl.UInt64),
    "text": pl.Series(["", "a\x1fb", "é", "日本"], dtype=pl.String),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_vocabulary_survives_its_bytes_and_its_file(tmp_path, kind):
    made = Vocabulary(KEYS[kind], np.array([3, 1, 4, 2], np.int32), np.array([5, 6, 7, 8]))
    made.write(tmp_path / "v.parquet")
    asked = pl.concat([KEYS[kind], KEYS[kind][:0].extend_constant("z" if kind == "text" else 8, 1)]).sort()
    for again in (Vocabulary.read(tmp_path / "v.parquet"), Vocabulary.read(made.to_bytes())):
        assert again.rows == 5
        assert again.keys.equals(made.keys)
        assert again.keys.dtype == made.keys.dtype
        assert again.lookup(asked).tolist() == made.lookup(asked).tolist()
        assert again.lookup(asked).dtype == np.int32
    assert sorted(made.lookup(asked).tolist()) == [0, 1, 2, 3, 4]
    assert Vocabulary.read(tmp_path / "v.parquet").counts.tolist() == [5, 6, 7, 8]
    frame = pl.read_parquet(io.BytesIO(made.to_bytes()))
    assert frame.columns == ["key", "row"]
    assert frame["key"].to_list() == KEYS[kind].to_list()
    empty = Vocabulary(KEYS[kind][:0], np.empty(0, np.int32), np.empty(0, np.int64))
    assert Vocabulary.read(empty.to_bytes()).lookup(asked).tolist() == [0] * 5
    assert Vocabulary.read(empty.to_bytes()).keys.dtype == KEYS[kind].dtype


def test_damaged_vocabularies_are_refused(tmp_path):
    keys = pl.Series(np.arange(5000, dtype=np.uint32) * 3)
    data = Vocabulary(keys, np.arange(5000, dtype=np.int32) + 1, None).to_bytes()
    draw = random.Random(0)
    for _ in range(300):
        spoiled = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            spoiled[draw.randrange(len(data))] ^= draw.randint(1, 255)
        for damaged in (bytes(spoiled), data[: draw.randrange(len(data))]):
            if damaged != data:
                with pytest.raises(UserError, match=r"^column a is damaged, or was not written by dqrm$"):
                    Vocabulary.read(damaged, "column a")
    for content in (b"", b"PAR1", data[: len(data) // 2], b"x" * 100):
        (tmp_path / "v.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"v.parquet cannot be read as Parquet"):
            Vocabulary.read(tmp_path / "v.parquet")
    with pytest.raises(UserError, match=r"none.parquet cannot be read"):
        Vocabulary.read(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"key": ["a", "a"], "row": [1, 2]}, "not distinct"),
        ({"key": ["a", "b"], "row": [0, 1]}, "not 1 to 2"),
        ({"key": ["a", "b"], "row": [1, 3]}, "not 1 to 2"),
        ({"key": ["a", "b"], "row": [2, 2]}, "not 1 to 2"),
        ({"key": ["a", "b"], "row": [-1, 2**31 - 1]}, "not 1 to 2"),
        ({"key": ["a", None], "row": [1, 2]}, "not a vocabulary"),
        ({"key": [1.5, 2.5], "row": [1, 2]}, "not a vocabulary"),
        ({"key": ["a", "b"], "line": [1, 2]}, "not a vocabulary"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, columns, reason):
    frame = pl.DataFrame(columns)
    if "row" in columns:
        frame = frame.with_columns(pl.col("row").cast(pl.Int32))
    frame.write_parquet(tmp_path / "v.parquet")
    with pytest.raises(UserError, match=reason):
        Vocabulary.read(tmp_path / "v.parquet")


def test_bytes_whose_keys_are_not_sorted(tmp_path):
    keys = pl.Series(["b", "a"])
    for series in (keys, keys.set_sorted()):
        data = Vocabulary(series, np.array([1, 2], np.int32), None).to_bytes()
        with pytest.raises(UserError, match="not distinct and sorted"):
            Vocabulary.read(data)
