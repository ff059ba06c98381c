"""Preparing a dataset: what raw lines become, for every layout, format, rule of splits and kind of column."""

import csv
import dataclasses
import gzip
import hashlib
import math
import os
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from data_helpers import (
    KAGGLE,
    LOG,
    LOG_CONFIG,
    check_against_reference,
    content,
    criteo_lines,
    ids,
    spoil,
    table,
    write,
)
from dqrm.data import lines, splits
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError


@pytest.mark.parametrize("chunk_rows", [31, 10_000])
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"min_count": 8}, {"min_count": 8}),
        ({"max_rows_per_table": 11}, {"modulo": 11}),
        ({"cross": ("C1*C2", "C26*C3")}, {"cross": ((0, 1), (25, 2))}),
    ],
)
def test_criteo_equals_a_plain_reference(tmp_path, monkeypatch, chunk_rows, fields, options):
    monkeypatch.setattr(lines, "_BLOCK", 3000)
    rows = criteo_lines(200)
    config = dataclasses.replace(KAGGLE, chunk_rows=chunk_rows, **fields)
    check_against_reference(prepare([write(tmp_path / "train.txt", rows)], tmp_path / "out", config), rows, **options)


@pytest.mark.skipif(
    not os.environ.get("DQRM_REAL_LOGS"), reason="set DQRM_REAL_LOGS to a folder with criteo/train_head10000.txt"
)
def test_criteo_sample(tmp_path):
    """The first 10,000 lines of Criteo's Kaggle log, which may not be passed on."""
    sample = Path(os.environ["DQRM_REAL_LOGS"]) / "criteo" / "train_head10000.txt"
    dataset = prepare([sample], tmp_path / "out", KAGGLE)
    assert dataset.rows == {"train": 8572, "test": 714, "validation": 714}
    assert dataset.info["lines_skipped"] == 0
    assert dataset.num_single == 26 == len(dataset.columns)
    check_against_reference(dataset, sample.read_text().splitlines())


@pytest.mark.parametrize("rows", [45_840_617, 7, 8, 13, 14, 100, 10_000])
def test_kaggle_split_is_the_reference_cut(rows):
    counts = dict(splits.kaggle_rows(rows))
    last = len(np.array_split(np.empty(rows, np.uint8), 7)[6])
    assert counts == {splits.TEST: (last + 1) // 2, splits.VALIDATION: last // 2}
    if rows == 45_840_617:
        assert rows - last == 39_291_958
        assert counts == {splits.TEST: 3_274_330, splits.VALIDATION: 3_274_329}


def test_compressed_files_globs_and_line_ends_give_the_same_rows(tmp_path):
    rows = criteo_lines(120)
    plain = prepare([write(tmp_path / "all.txt", rows)], tmp_path / "plain", KAGGLE)
    # Natural order: 2 before 10. Two gzip members in one file; zstd without a size in its header.
    parts = tmp_path / "parts"
    parts.mkdir()
    text = ["".join(row + "\n" for row in rows[at : at + 40]).encode() for at in (0, 40, 80)]
    (parts / "day_1.gz").write_bytes(gzip.compress(text[0][:999]) + gzip.compress(text[0][999:]) + b"\0" * 10)
    (parts / "day_2").write_bytes(text[1].replace(b"\n", b"\r\n"))
    writer = zstandard.ZstdCompressor().compressobj()
    (parts / "day_10.zst").write_bytes(writer.compress(text[2].rstrip(b"\n")) + writer.flush())
    split = prepare([str(parts / "day_*")], tmp_path / "split", KAGGLE)
    assert [source["name"] for source in split.info["sources"]] == ["day_1.gz", "day_2", "day_10.zst"]
    assert [source["rows"] for source in split.info["sources"]] == [40, 40, 40]
    assert content(split) == content(plain)
    assert split.fingerprint != plain.fingerprint  # other source files
    assert plain.info["sources"][0]["sha256"] == hashlib.sha256((tmp_path / "all.txt").read_bytes()).hexdigest()


def test_fingerprint_depends_on_contents_and_options_alone(tmp_path):
    rows = criteo_lines(60)
    first = prepare([write(tmp_path / "a.txt", rows)], tmp_path / "one", KAGGLE)
    chunked = dataclasses.replace(KAGGLE, chunk_rows=13)
    again = prepare([write(tmp_path / "b.txt", rows)], tmp_path / "two", chunked)
    other = prepare([tmp_path / "a.txt"], tmp_path / "three", dataclasses.replace(KAGGLE, min_count=2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert str(tmp_path) not in (first.path / "dataset.json").read_text()


def test_terabyte_splits_the_last_day(tmp_path):
    for day in range(3):
        write(tmp_path / f"day_{day}", criteo_lines(21, seed=day))
    dataset = prepare([tmp_path / "day_*"], tmp_path / "out", PrepareConfig(layout="criteo-terabyte"))
    assert dataset.rows == {"train": 42, "test": 11, "validation": 10}
    last = [int(row[0]) for row in criteo_lines(21, seed=2)]
    assert dataset.split("test").labels().tolist() == last[:11]
    assert dataset.split("validation").labels().tolist() == last[11:]
    with pytest.raises(UserError, match="two files or more"):
        prepare([tmp_path / "day_0"], tmp_path / "one", PrepareConfig(layout="criteo-terabyte"))


def test_table_formats_agree(tmp_path):
    config = dataclasses.replace(LOG_CONFIG, categorical=("user", "tags", "ad"), multi=("tags",), cross=("user*ad",))
    typed = pl.DataFrame(LOG).with_columns(pl.col("click") == 1, pl.col("tags").str.split("|"))
    typed.write_parquet(tmp_path / "log.parquet")
    table(tmp_path / "log.csv", LOG)
    table(tmp_path / "log.tsv", LOG, delimiter="\t")
    table(tmp_path / "quoted.csv", LOG, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    (tmp_path / "log.csv.zst").write_bytes(zstandard.compress((tmp_path / "log.csv").read_bytes()))
    table(tmp_path / "log.data", LOG, delimiter=";")
    made = {
        name: prepare(
            [tmp_path / name],
            tmp_path / f"out-{name}",
            dataclasses.replace(config, delimiter=";" if name == "log.data" else None),
        )
        for name in ("log.parquet", "log.csv", "log.tsv", "quoted.csv", "log.csv.gz", "log.csv.zst", "log.data")
    }
    wanted = content(made["log.parquet"])
    assert all(content(dataset) == wanted for dataset in made.values())
    dataset = made["log.csv"]
    assert [(column.name, column.rows, column.multi) for column in dataset.columns] == [
        ("user", 6, False),
        ("ad", 4, False),
        ("user*ad", 16, False),
        ("tags", 3, True),
    ]
    (batch,) = dataset.split("train").batches(100)
    assert batch.dense[:4, 0].tolist() == pytest.approx([0, 0, 0, math.log1p(1)])
    ((values, offsets),) = batch.bags
    assert values.tolist() == [1, 2] * 8
    assert offsets.tolist() == [2 * (n // 2) for n in range(16)]
    dataset.validate()
    vocabulary = pl.read_parquet(dataset.vocabulary_path("user*ad"))
    assert vocabulary.columns == ["key", "row", "count"]
    assert vocabulary.row(0) == ("u0\x1fa0", 1, 2)


def test_quoted_fields_may_hold_anything(tmp_path):
    names = ["plain", 'a "b", c', "two\nlines", "tab\there", "é"]
    rows = [{"label": n % 2, "name": names[n % 5]} for n in range(50)]
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out", PrepareConfig(categorical=("name",)))
    assert set(pl.read_parquet(dataset.vocabulary_path("name"))["key"]) == set(names)


def test_missing_values(tmp_path):
    frame = pl.DataFrame(
        {
            "label": [1, 0, 1, 0],
            "c": [None, "x", None, ""],
            "d": [None, float("nan"), -3.0, 2.0],
            "m": [None, [], ["p", None, ""], ["p", "q"]],
            "e": ["1", "2", None, "2"],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    config = PrepareConfig(
        categorical=("c", "m"), multi=("m",), dense=("d",), cross=("c*e",), test_fraction=0, validation_fraction=0
    )
    dataset = prepare([tmp_path / "a.parquet"], tmp_path / "out", config)
    (batch,) = dataset.split("train").batches(4)
    assert batch.ids.tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]  # a cross with a missing part is missing
    assert batch.dense[:, 0].tolist() == pytest.approx([0, 0, 0, math.log1p(2)])
    assert [part.tolist() for part in batch.bags[0]] == [[1, 1, 2], [0, 0, 0, 1]]
    raw = prepare(
        [tmp_path / "a.parquet"], tmp_path / "raw", dataclasses.replace(config, dense_transform="none", seed=1)
    )
    assert raw.split("train").arrays["dense.f32"][:, 0].tolist() == [0, 0, -3, 2]


def test_vocabulary_of_the_training_rows_or_of_all(tmp_path):
    rows = [{"label": 0, "c": "new" if n >= 8 else f"c{n % 2}"} for n in range(10)]
    table(tmp_path / "a.csv", rows)
    config = PrepareConfig(categorical=("c",), split="time")
    train = prepare([tmp_path / "a.csv"], tmp_path / "train", config)
    everything = prepare([tmp_path / "a.csv"], tmp_path / "all", dataclasses.replace(config, vocabulary="all"))
    assert (train.table_rows, everything.table_rows) == ((3,), (4,))
    assert (ids(train, "test", "c"), ids(everything, "test", "c")) == ([0], [3])


def test_text_keys_modulo_a_cap(tmp_path):
    rows = [{"label": 0, "c": f"key {n % 40}"} for n in range(200)]
    config = PrepareConfig(categorical=("c",), max_rows_per_table=7, test_fraction=0, validation_fraction=0)
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out", config)
    order = list(dict.fromkeys(zlib.crc32(row["c"].encode()) % 7 for row in rows))
    wanted = [order.index(zlib.crc32(row["c"].encode()) % 7) + 1 for row in rows]
    assert ids(dataset, "train", "c") == wanted
    assert dataset.info["schema"]["columns"][0]["hash"] == "crc32"
    assert dataset.table_rows[0] <= 8


def test_crosses_of_criteo_columns_use_both_parts_modulo_a_power_of_two(tmp_path):
    config = dataclasses.replace(KAGGLE, cross=("C1*C2",), max_rows_per_table=1024)
    rows = [row.split("\t") for row in criteo_lines(300)]
    for row in rows:
        row[15] = "00000007"
    dataset = prepare([write(tmp_path / "a.txt", ["\t".join(row) for row in rows])], tmp_path / "out", config)
    assert dataset.table_rows[26] > 20


def test_crosses_of_three_criteo_columns_and_of_dense_ones(tmp_path):
    rows = [spoil(row, 14, text) for row, text in zip(criteo_lines(4), ["a", "0000000A", "", "b"])]
    rows = [spoil(spoil(spoil(row, 15, "1"), 16, "2"), 1, "5") for row in rows] * 7
    config = dataclasses.replace(KAGGLE, cross=("C1*C2*C3", "I1*C2"))
    dataset = prepare([write(tmp_path / "a.txt", rows)], tmp_path / "out", config)
    assert pl.read_parquet(dataset.vocabulary_path("C1*C2*C3"))["key"].to_list() == [
        "0000000a\x1f00000001\x1f00000002",
        "",
        "0000000b\x1f00000001\x1f00000002",
    ]
    assert pl.read_parquet(dataset.vocabulary_path("I1*C2"))["key"].to_list() == ["5\x1f00000001"]
    with pytest.raises(UserError, match=r"no column 'C27' in layout criteo-kaggle; did you mean 'C"):
        prepare([tmp_path / "a.txt"], tmp_path / "none", dataclasses.replace(KAGGLE, cross=("C1*C27",)))


@pytest.mark.parametrize("modulo", [None, 9])
def test_several_ids_per_cell(tmp_path, modulo):
    draw = random.Random(1)
    cells = [[f"t{draw.randint(0, 30)}" for _ in range(draw.randint(0, 5))] for _ in range(200)]
    table(tmp_path / "a.csv", [{"label": n % 2, "m": " ".join(cell)} for n, cell in enumerate(cells)])
    config = PrepareConfig(
        categorical=("m",), multi=("m",), multi_separator=" ", split="time", min_count=15, max_rows_per_table=modulo
    )
    made = [
        prepare([tmp_path / "a.csv"], tmp_path / f"{rows}", dataclasses.replace(config, chunk_rows=rows))
        for rows in (33, 1000)
    ]
    assert content(made[0]) == content(made[1])

    def key(text):
        return zlib.crc32(text.encode()) % modulo if modulo else text

    counts = Counter(key(text) for cell in cells[:160] for text in cell)
    rows = {text: n for n, text in enumerate((text for text in counts if counts[text] >= 15), 1)}
    assert len(rows) < len(counts) or modulo
    assert made[0].table_rows == (len(rows) + 1,)
    for name, part in (("train", cells[:160]), ("validation", cells[160:180]), ("test", cells[180:])):
        arrays = made[0].split(name).arrays
        assert arrays["00.values.i32"].tolist() == [rows.get(key(text), 0) for cell in part for text in cell]
        assert np.diff(arrays["00.offsets.i64"]).tolist() == [len(cell) for cell in part]


def test_random_split_is_exact_and_seeded(tmp_path):
    table(tmp_path / "a.csv", [{"label": 0, "n": n} for n in range(1000)])
    config = PrepareConfig(dense=("n",), dense_transform="none")
    made = [
        prepare([tmp_path / "a.csv"], tmp_path / f"{n}", dataclasses.replace(config, seed=seed, chunk_rows=rows))
        for n, (seed, rows) in enumerate([(0, 1000), (0, 17), (1, 1000)])
    ]
    assert made[0].rows == {"train": 800, "validation": 100, "test": 100}
    assert content(made[0]) == content(made[1]) != content(made[2])
    parts = [made[0].split(name).arrays["dense.f32"][:, 0].tolist() for name in made[0].rows]
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))


def test_split_by_time_keeps_the_end_for_the_test(tmp_path):
    table(tmp_path / "a.csv", [{"label": 0, "n": n} for n in range(100)])
    config = PrepareConfig(dense=("n",), dense_transform="none", split="time", test_fraction=0.2)
    dataset = prepare([tmp_path / "a.csv"], tmp_path / "out", config)
    arrays = {name: dataset.split(name).arrays["dense.f32"][:, 0].tolist() for name in dataset.rows}
    assert arrays == {
        "train": list(range(70)),
        "validation": list(range(70, 80)),
        "test": list(range(80, 100)),
    }


def test_split_by_column_and_by_file_names(tmp_path):
    table(tmp_path / "a.csv", LOG)
    config = dataclasses.replace(
        LOG_CONFIG, split="column", split_column="day", validation_values=("3",), test_values=("4",)
    )
    dataset = prepare([tmp_path / "a.csv"], tmp_path / "column", config)
    assert dataset.rows == {"train": 12, "validation": 4, "test": 4}
    with pytest.raises(UserError, match="no row holds '9'"):
        prepare([tmp_path / "a.csv"], tmp_path / "none", dataclasses.replace(config, test_values=("9",)))
    for day in range(5):
        table(tmp_path / f"d{day}.csv", [row for row in LOG if row["day"] == day])
    by_file = dataclasses.replace(
        LOG_CONFIG, split="file", split_column=None, validation_values=("d3*",), test_values=("d4.csv",)
    )
    files = prepare([tmp_path / "d?.csv"], tmp_path / "files", by_file)
    assert content(files) == content(dataset)
    with pytest.raises(UserError, match=r"no file is named 'd7.csv'; did you mean"):
        prepare([tmp_path / "d?.csv"], tmp_path / "none", dataclasses.replace(by_file, test_values=("d7.csv",)))


def test_subsampled_negatives(tmp_path):
    table(tmp_path / "a.csv", [{"label": int(n % 4 == 0), "n": n} for n in range(4000)])
    config = PrepareConfig(dense=("n",), subsample_negatives=0.875, split="time")
    one, other = (
        prepare([tmp_path / "a.csv"], tmp_path / f"{rows}", dataclasses.replace(config, chunk_rows=rows))
        for rows in (100, 999)
    )
    assert content(one) == content(other)
    assert sum(one.info["clicks"].values()) == 1000
    negatives = sum(one.rows.values()) - 1000
    assert 300 < negatives < 450
    assert one.info["negatives_dropped"] == 3000 - negatives
