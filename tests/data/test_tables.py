"""`prepare` takes tables in memory: the dataset is that of the same log in a file."""

import json
from dataclasses import replace

import polars as pl
import pytest

from data_helpers import LOG, LOG_CONFIG, content, criteo_lines, table, write
from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from serving.test_score_rows import CONFIG, Arrow, arrow_dataset, arrow_table, log, pandas_frame

HOLDERS = {
    "polars": lambda rows: rows,
    "lazy": lambda rows: rows.lazy(),
    "in a list": lambda rows: [rows[:100], rows[100:].lazy()],
    "arrow protocol": Arrow,
    "pandas": pandas_frame,
    "pyarrow": arrow_table,
    "dataset": arrow_dataset,
    "dataset and file": lambda rows: [arrow_dataset(rows[:50]), rows[50:]],
}


def vocabularies(dataset):
    return [pl.read_parquet(dataset.vocabulary_path(column.name)) for column in dataset.columns]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("options", [{}, {"split": "random", "subsample_negatives": 0.3, "chunk_rows": 70}])
def test_as_from_a_parquet_file(tmp_path, holder, options):
    rows, config = log(), replace(CONFIG, **options)
    rows.write_parquet(tmp_path / "log.parquet")
    filed = prepare(tmp_path / "log.parquet", tmp_path / "filed", config)
    held = prepare(HOLDERS[holder](rows), tmp_path / "held", config)
    assert content(held) == content(filed)
    for one, other in zip(vocabularies(held), vocabularies(filed), strict=True):
        assert one.equals(other)
    held.validate()


def test_files_and_tables_together(tmp_path):
    rows = pl.DataFrame(LOG)
    whole = prepare(table(tmp_path / "log.csv", LOG), tmp_path / "whole", LOG_CONFIG)
    first = table(tmp_path / "first.csv", LOG[:12])
    mixed = prepare([first, rows[12:]], tmp_path / "mixed", LOG_CONFIG)
    assert content(mixed) == content(whole)
    assert [source["name"] for source in mixed.info["sources"]] == ["first.csv", "table 2"]


def test_what_is_recorded_and_what_its_hash_depends_on(tmp_path):
    rows = log()
    made = {
        name: prepare(held, tmp_path / name, config).info
        for name, held, config in [
            ("a", rows, CONFIG), ("b", pl.concat([rows[:17], rows[17:]], rechunk=False).lazy(), CONFIG),
            ("c", rows.with_columns(unused=1), replace(CONFIG, chunk_rows=31)),
            ("d", rows.with_columns(pl.col("ad").cast(pl.Categorical)), CONFIG),
            ("other", rows.with_columns(age=pl.Series([5, *rows["age"][1:]])), CONFIG),
            ("moved", rows.with_columns(pl.col("ad").reverse()), CONFIG),
        ]
    }  # fmt: skip
    (source,) = made["a"]["sources"]
    assert (source["rows"], source["in_memory"], source["name"], len(source["sha256"])) == (300, True, "table 1", 64)
    assert len({made[name]["fingerprint"] for name in "abcd"}) == 1
    assert len({info["fingerprint"] for info in made.values()}) == 3
    json.dumps(made["a"])


def test_criteo_s_layout(tmp_path):
    lines = criteo_lines(70)
    names = ("label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)
    frame = pl.DataFrame([dict(zip(names, line.split("\t"))) for line in lines])
    config = PrepareConfig(layout="criteo-kaggle", cross=("C1*C2",))
    filed = prepare(write(tmp_path / "log.txt", lines), tmp_path / "filed", config)
    held = prepare(frame.with_columns(pl.col("label").cast(pl.Int8)), tmp_path / "held", config)
    assert content(held) == content(filed)


def test_what_cannot_be_a_source(tmp_path):
    rows = log()
    for given, message in [
        (rows.drop("user"), "no column 'user' in table 1"),
        ([rows, 3], "source 2 is of type int, expected the name of a file, or a polars or pandas DataFrame"),
        ({"a": [1]}, "got a source of type dict, expected the name of a file"),
        (7, "got a source of type int"),
        ([rows.to_dicts()], "source 1 is of type list"),
        (rows.with_columns(age=pl.lit("old")), "table 1, row 1: column age holds 'old', expected a finite number"),
        (rows[:0], "no row in table 1"),
        ([], "no source file was given"),
        ([str(tmp_path / "none.csv"), rows], "cannot read .*none.csv"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(given, tmp_path / "data", CONFIG)
        assert not (tmp_path / "data").exists()
    lines = table(tmp_path / "log.csv", LOG)
    with pytest.raises(UserError, match="given twice"):
        prepare([lines, pl.DataFrame(LOG), lines], tmp_path / "data", LOG_CONFIG)
