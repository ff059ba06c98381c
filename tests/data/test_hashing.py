"""Ids hashed to rows, against XXH64 in plain integers, and what every program that reads a log makes of them."""

import dataclasses
import functools
import operator
import random

import numpy as np
import polars as pl
import pytest

from cli_helpers import command
from data_helpers import KAGGLE, criteo_lines, table, write
from dqrm import Dataset, PrepareConfig, UserError
from dqrm.data.hashing import HashedRows, xxh64
from dqrm.data.lineage import as_seen_by, row_changes
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.options import build
from extension_helpers import CONFIG, ids_of, keys_of, log, rows_in
from hash_helpers import reference, row, rows_of


def test_published_values():
    """Of the reference implementation's documentation and of other implementations' tests."""
    known = {
        (b"", 0): 0xEF46DB3751D8E999,
        (b"", 1): 0xD5AFBA1336A3BE4B,
        (b"a", 0): 0xD24EC4F1A98C6E5B,
        (b"abc", 0): 0x44BC2CF5AD770999,
        (b"Nobody inspects the spammish repetition", 0): 0xFBCEA83C8A378BF1,
    }
    for (data, seed), value in known.items():
        assert reference(data, seed) == value
        assert int(xxh64(np.frombuffer(data, np.uint8).reshape(1, -1), seed)[0]) == value


@pytest.mark.parametrize(
    "length", [0, 1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 27, 31, 32, 33, 36, 40, 47, 63, 64, 65, 100, 257]
)
def test_all_lengths(length):
    draw = np.random.default_rng(length)
    for seed in (0, 1, 25, 2**32):
        for count in (0, 1, 5):
            messages = draw.integers(0, 256, (count, length), np.uint8)
            messages[:1], messages[1:2] = 0, 255
            wanted = [reference(bytes(message), seed) for message in messages]
            assert xxh64(messages, seed).tolist() == wanted


def test_keys_of_every_kind():
    draw = random.Random(0)
    texts = ["", "é", "日本語" * 20, "a", "a\x1fb", "0", *("x" * draw.randint(0, 90) + str(n) for n in range(200))]
    draw.shuffle(texts)
    singles = [0, 1, 2**32 - 1, *(draw.randrange(2**32) for _ in range(50))]
    pairs = [0, 1, 2**64 - 1, *(draw.randrange(2**64) for _ in range(50))]
    for rows in (2, 3, 1000, 2**31 - 1):
        for seed in (0, 17):
            hashed = HashedRows(rows, seed)
            for keys, kind, width in ((texts, pl.String, None), (singles, pl.UInt32, 4), (pairs, pl.UInt64, 8)):
                found = hashed.lookup(pl.Series(keys, dtype=kind))
                assert found.dtype == np.int32
                assert found.tolist() == [row(key, rows, seed, width) for key in keys]
                assert found.max() < rows
                several = HashedRows(rows, seed, 3).lookup(pl.Series(keys, dtype=kind)).reshape(-1, 3).tolist()
                assert several == [rows_of(key, rows, seed, 3, width) for key in keys]
                assert [each[0] for each in several] == found.tolist()
                assert hashed.lookup(pl.Series([], dtype=kind)).tolist() == []


@pytest.mark.parametrize("seed", [1, 2**32])
def test_columns_and_functions_are_hashed_apart(seed):
    """The same ids collide in one column, or by one function, and not by the other; rows are used evenly."""
    keys = pl.Series([f"user{n}" for n in range(20_000)])
    first, second = (HashedRows(1001, seed).lookup(keys) for seed in (0, seed))
    assert 0 < (first == second).sum() < 60
    counts = np.bincount(first, minlength=1001)
    assert counts[0] == 0
    assert 14 < ((counts[1:] - 20) ** 2).mean() < 28  # of a binomial: 20


@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_tables_against_the_reference(tmp_path, chunk_rows, hashes):
    config = dataclasses.replace(
        CONFIG,
        vocabulary="hash",
        rows=50,
        column_rows=("user*site=1000", "tags=2"),
        hashes=hashes,
        chunk_rows=chunk_rows,
        group="user",
    )
    rows, sizes, names = log(0), (50, 1000, 2), ("user", "user*site", "tags")
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "a", config)
    assert dataset.table_rows == sizes
    wanted = [[[found for key in keys_of(line, name) for found in rows_of(key, size, n, hashes)]
               for n, (name, size) in enumerate(zip(names, sizes))]
              for line in rows]  # fmt: skip
    assert ids_of(dataset, "train") + ids_of(dataset, "validation") + ids_of(dataset, "test") == wanted
    assert dataset.split("train").groups().max() > 3
    assert not (dataset.path / "vocabulary").exists()
    assert dataset.verify()
    dataset.validate()
    with pytest.raises(UserError, match=r"has no vocabularies: its ids are hashed \(xxh64\)"):
        dataset.vocabulary_path("user")
    # Scored as it was prepared, in blocks and a few rows at a time.
    options, columns = build(PrepareConfig, dataset.info["options"], "x"), dataset.info["schema"]["columns"]
    reader = RawLog([tmp_path / "a.csv"], RawEncoder(options, columns, dataset.row_maps()))
    assert [line for _, batch in reader.blocks() for line in rows_in(batch)] == wanted
    assert reader.unseen == {"user": 0.0, "user*site": 0.0, "tags": 0.0}
    with pytest.raises(UserError, match="column user of the model is hashed as"):
        RawEncoder(options, columns, [HashedRows(51, 0, hashes), *dataset.row_maps()[1:]])
    unhashed = dataclasses.replace(options, vocabulary="train", rows=None, column_rows=(), hashes=1)
    with pytest.raises(UserError, match=r"column user of the model is .* its options expect"):
        RawEncoder(unhashed, columns, dataset.row_maps())


@pytest.mark.parametrize("hashes", [1, 2])
def test_criteo_against_the_reference(tmp_path, hashes):
    lines = criteo_lines(70)
    config = dataclasses.replace(KAGGLE, vocabulary="hash", rows=37, cross=("C1*C2", "I1*C2"), hashes=hashes)
    dataset = prepare([write(tmp_path / "a.txt", lines)], tmp_path / "a", config)
    wanted = []
    for line in lines:
        numbers, cells = line.split("\t")[1:14], line.split("\t")[14:]
        keys = [int(cell, 16) if cell else 0 for cell in cells]
        pair = keys[0] << 32 | keys[1] if keys[0] and keys[1] else 0
        text = f"{numbers[0]}\x1f{cells[1]}" if numbers[0] and cells[1] else ""
        found = [rows_of(key, 37, n, hashes, 4) for n, key in enumerate(keys)]
        wanted.append([*found, rows_of(pair, 37, 26, hashes, 8), rows_of(text, 37, 27, hashes)])
    got = [ids_of(dataset, name) for name in ("train", "test", "validation")]
    assert functools.reduce(operator.iadd, got, []) == wanted


def test_another_log_has_the_same_vocabulary(tmp_path):
    """What is hashed alike goes with a model of any day; another number of rows does not."""
    config = dataclasses.replace(CONFIG, vocabulary="hash", rows=50)
    first, second = (
        prepare([table(tmp_path / f"{day}.csv", log(day))], tmp_path / f"d{day}", config) for day in range(2)
    )
    trained = {"fingerprint": first.fingerprint, "vocabulary_digest": first.vocabulary_digest}
    assert second.fingerprint != first.fingerprint
    assert as_seen_by(second, trained, tmp_path / "run") is second
    for changes in row_changes(second, trained, tmp_path / "run"):
        assert changes.kept.tolist() == list(range(50))
        assert len(changes.new) == len(changes.reused) == len(changes.vacant) == 0
    third = prepare([tmp_path / "1.csv"], tmp_path / "d2", dataclasses.replace(config, column_rows=("user=51",)))
    with pytest.raises(UserError, match="is not the dataset that"):
        as_seen_by(third, trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "vocabulary hash needs rows"),
        ({"rows": 1}, r"rows is 1, expected 2 to 2147483647 \(row 0 is for missing ids\)"),
        ({"rows": 2**31}, "rows is 2147483648, expected 2 to"),
        ({"rows": 9, "min_count": 2}, "min_count is 2, but with vocabulary hash there are no ids to count"),
        ({"rows": 9, "max_rows_per_table": 2}, "max_rows_per_table is 2, but with vocabulary hash"),
        ({"rows": 9, "extend": "a"}, "extend is a, but with vocabulary hash there are no ids to count or to extend"),
        ({"rows": 9, "evict_after": 3}, "evict_after is 3, but with"),
        ({"rows": 9, "column_rows": ("user",)}, "column_rows has 'user', expected a column and a number of rows"),
        ({"rows": 9, "column_rows": ("=5",)}, "column_rows has '=5', expected a column"),
        ({"rows": 9, "column_rows": ("user=x",)}, "column_rows has 'user=x', expected a column"),
        ({"rows": 9, "column_rows": ("user=1",)}, "rows is user=1, expected 2 to"),
        ({"rows": 9, "hashes": 0}, "hashes is 0, expected 1 to 8"),
        ({"rows": 9, "hashes": 9}, "hashes is 9, expected 1 to 8"),
        ({"vocabulary": "train", "hashes": 2}, "hashes is 2, but vocabulary is train; hashes needs vocabulary hash"),
        ({"vocabulary": "train", "rows": 9}, "rows is 9, but vocabulary is train; rows needs vocabulary hash"),
        (
            {"vocabulary": "all", "column_rows": ("user=5",)},
            "column_rows is .*; column_rows needs vocabulary hash",
        ),
    ],
)
def test_what_cannot_be_hashed(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{"vocabulary": "hash", **fields})


def test_rows_of_columns_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "a.csv", log(0))
    flags = ("prepare", "a.csv", "-o", "out", "--label", "click", "--categorical", "user,site", "--vocabulary", "hash")
    for more, message in (
        (("--rows", "9", "--column-rows", "usr=5"), "column_rows has 'usr', expected one of user, site"),
        (("--column-rows", "user=5"), "column_rows lacks 'site', and there is no rows"),
    ):
        status, _, told = command(capsys, *flags, *more)
        assert status == 2
        assert message in told
        assert not (tmp_path / "out").exists()
    assert command(capsys, *flags, "--column-rows", "user=5,site=7")[0] == 0
    assert Dataset("out").table_rows == (5, 7)
    assert command(capsys, "prepare", "a.csv", "-o", "two", "--extend", "out")[0] == 2
