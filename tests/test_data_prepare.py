"""From logs to dataset folders: every format, rule and mistake, on a few rows."""

import csv
import dataclasses
import gzip
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from dqrm.data import lines, splits
from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import MARKER, prepare
from dqrm.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
KAGGLE = PrepareConfig(layout="criteo-kaggle")


def criteo_lines(count, seed=0):
    """Lines in Criteo's layout: label, 13 integers, 26 hexadecimal categories, some missing."""
    draw = random.Random(seed)
    return [
        "\t".join(
            [str(draw.randint(0, 1))]
            + ["" if draw.random() < 0.2 else str(draw.randint(-2, 500)) for _ in CRITEO_DENSE]
            + ["" if draw.random() < 0.1 else f"{draw.randint(1, 30):08x}" for _ in CRITEO_CATEGORICAL]
        )
        for _ in range(count)
    ]


def write(path, rows, ending="\n"):
    path.write_bytes("".join(row + ending for row in rows).encode())
    return path


def table(path, rows, **options):
    """A CSV file of dicts."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def content(dataset):
    """Every array of every split as bytes."""
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ("train", "validation", "test")
        for file in sorted((dataset.path / name).iterdir())
    }


def ids(dataset, split, column):
    at = [known.name for known in dataset.columns].index(column)
    return np.concatenate([batch.ids[:, at].numpy() for batch in dataset.split(split).batches(64)]).tolist()


def reference(rows, min_count=1, modulo=None, cross=()):
    """Criteo's encoding over the Kaggle split, row by row: {split: [(label, dense, ids)]} and table rows."""
    parsed = []
    for row in rows:
        fields = row.split("\t")
        dense = [math.log1p(max(0, int(field))) if field else 0.0 for field in fields[1:14]]
        keys = [int(field, 16) if field else 0 for field in fields[14:]]
        for a, b in cross:
            keys.append(keys[a] << 32 | keys[b] if keys[a] and keys[b] else 0)
        parsed.append((int(fields[0]), dense, [key % modulo for key in keys] if modulo else keys))
    parts = [list(part) for part in np.array_split(np.arange(len(rows)), 7)]
    train, last = np.concatenate(parts[:6]).tolist(), parts[6]
    half = (len(last) + 1) // 2
    tables = []
    for column in range(len(parsed[0][2])):
        counts = Counter(parsed[row][2][column] for row in train)
        kept = [key for key in counts if counts[key] >= min_count]  # a Counter keeps the order of first appearance
        tables.append({key: number for number, key in enumerate(kept, 1)})
    coded = [(label, dense, [table.get(key, 0) for table, key in zip(tables, keys)]) for label, dense, keys in parsed]
    chosen = {"train": train, "validation": last[half:], "test": last[:half]}
    return {name: [coded[row] for row in rows] for name, rows in chosen.items()}, [len(t) + 1 for t in tables]


def check_against_reference(dataset, rows, **options):
    wanted, table_rows = reference(rows, **options)
    assert list(dataset.table_rows) == table_rows
    for name, coded in wanted.items():
        arrays = dataset.split(name).arrays
        assert arrays["label.u8"].tolist() == [label for label, _, _ in coded]
        assert arrays["ids.i32"].tolist() == [ids for _, _, ids in coded]
        dense = np.array([dense for _, dense, _ in coded], np.float32).reshape(len(coded), 13)
        np.testing.assert_array_max_ulp(arrays["dense.f32"], dense, 1)
    dataset.validate()


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


def test_criteo_sample(tmp_path):
    sample = SHARED / "criteo" / "train_head10000.txt"
    if not sample.exists():
        pytest.skip("Criteo's sample is not here")
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


LOG = [
    {
        "click": n % 2,
        "user": f"u{n % 5}",
        "ad": f"a{n % 3}",
        "price": n - 2,
        "tags": "x|y" if n % 2 else "",
        "day": n // 4,
    }
    for n in range(20)
]
LOG_CONFIG = PrepareConfig(label="click", categorical=("user", "ad"), dense=("price",), split="time")


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


def spoil(row, at, text):
    fields = row.split("\t")
    fields[at] = text
    return "\t".join(fields)


MALFORMED = [
    ("short", lambda row: row.rsplit("\t", 1)[0], "39 columns, expected 40"),
    ("long", lambda row: row + "\t1", "41 columns, expected 40"),
    ("empty", lambda row: "", "an empty line"),
    ("no label", lambda row: spoil(row, 0, ""), "column label holds nothing, expected 0 or 1"),
    ("label 2", lambda row: spoil(row, 0, "2"), "column label holds '2', expected 0 or 1"),
    ("text", lambda row: spoil(row, 3, "abc"), "column I3 holds 'abc', expected a whole number"),
    ("fraction", lambda row: spoil(row, 13, "1.5"), "column I13 holds '1.5', expected a whole number"),
    ("not hex", lambda row: spoil(row, 14, "0000000g"), "column C1 holds '0000000g', expected up to 8 hexadecimal"),
    ("long hex", lambda row: spoil(row, 39, "000000001"), "column C26 holds '000000001'"),
    ("signed hex", lambda row: spoil(row, 20, "+1"), r"column C7 holds '+1'"),
    ("utf-8", lambda row: spoil(row, 20, "\udcff"), "byte 0xff at position"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
@pytest.mark.parametrize("compress", [False, True])
def test_malformed_lines_stop_or_are_skipped(tmp_path, monkeypatch, change, reason, compress):
    monkeypatch.setattr(lines, "_BLOCK", 4000)
    rows = criteo_lines(100)
    bad = [*rows[:62], change(rows[62]), *rows[63:]]
    data = "".join(row + "\n" for row in bad).encode(errors="surrogateescape")
    path = tmp_path / "log.txt"
    path.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 63: {reason}")):
        prepare([path], tmp_path / "out", KAGGLE)
    assert sorted(os.listdir(tmp_path)) == ["log.txt"]
    dataset = prepare([path], tmp_path / "out", dataclasses.replace(KAGGLE, on_error="skip"))
    assert dataset.info["lines_skipped"] == dataset.info["sources"][0]["skipped"] == 1
    check_against_reference(dataset, rows[:62] + rows[63:])


def test_the_first_of_several_malformed_lines_is_named(tmp_path):
    rows = criteo_lines(30)
    rows[20], rows[10] = "short", spoil(rows[10], 5, "x")
    with pytest.raises(UserError, match="line 11: column I5"):
        prepare([write(tmp_path / "log.txt", rows)], tmp_path / "out", KAGGLE)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_and_damaged_files(tmp_path, kind):
    rows = criteo_lines(4000)
    data = "".join(row + "\n" for row in rows).encode()
    packed = gzip.compress(data) if kind == "gz" else zstandard.compress(data)
    path = tmp_path / f"log.txt.{kind}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(UserError, match=r"log.txt.*, after line \d+: its (gzip|zstd) data ends too early"):
        prepare([path], tmp_path / "out", KAGGLE)
    assert os.listdir(tmp_path) == [path.name]
    dataset = prepare([path], tmp_path / "out", dataclasses.replace(KAGGLE, on_error="skip"))
    (source,) = dataset.info["sources"]
    assert "ends too early" in source["damaged"]
    read = sum(dataset.rows.values())
    assert 1000 < read < 4000
    check_against_reference(dataset, rows[:read])
    path.write_bytes(packed[:20] + b"\xff" * 2000)
    with pytest.raises(UserError, match=r"data (is damaged|ends too early)"):
        prepare([path], tmp_path / "damaged", KAGGLE)


def test_table_mistakes_name_the_line(tmp_path):
    def attempt(text, **fields):
        path = tmp_path / "log.csv"
        path.write_text(text)
        config = PrepareConfig(**{"categorical": ("c",), "dense": ("d",), **fields})
        with pytest.raises(UserError) as caught:
            prepare([path], tmp_path / "out", config)
        assert os.listdir(tmp_path) == ["log.csv"]
        return str(caught.value)

    assert "line 3: column label holds 'x', expected 0 or 1" in attempt("label,c,d\n1,a,1\nx,a,1\n")
    assert "line 3: column d holds 'inf', expected a finite number" in attempt("label,c,d\n1,a,1\n1,a,inf\n")
    assert "line 4: column d holds '1,5'" in attempt('label,c,d\n1,"a\nb",1\n1,a,"1,5"\n')
    assert "line 3: 2 columns, expected 3" in attempt("label,c,d\n1,a,1\n1,a\n")
    assert "no column 'cc' in" in attempt("label,c,d\n1,a,1\n", categorical=("cc",))
    assert "did you mean 'c'?" in attempt("label,c,d\n1,a,1\n", categorical=("cc",))
    assert "no column 'x' in" in attempt("label,c,d\n1,a,1\n", cross=("c*x",))
    assert "2 columns of the name 'c'" in attempt("label,c,c,d\n1,a,a,1\n")
    assert "no column was named" in attempt("label,c,d\n1,a,1\n", categorical=(), dense=())
    assert "no row in log.csv" in attempt("label,c,d\n")
    assert "is empty" in attempt("")
    assert "leaves none of the 2 rows for training" in attempt(
        "label,c,d\n1,a,1\n1,a,1\n", split="column", split_column="c", test_values=("a",)
    )


def test_parquet_mistakes(tmp_path):
    path = tmp_path / "log.parquet"

    def attempt(columns, **fields):
        pl.DataFrame(columns).write_parquet(path)
        with pytest.raises(UserError) as caught:
            prepare([path], tmp_path / "out", PrepareConfig(**fields))
        assert os.listdir(tmp_path) == ["log.parquet"]
        return str(caught.value)

    lists = {"label": [0, 1], "c": [["a"], ["b"]]}
    assert "column c of" in attempt(lists, categorical=("c",))
    assert "of type List" in attempt(lists, dense=("c",)) or "holds lists" in attempt(lists, dense=("c",))
    assert "row 2: column label holds 3" in attempt({"label": [0, 3], "c": ["a", "b"]}, categorical=("c",))
    assert "row 1: column d holds inf" in attempt({"label": [0, 1], "d": [math.inf, 1]}, dense=("d",))
    assert "expected lists or text" in attempt({"label": [0], "c": [1]}, categorical=("c",), multi=("c",))
    assert "use layout table" in attempt({"label": [0]}, layout="criteo-kaggle")
    assert "name it in multi too" in attempt(lists, categorical=("c",))
    by_column = {"split": "column", "split_column": "c", "test_values": ("a",)}
    for more in ({"categorical": ("x",)}, {"categorical": ("x", "c")}):
        said = attempt({**lists, "x": ["a", "b"]}, **by_column, **more)
        assert "split_column c of" in said
        assert "holds lists, expected one number or text per row" in said
    for odd in (timedelta(seconds=1), b"\xff", {"a": 1}, [timedelta(seconds=1)]):
        multi = ("c",) if isinstance(odd, list) else ()
        said = attempt({"label": [0], "c": [odd]}, categorical=("c",), multi=multi)
        assert "column c of" in said
        assert "expected numbers or text" in said
    path.write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        prepare([path], tmp_path / "out", PrepareConfig(categorical=("c",)))


def test_outputs_and_sources_that_cannot_be(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare([path], tmp_path / "full", KAGGLE)
    with pytest.raises(UserError, match="exists and is a file"):
        prepare([path], path, KAGGLE)
    with pytest.raises(UserError, match="cannot write"):
        prepare([path], path / "below", KAGGLE)
    for sources, reason in [
        ([], "no source file was given"),
        ([tmp_path / "nope.txt"], "cannot read .*nope.txt: No such file"),
        ([tmp_path / "nope*"], "no file matches"),
        ([tmp_path], "is a folder"),
        ([path, path], "is given twice"),
    ]:
        with pytest.raises(UserError, match=reason):
            prepare(sources, tmp_path / "out", KAGGLE)
    (tmp_path / "log.xyz").write_text("label,c\n1,a\n")
    with pytest.raises(UserError, match="does not tell what parts its fields"):
        prepare([tmp_path / "log.xyz"], tmp_path / "out", PrepareConfig(categorical=("c",)))
    # An empty folder, and what an earlier run left, are no obstacle.
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "dataset.json").write_text("{}")
    (tmp_path / "out.partial" / MARKER).touch()
    assert sum(prepare([path], tmp_path / "out", KAGGLE).rows.values()) == 20
    assert not (tmp_path / "out.partial").exists()


def test_brackets_in_names_are_no_pattern(tmp_path):
    config = PrepareConfig(categorical=("c",))
    for name, rows in (("a[1].parquet", 20), ("a1.parquet", 30)):
        days = [date(2020, 1, 1 + n) for n in range(rows)]
        pl.DataFrame({"label": [1] * rows, "c": days}).write_parquet(tmp_path / name)
    dataset = prepare(tmp_path / "a[1].parquet", tmp_path / "[out]" / "[br]", config)
    assert sum(dataset.rows.values()) == 20
    assert os.listdir(dataset.path.parent) == ["[br]"]


def test_a_folder_of_somebody_else_is_kept(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(UserError, match=r"out\.partial .* was not made by dqrm prepare; move it"):
        prepare([path], tmp_path / "out", KAGGLE)
    assert (tmp_path / "out.partial" / "mine").read_text() == "x"
    (tmp_path / "link.partial").symlink_to(tmp_path / "out.partial")
    with pytest.raises(UserError, match="was not made by dqrm prepare"):
        prepare([path], tmp_path / "link", KAGGLE)


def test_two_runs_into_one_output(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    refused = []

    def meanwhile(what, done, total):
        if not refused:
            with pytest.raises(UserError, match="another dqrm prepare is writing to") as caught:
                prepare([path], tmp_path / "out", KAGGLE)
            refused.append(caught.value)

    dataset = prepare([path], tmp_path / "out", KAGGLE, meanwhile)
    dataset.validate()
    assert refused
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "out"]
    assert MARKER not in os.listdir(dataset.path)


def test_a_killed_run_is_cleared(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    code = (
        "import os, signal; from dqrm.data.prepare import prepare; from dqrm.data.config import PrepareConfig;"
        "prepare('log.txt', 'out', PrepareConfig(layout='criteo-kaggle'),"
        "lambda what, *_: what == 'writing' and os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "staging").is_dir()
    assert sum(prepare([path], tmp_path / "out", KAGGLE).rows.values()) == 20
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "out"]


def test_odd_outputs(tmp_path, monkeypatch):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that this runs in"):
        prepare([path], ".", KAGGLE)
    with pytest.raises(UserError, match=r"log\.txt is a file, expected a folder"):
        prepare([path], path / "below", KAGGLE)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot write to"):
        prepare([path], tmp_path / "loop", KAGGLE)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert sum(prepare([path], tmp_path / "link", KAGGLE).rows.values()) == 20
    assert (tmp_path / "real" / "dataset.json").is_file()


@pytest.mark.parametrize("limit", [200, 3_000])
def test_a_full_disk_is_named(tmp_path, limit):
    write(tmp_path / "log.txt", criteo_lines(200))
    code = (
        "import resource; from dqrm.data.prepare import prepare; from dqrm.data.config import PrepareConfig;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "prepare('log.txt', 'out', PrepareConfig(layout='criteo-kaggle', chunk_rows=10))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert "UserError: cannot write to" in last
    assert not last.endswith("None")
    assert os.listdir(tmp_path) == ["log.txt"]


def test_an_interruption_leaves_nothing(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))

    def interrupt(what, done, total):
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "out", KAGGLE, interrupt)
    assert os.listdir(tmp_path) == ["log.txt"]


def test_progress_reaches_the_end(tmp_path):
    told = {}
    path = write(tmp_path / "log.txt", criteo_lines(50))
    prepare([path], tmp_path / "out", KAGGLE, lambda what, done, total: told.update({what: (done, total)}))
    assert told == {"reading": (path.stat().st_size,) * 2, "counting ids": (26, 26), "writing": (50, 50)}


def test_awkward_names(tmp_path):
    rows = [{"label": n % 2, "a/b": f"{n}", "r0": n, "C1": "x", "d0": n} for n in range(20)]
    config = PrepareConfig(categorical=("a/b", "C1", "r0"), dense=("d0",))
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out" / "deep", config)
    assert dataset.vocabulary_path("a/b").is_file()
    assert dataset.table_rows[1] == 2


def test_describe_is_json(tmp_path):
    dataset = prepare(write(tmp_path / "log.txt", criteo_lines(50)), str(tmp_path / "out"), KAGGLE)
    shown = json.loads(json.dumps(Dataset(tmp_path / "out").describe()))
    assert shown["rows"] == dataset.rows
    assert shown["table_rows"] == sum(dataset.table_rows)
    assert shown["fingerprint"] == dataset.fingerprint
