"""Raw logs as batches: every cell must get the table row that `prepare` gave it, without a label."""

import csv
import dataclasses
import gzip
import math
import random
import re
import zlib

import numpy as np
import polars as pl
import pytest
import zstandard

from data_helpers import KAGGLE, LOG, LOG_CONFIG, criteo_lines, spoil, table, write
from dqrm.data import lines, sources
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build

IN_ORDER = {"split": "time", "validation_fraction": 0.2, "test_fraction": 0.2}


def raw(dataset, sources, **more):
    """The log as a model of that dataset would read it, from what the model's file would carry."""
    columns = dataset.info["schema"]["columns"]
    vocabularies = [
        Vocabulary.read(Vocabulary.read(dataset.vocabulary_path(column["name"])).to_bytes()) for column in columns
    ]
    options = build(PrepareConfig, {**dataset.info["options"], **more.pop("options", {})}, "options")
    return RawLog(sources, RawEncoder(options, columns, vocabularies, **more))


def joined(log):
    """All rows: dense, ids, per multi-valued column the lists of each row, and the kept cells."""
    dense, ids, bags, kept = [], [], [], []
    for frame, batch in log.blocks():
        assert batch.labels.tolist() == [0] * len(batch)
        assert [str(part.dtype) for part in (batch.dense, batch.ids)] == ["torch.float32", "torch.int32"]
        dense += batch.dense.tolist()
        ids += batch.ids.tolist()
        kept.append(frame)
        lists = []
        for values, offsets in batch.bags:
            assert [str(part.dtype) for part in (values, offsets)] == ["torch.int32", "torch.int64"]
            ends = [*offsets.tolist()[1:], len(values)]
            lists.append([values[begin:end].tolist() for begin, end in zip(offsets.tolist(), ends)])
        bags += list(zip(*lists)) if lists else [()] * len(batch)
    assert log.rows == len(ids)
    assert all(frame.schema == log.schema for frame in kept)
    return dense, ids, bags, pl.concat(kept) if kept else pl.DataFrame(schema=log.schema)


def prepared(dataset, order=("train", "validation", "test")):
    """The same of the splits, one after the other."""
    dense, ids, bags = [], [], []
    multi = [n for n, column in enumerate(dataset.columns) if column.multi]
    for name in order:
        arrays = dataset.split(name).arrays
        dense += arrays["dense.f32"].tolist()
        ids += arrays["ids.i32"].tolist()
        lists = [
            [part.tolist() for part in np.split(arrays[f"{n:02d}.values.i32"], arrays[f"{n:02d}.offsets.i64"][1:-1])]
            for n in multi
        ]
        bags += list(zip(*lists)) if lists else [()] * dataset.rows[name]
    return dense, ids, bags


def vocabulary(dataset, column):
    """{key: row}, by no code of ours."""
    return {key: row for key, row, _ in pl.read_parquet(dataset.vocabulary_path(column)).rows()}


def splitmix64(number):
    mixed = (number + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def criteo_reference(dataset, rows, cap=None, crosses=(), texts=()):
    """Line by line: dense and ids. crosses: pairs of categories as hexadecimal keys; texts: (I, C) crosses as text."""
    tables = [vocabulary(dataset, column.name) for column in dataset.columns]
    dense, ids = [], []
    for row in rows:
        numbers, cats = row.split("\t")[-39:-26], row.split("\t")[-26:]
        dense.append([math.log1p(max(0, int(number))) if number else 0.0 for number in numbers])
        singles = [int(cat, 16) if cat else 0 for cat in cats]
        keys = [key % cap if cap else key for key in singles]
        for a, b in crosses:
            key = singles[a] << 32 | singles[b] if singles[a] and singles[b] else 0
            keys.append(splitmix64(key) % cap if cap else key)
        for a, b in texts:
            text = f"{numbers[a]}\x1f{cats[b].lower().zfill(8)}" if numbers[a] and cats[b] else ""
            keys.append(zlib.crc32(text.encode()) % cap if cap else text)
        ids.append([known.get(key, 0) for known, key in zip(tables, keys)])
    return dense, ids


@pytest.mark.parametrize("block", [1 << 24, 3000])
@pytest.mark.parametrize("fields", [{}, {"min_count": 5}, {"max_rows_per_table": 11}, {"max_rows_per_table": 16}])
def test_criteo_equals_the_dataset_and_a_plain_reference(tmp_path, monkeypatch, block, fields):
    rows = criteo_lines(200)
    config = dataclasses.replace(KAGGLE, cross=("C1*C2", "C26*C3", "I1*C2"), **fields)
    path = write(tmp_path / "log.txt", rows)
    dataset = prepare([path], tmp_path / "out", config)
    monkeypatch.setattr(lines, "_BLOCK", block)
    monkeypatch.setattr(sources, "_READ", 1000)
    dense, ids, _, _ = joined(raw(dataset, path))
    # Kaggle's test rows come before its validation rows.
    assert (dense, ids) == prepared(dataset, ("train", "test", "validation"))[:2]
    assert len(set(map(tuple, ids))) > 100
    unseen = criteo_lines(150, seed=9)
    unseen = [spoil(row, 14 + n % 26, f"ffff{n:04x}") for n, row in enumerate(unseen)]
    dense, ids, _, _ = joined(raw(dataset, write(tmp_path / "new.txt", unseen)))
    wanted = criteo_reference(dataset, unseen, config.max_rows_per_table, ((0, 1), (25, 2)), ((0, 1),))
    assert ids == wanted[1]
    if "max_rows_per_table" not in fields:
        assert any(row[n % 26] == 0 for n, row in enumerate(ids))
    np.testing.assert_array_max_ulp(np.array(dense, np.float32), np.array(wanted[0], np.float32), 1)


def test_criteo_without_labels_compressed_and_in_several_files(tmp_path):
    rows = criteo_lines(90)
    dataset = prepare([write(tmp_path / "train.txt", rows)], tmp_path / "out", KAGGLE)
    bare = [row.split("\t", 1)[1] for row in rows]
    text = ["".join(row + "\n" for row in part).encode() for part in (bare[:30], rows[30:60], bare[60:])]
    (tmp_path / "day_2.gz").write_bytes(gzip.compress(text[0]))
    (tmp_path / "day_9").write_bytes(text[1].replace(b"\n", b"\r\n"))
    (tmp_path / "day_10.zst").write_bytes(zstandard.compress(text[2].rstrip(b"\n")))
    log = raw(dataset, [tmp_path / "day_*"], keep=("C26", "I1"))
    advanced = []
    dense, ids, _, kept = joined(log)
    assert (dense, ids) == prepared(dataset, ("train", "test", "validation"))[:2]
    assert kept["C26"].fill_null("").to_list() == [row.split("\t")[39] for row in rows]
    assert kept["I1"].fill_null("").to_list() == [row.split("\t")[1] for row in rows]
    assert kept.columns == ["C26", "I1"]
    list(log.blocks(advanced.append))
    assert sum(advanced) == log.size == sum(path.stat().st_size for path in log.paths)
    assert log.rows == 90  # once more, from the start
    (tmp_path / "day_11").write_bytes(b"")
    with pytest.raises(UserError, match=r"day_11, after line 0: it is empty"):
        list(raw(dataset, [tmp_path / "day_*"]).blocks())
    (tmp_path / "day_11").unlink()
    with pytest.raises(UserError, match=r"no column 'label' in .*day_2.gz, which has 39 columns"):
        raw(dataset, [tmp_path / "day_9", tmp_path / "day_2.gz"], keep=("label",))
    labels = joined(raw(dataset, tmp_path / "day_9", keep=("label",)))[3]["label"]
    assert labels.to_list() == [row[0] for row in rows[30:60]]


@pytest.mark.parametrize("count", [1, 38, 41])
def test_criteo_of_another_width(tmp_path, count):
    dataset = prepare([write(tmp_path / "train.txt", criteo_lines(30))], tmp_path / "out", KAGGLE)
    path = write(tmp_path / "log.txt", ["\t".join(["1"] * count), *criteo_lines(3)])
    with pytest.raises(UserError, match=rf"log.txt, line 1: {count} columns, expected 40, or 39 without the label"):
        raw(dataset, path)
    log = raw(dataset, path, on_error="skip")  # as `prepare` skips it
    assert sum(len(batch) for _, batch in log.blocks()) == 3
    assert log.skipped == 1
    write(path, ["\t".join(["1"] * count)] * 3)
    with pytest.raises(UserError, match=rf"line 1: {count} columns"):
        raw(dataset, path, on_error="skip")


def test_a_label_is_not_looked_at(tmp_path):
    rows = criteo_lines(40)
    dataset = prepare([write(tmp_path / "train.txt", rows)], tmp_path / "out", KAGGLE)
    odd = [spoil(row, 0, ["", "7", "unknown"][n % 3]) for n, row in enumerate(rows)]
    _, ids, _, kept = joined(raw(dataset, write(tmp_path / "odd.txt", odd), keep=("label",)))
    assert ids == joined(raw(dataset, tmp_path / "train.txt"))[1]
    assert kept["label"].fill_null("").to_list() == [row.split("\t")[0] for row in odd]


def test_malformed_lines_stop_or_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 4000)
    monkeypatch.setattr(sources, "_READ", 1000)
    rows = criteo_lines(100)
    dataset = prepare([write(tmp_path / "train.txt", rows)], tmp_path / "out", KAGGLE)
    bare = [row.split("\t", 1)[1] for row in rows]
    wanted = joined(raw(dataset, write(tmp_path / "good.txt", bare)))
    bad = list(bare)
    bad[61], bad[80], bad[99] = spoil(bad[61], 13, "xyz"), rows[80], "short"
    path = write(tmp_path / "bad.txt", bad)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 62: column C1 holds 'xyz', expected up to 8")):
        joined(raw(dataset, path))
    log = raw(dataset, path, on_error="skip", keep=("C2",))
    dense, ids, _, kept = joined(log)
    good = [n for n in range(100) if n not in (61, 80, 99)]
    assert (log.rows, log.skipped) == (97, 3)
    assert dense == [wanted[0][n] for n in good]
    assert ids == [wanted[1][n] for n in good]
    assert kept["C2"].fill_null("").to_list() == [bare[n].split("\t")[14] for n in good]
    write(path, [*bare[:80], rows[80]])
    with pytest.raises(UserError, match=r"bad.txt, line 81: 40 columns, expected 39"):
        joined(raw(dataset, path))


def test_a_damaged_file_is_used_up_to_the_damage(tmp_path):
    rows = criteo_lines(3000)
    dataset = prepare([write(tmp_path / "train.txt", rows[:50])], tmp_path / "out", KAGGLE)
    packed = gzip.compress("".join(row + "\n" for row in rows).encode())
    path = tmp_path / "log.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"after line \d+: its gzip data is truncated"):
        joined(raw(dataset, path))
    log = raw(dataset, path, on_error="skip")
    assert 500 < len(joined(log)[1]) < 3000
    assert "is truncated" in log.damaged[0]


def table_files(folder, rows):
    """The same table in every format."""
    table(folder / "log.csv", rows)
    table(folder / "log.tsv", rows, delimiter="\t")
    table(folder / "quoted.csv", rows, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    text = (folder / "log.csv").read_bytes()
    (folder / "log.csv.gz").write_bytes(gzip.compress(text))
    (folder / "bare.csv.zst").write_bytes(zstandard.compress(text.rstrip(b"\r\n")))
    pl.DataFrame(rows).with_columns(pl.col("tags").str.split("|")).write_parquet(folder / "log.parquet")
    return ["log.csv", "log.tsv", "quoted.csv", "log.csv.gz", "bare.csv.zst", "log.parquet"]


@pytest.mark.parametrize("fields", [{}, {"max_rows_per_table": 3}, {"min_count": 3}, {"dense_transform": "none"}])
def test_tables_of_every_format(tmp_path, fields):
    config = dataclasses.replace(
        LOG_CONFIG,
        **{"categorical": ("user", "tags", "ad"), "multi": ("tags",), "cross": ("user*ad",), **IN_ORDER, **fields},
    )
    names = table_files(tmp_path, LOG)
    dataset = prepare([tmp_path / "log.csv"], tmp_path / "out", config)
    wanted = prepared(dataset)
    tables = {column.name: vocabulary(dataset, column.name) for column in dataset.columns}

    def look_up(column, key):
        return tables[column].get(zlib.crc32(key.encode()) % 3 if "max_rows_per_table" in fields else key, 0)

    keys = [{**row, "user*ad": f"{row['user']}\x1f{row['ad']}"} for row in LOG]
    assert wanted[1] == [[look_up(name, row[name]) for name in ("user", "ad", "user*ad")] for row in keys]
    assert wanted[2] == [([look_up("tags", tag) for tag in row["tags"].split("|") if tag],) for row in LOG]
    for name in names:
        dense, ids, bags, kept = joined(raw(dataset, tmp_path / name, keep=("day", "user")))
        assert (dense, ids, bags) == wanted, name
        days = [row["day"] for row in LOG]
        assert kept["day"].to_list() == (days if name == "log.parquet" else list(map(str, days)))
        assert kept["user"].to_list() == [row["user"] for row in LOG]
    dense, ids, bags, kept = joined(raw(dataset, [tmp_path / name for name in names], keep=("day",)))
    assert (dense, ids, bags) == tuple(part * len(names) for part in wanted)
    assert kept["day"].to_list() == [str(row["day"]) for row in LOG] * len(names)
    assert kept.schema == {"day": pl.String}


def test_columns_that_the_model_does_not_use_may_be_absent(tmp_path):
    config = dataclasses.replace(
        LOG_CONFIG, split="column", split_column="day", validation_values=("3",), test_values=("4",)
    )
    dataset = prepare([table(tmp_path / "a.csv", LOG)], tmp_path / "out", config)
    path = table(tmp_path / "b.csv", [{name: row[name] for name in ("price", "ad", "user")} for row in LOG])
    assert joined(raw(dataset, path))[:3] == prepared(dataset)
    assert joined(raw(dataset, path))[3].shape == (0, 0)
    with pytest.raises(UserError, match=r"no column 'day' in .*b.csv; known are price, ad, user"):
        raw(dataset, path, keep=("day",))
    bad = table(tmp_path / "c.csv", [{"price": 1, "user": "u"}])
    with pytest.raises(UserError, match=r"no column 'ad' in .*c.csv"):
        raw(dataset, [path, bad])
    pl.DataFrame({"price": [1], "ads": ["x"], "user": ["y"]}).write_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"no column 'ad' in .*d.parquet; did you mean 'ads'"):
        raw(dataset, [path, tmp_path / "d.parquet"])
    twice = tmp_path / "e.csv"
    twice.write_text("price,ad,user,day,day\n1,a,u,1,1\n")
    assert joined(raw(dataset, twice))[1] == [[0, 0]]
    with pytest.raises(UserError, match="2 columns named 'day'"):
        raw(dataset, twice, keep=("day",))


def test_keep_that_cannot_be(tmp_path):
    rows = [{**row, "probability": 1} for row in LOG]
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out", LOG_CONFIG)
    with pytest.raises(UserError, match="keep names 'probability'"):
        raw(dataset, tmp_path / "a.csv", keep=("probability",))
    with pytest.raises(UserError, match="keep names 'user' twice"):
        raw(dataset, tmp_path / "a.csv", keep=("user", "user"))


def test_only_text_keys_and_a_column_named_as_ours_are(tmp_path):
    """No dense column and no check at all, in a log that uses the names used inside."""
    rows = [{"label": n % 2, "k0": f"x{n % 3}", "c0": n, "r0": "é"} for n in range(20)]
    config = PrepareConfig(categorical=("k0",), **IN_ORDER)
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out", config)
    dense, ids, bags, kept = joined(raw(dataset, tmp_path / "a.csv", keep=("r0", "k0", "label")))
    assert (dense, ids, bags) == prepared(dataset)
    assert dense == [[]] * 20
    assert kept.rows() == [("é", row["k0"], str(row["label"])) for row in rows]


def test_only_dense_or_only_lists(tmp_path):
    frame = pl.DataFrame({"label": [0, 1] * 10, "d": [None, 2.5] * 10, "m": [["a", None, ""], []] * 10})
    frame.write_parquet(tmp_path / "a.parquet")
    for n, fields in enumerate(({"dense": ("d",)}, {"categorical": ("m",), "multi": ("m",)})):
        dataset = prepare([tmp_path / "a.parquet"], tmp_path / f"{n}", PrepareConfig(**fields, **IN_ORDER))
        dense, ids, bags, kept = joined(raw(dataset, tmp_path / "a.parquet", keep=("m",)))
        assert (dense, ids, bags) == prepared(dataset)
        assert kept["m"].to_list() == frame["m"].to_list()


def test_missing_cells_and_quoted_fields(tmp_path):
    names = ["plain", 'a "b", c', "two\nlines", "tab\there", "é", "", " "]
    draw = random.Random(0)
    rows = [
        {"label": 0, "name": draw.choice(names), "e": draw.choice(["", "1"]), "d": draw.choice(["", "nan", "-3", "2"])}
        for _ in range(60)
    ]
    config = PrepareConfig(categorical=("name",), dense=("d",), cross=("name*e",), **IN_ORDER)
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out", config)
    dense, ids, bags, kept = joined(raw(dataset, tmp_path / "a.csv", keep=("name",)))
    assert (dense, ids, bags) == prepared(dataset)
    assert kept["name"].fill_null("").to_list() == [row["name"] for row in rows]
    known = vocabulary(dataset, "name*e")
    keys = [f"{row['name']}\x1f{row['e']}" if row["name"] and row["e"] else "" for row in rows]
    assert [row[1] for row in ids] == [known.get(key, 0) for key in keys]


def test_parquet_cells_of_other_types_and_small_blocks(tmp_path):
    rows = [{"label": n % 2, "id": n % 7, "on": n % 2 == 0, "at": None, "x": n / 2} for n in range(100)]
    pl.DataFrame(rows).write_parquet(tmp_path / "a[1].parquet", row_group_size=13)
    config = PrepareConfig(categorical=("id", "on", "at"), dense=("x",), **IN_ORDER)
    dataset = prepare([tmp_path / "a[1].parquet"], tmp_path / "out", config)
    log = raw(dataset, tmp_path / "a[1].parquet", keep=("id", "x", "on"), options={"chunk_rows": 9})
    assert len(list(log.blocks())) > 5
    dense, ids, bags, kept = joined(log)
    assert (dense, ids, bags) == prepared(dataset)
    assert kept.rows() == [(row["id"], row["x"], row["on"]) for row in rows]
    assert log.schema == {"id": pl.Int64, "x": pl.Float64, "on": pl.Boolean}
    advanced = []
    list(log.blocks(advanced.append))
    assert sum(advanced) == log.size
    assert len([count for count in advanced if count]) > 5


def test_kept_columns_of_several_types(tmp_path):
    dataset = prepare([table(tmp_path / "a.csv", LOG)], tmp_path / "out", LOG_CONFIG)
    base = pl.DataFrame(LOG)
    kinds = {"small": pl.Int8, "large": pl.Int64, "unsigned": pl.UInt64, "null": pl.Null, "text": pl.String}
    for name, kind in kinds.items():
        base.with_columns((pl.lit(None) if kind == pl.Null else pl.col("day").cast(kind)).alias("day")).write_parquet(
            tmp_path / f"{name}.parquet"
        )

    def days(*names):
        log = raw(dataset, [tmp_path / f"{name}.parquet" for name in names], keep=("day",))
        return log.schema["day"], joined(log)[3]["day"].to_list()

    wanted = [row["day"] for row in LOG]
    assert days("small", "large") == (pl.Int64, wanted * 2)
    assert days("null", "small") == (pl.Int8, [None] * 20 + wanted)
    assert days("large", "unsigned")[1] == wanted * 2
    assert days("small", "text") == (pl.String, list(map(str, wanted)) * 2)
    base.with_columns(pl.concat_list(pl.col("day").cast(pl.Int8)).alias("day")).write_parquet(
        tmp_path / "lists.parquet"
    )
    with pytest.raises(UserError, match=r"column day of .*lists.parquet is of type List\(Int8\), in files before it"):
        days("small", "lists")


def test_empty_logs(tmp_path):
    dataset = prepare([table(tmp_path / "a.csv", LOG)], tmp_path / "out", LOG_CONFIG)
    (tmp_path / "header.csv").write_text("price,ad,user")
    log = raw(dataset, tmp_path / "header.csv", keep=("ad",))
    assert list(log.blocks()) == []
    assert (log.rows, log.schema) == (0, {"ad": pl.String})
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(UserError, match=r"none.csv is empty, expected a line with the names"):
        raw(dataset, tmp_path / "none.csv")
    pl.DataFrame(LOG).head(0).write_parquet(tmp_path / "none.parquet")
    assert list(raw(dataset, tmp_path / "none.parquet", keep=("day",)).blocks()) == []
    with pytest.raises(UserError, match="no file matches"):
        raw(dataset, tmp_path / "*.nothing")


def test_columns_and_vocabularies_must_fit_the_options(tmp_path):
    dataset = prepare([table(tmp_path / "a.csv", LOG)], tmp_path / "out", LOG_CONFIG)
    columns = dataset.info["schema"]["columns"]
    made = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    with pytest.raises(UserError, match="the vocabulary of column user has 4 rows"):
        RawLog(tmp_path / "a.csv", RawEncoder(LOG_CONFIG, columns, made[::-1]))
    with pytest.raises(UserError, match="1 vocabularies"):
        RawLog(tmp_path / "a.csv", RawEncoder(LOG_CONFIG, columns, made[:1]))
    with pytest.raises(UserError, match="its options expect user, ad"):
        RawLog(tmp_path / "a.csv", RawEncoder(LOG_CONFIG, columns[::-1], made))
    capped = dataclasses.replace(LOG_CONFIG, max_rows_per_table=4)
    with pytest.raises(UserError, match="column user of the model is"):
        RawLog(tmp_path / "a.csv", RawEncoder(capped, columns, made))
