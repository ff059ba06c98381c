"""One value has one key, and is missing by one rule, whatever type, shape and file holds it."""

import dataclasses
from datetime import UTC, date, datetime, time
from decimal import Decimal

import numpy as np
import polars as pl
import pytest

from dqrm.data.cells import text
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.python_values import to_series
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build

ALL = {"split": "time", "validation_fraction": 0.0, "test_fraction": 0.0}
ZONED = datetime(2026, 1, 2, 3, 4, 5, 120000, UTC)
# What text files hold, and the same values in every type that can hold them.
SAME = {
    "whole": (
        ["1", "0", "29", None, "1"],
        [
            pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Int128, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64,
            pl.Float32, pl.Float64, pl.Decimal(10, 0), pl.Decimal(10, 2), pl.Decimal(38, 9),
            pl.String, pl.Categorical, pl.Enum(["1", "0", "29"]), pl.Binary,
        ],
    ),
    "large": (
        ["9007199254740993", "9223372036854775807", None, "-9007199254740993"],
        [pl.Int64, pl.Int128, pl.Decimal(38, 3), pl.String],
    ),
    "large even": (
        ["18014398509481984", "9223372036854775808", None, "36893488147419103232"],
        [pl.Int128, pl.Float64, pl.Float32, pl.Decimal(38, 1), pl.String],
    ),
    "fractions": (
        ["0.1", "-2.5", "0.0000001", None, "123.456", "0.00001"],
        [pl.Float32, pl.Float64, pl.Decimal(20, 7), pl.Decimal(30, 12), pl.String, pl.Categorical],
    ),
    "names": (["a", "é", None, "true", "007", "1.10"], [pl.String, pl.Categorical, pl.Binary]),
}  # fmt: skip


def cast(values, kind):
    """A Series of the type; not through text, where that could keep another spelling."""
    if kind in (pl.Float32, pl.Float64):
        return pl.Series([None if value is None else float(value) for value in values], dtype=kind)
    if kind == pl.Decimal:
        return pl.Series([None if value is None else Decimal(value) for value in values], dtype=kind)
    if kind == pl.Int128:
        return pl.Series([None if value is None else int(value) for value in values], dtype=kind)
    return pl.Series(values, dtype=pl.String).cast(kind)


def shapes(values):
    """The values alone, as lists, as arrays, as a part of a cross; each column of its own."""
    height = len(values)
    pairs = pl.DataFrame({"a": values, "b": values.reverse()}).select(pl.concat_list("a", "b")).to_series()
    return pl.DataFrame(
        {
            "label": pl.Series([n % 2 for n in range(height)]),
            "one": values,
            "list": pairs,
            "array": pairs.list.to_array(2),
            "other": pl.Series(["x"] * height),
        }
    )


CONFIG = PrepareConfig(categorical=("one", "list", "array"), multi=("list", "array"), cross=("one*other",), **ALL)


def keys(dataset):
    return {
        column.name: pl.read_parquet(dataset.vocabulary_path(column.name))["key"].to_list()
        for column in dataset.columns
    }


def found(dataset):
    (batch,) = dataset.split("train").batches(1000)
    return batch.ids.tolist(), [[part.tolist() for part in bag] for bag in batch.bags]


def scored(dataset, *paths, version=True):
    """The ids that `predict` looks up."""
    columns = [dict(column) for column in dataset.info["schema"]["columns"]]
    if not version:
        for column in columns:
            del column["key_version"]
    tables = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    log = RawLog(list(paths), RawEncoder(build(PrepareConfig, dataset.info["options"], "test"), columns, tables))
    ((_, batch),) = log.blocks()
    return batch.ids.tolist(), [[part.tolist() for part in bag] for bag in batch.bags]


def as_csv(path, values):
    """The log in text: the lists' values parted by |."""
    pairs = ["|".join(part for part in pair if part is not None) for pair in zip(values, values[::-1])]
    frame = pl.DataFrame(
        {"label": [n % 2 for n in range(len(values))], "one": values, "list": pairs, "array": pairs, "other": "x"}
    )
    frame.write_csv(path)
    return path


@pytest.mark.parametrize("name", SAME)
def test_every_type_and_shape_gives_the_keys_and_ids_of_the_text(name, tmp_path):
    values, kinds = SAME[name]
    text = prepare(as_csv(tmp_path / "log.csv", values), tmp_path / "text", CONFIG)
    known = list(dict.fromkeys(value or "" for value in values))
    assert keys(text)["one"] == known
    assert keys(text)["one*other"] == [value and f"{value}\x1fx" for value in known]
    for number, kind in enumerate(kinds):
        path = tmp_path / f"{number}.parquet"
        shapes(cast(values, kind)).write_parquet(path)
        made = prepare(path, tmp_path / f"typed{number}", CONFIG)
        assert keys(made) == keys(text), kind
        assert found(made) == found(text), kind
        assert scored(text, path) == found(text), kind
        assert scored(made, tmp_path / "log.csv") == found(text), kind


def test_times_do_not_depend_on_their_unit(tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, 120000)
    columns = {
        "date": [pl.Series([date(2026, 1, 2)])],
        "datetime": [pl.Series([moment], dtype=pl.Datetime(unit)) for unit in ("ms", "us", "ns")],
        "zoned": [pl.Series([ZONED]).dt.convert_time_zone(zone) for zone in ("UTC", "Europe/Paris")],
        "time": [pl.Series([time(3, 4, 5)])],
        "flag": [pl.Series([True])],
    }
    texts = {"date": "2026-01-02", "datetime": "2026-01-02T03:04:05.12", "zoned": "2026-01-02T03:04:05.12Z"}
    texts |= {"time": "03:04:05", "flag": "true"}
    for name, series in columns.items():
        values = [texts[name], None]
        text = prepare(as_csv(tmp_path / f"{name}.csv", values), tmp_path / name, CONFIG)
        for number, values in enumerate(series):
            path = tmp_path / f"{name}{number}.parquet"
            shapes(values.extend_constant(None, 1)).write_parquet(path)
            assert keys(prepare(path, tmp_path / f"{name}{number}", CONFIG)) == keys(text)
            assert scored(text, path) == found(text)


def test_what_is_missing_is_missing_in_every_shape(tmp_path):
    nothing = [
        pl.Series([float("nan"), None, 2.0], dtype=pl.Float32),
        pl.Series([float("nan"), None, 2.0]),
        pl.Series(["", None, "2"]),
        pl.Series(["", None, "2"], dtype=pl.Categorical),
        pl.Series([b"", None, b"2"]),
        pl.Series([None, None, 2]),
        pl.Series([Decimal("-1.00"), None, Decimal("2.00")]),
        pl.Series(["-1", "NULL", "2.0"]),
        pl.Series([-1, None, 2]),
        pl.Series([-1.0, float("nan"), 2.0]),
    ]
    marked = dataclasses.replace(CONFIG, null_values=("-1", "NULL"))
    for number, values in enumerate(nothing):
        path = tmp_path / f"{number}.parquet"
        shapes(values).write_parquet(path)
        dataset = prepare(path, tmp_path / f"{number}", marked if number > 5 else CONFIG)
        assert keys(dataset) == {"one": ["", "2"], "one*other": ["", "2\x1fx"], "list": ["2"], "array": ["2"]}
        assert found(dataset) == scored(dataset, path) == ([[1, 1], [1, 1], [2, 2]], [[[1, 1], [0, 1, 1]]] * 2)


def test_zero_and_infinity(tmp_path):
    shapes(pl.Series([-0.0, 0.0, float("inf"), float("-inf")])).write_parquet(tmp_path / "a.parquet")
    assert keys(prepare(tmp_path / "a.parquet", tmp_path / "out", CONFIG))["one"] == ["0", "inf", "-inf"]
    as_csv(tmp_path / "b.csv", ["-0.0", "0.00", "0", "-0"])
    # A whole number with a fraction of zeros is that number; other text is itself.
    assert keys(prepare(tmp_path / "b.csv", tmp_path / "text", CONFIG))["one"] == ["0", "-0"]


@pytest.mark.parametrize("shape", ["one", "list", "array"])
def test_bytes_that_are_no_text_are_refused(shape, tmp_path):
    shapes(pl.Series([b"a", b"\xff", b"b"])).write_parquet(tmp_path / "a.parquet")
    multi = () if shape == "one" else (shape,)
    config = PrepareConfig(categorical=(shape,), multi=multi, **ALL)
    with pytest.raises(UserError, match=rf"row 2: column {shape} of type .*expected numbers or text in UTF-8"):
        prepare(tmp_path / "a.parquet", tmp_path / "out", config)
    dataset = prepare(tmp_path / "a.parquet", tmp_path / "out", dataclasses.replace(config, on_error="skip"))
    assert (sum(dataset.rows.values()), dataset.info["lines_skipped"]) == (2, 1)


def test_dense_numbers_of_every_type(tmp_path):
    values = ["1", "0", None, "3"]
    config = PrepareConfig(dense=("d",), dense_transform="none", **ALL)
    for number, kind in enumerate([*SAME["whole"][1], pl.Enum(["1", "0", "3"])]):
        if isinstance(kind, pl.Enum) and number < 18:
            continue
        pl.DataFrame({"label": [0, 1, 0, 1], "d": cast(values, kind)}).write_parquet(tmp_path / "a.parquet")
        dataset = prepare(tmp_path / "a.parquet", tmp_path / f"{number}", config)
        assert dataset.split("train").arrays["dense.f32"][:, 0].tolist() == [1, 0, 0, 3], kind


def test_a_dataset_of_the_first_rules_is_read_by_them(tmp_path):
    """What an older dataset or artifact holds: lists kept 1.0, decimals 5.00, NaN was an id."""
    shapes(pl.Series([1.0, 2.5, float("nan"), 1.0])).write_parquet(tmp_path / "a.parquet")
    dataset = prepare(tmp_path / "a.parquet", tmp_path / "out", CONFIG)
    info = dataset.info  # changed in memory only: the file has a checksum
    old = {"one": ["1", "2.5", "NaN"], "one*other": ["1\x1fx", "2.5\x1fx", "NaN\x1fx"]}
    old |= {name: ["1.0", "2.5", "NaN"] for name in ("list", "array")}
    for column in info["schema"]["columns"]:
        del column["key_version"]
        column["rows"] = 4
        frame = pl.DataFrame({"key": old[column["name"]], "row": [1, 2, 3], "count": [1, 1, 1]})
        frame.with_columns(pl.col("row").cast(pl.Int32)).write_parquet(dataset.path / column["vocabulary"])
    ids, bags = scored(dataset, tmp_path / "a.parquet")
    assert ids == [[1, 1], [2, 2], [3, 3], [1, 1]]
    assert bags == [[[1, 1, 2, 3, 3, 2, 1, 1], [0, 2, 4, 6]]] * 2


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ([Decimal("NaN"), Decimal("1.50")], ["", "1.5"]),
        ([Decimal("sNaN")], [""]),
        ([Decimal("-Infinity"), Decimal("5.00"), None], ["-inf", "5", ""]),
        ([Decimal(10) ** 50], ["1" + "0" * 50]),
        ([Decimal("1E+2"), Decimal("1.50E-40")], ["100", "0." + "0" * 39 + "15"]),
        ([Decimal("1E+2"), Decimal("-0.0")], ["100", "0"]),
        ([np.array(7), np.array("7")], ["7", "7"]),
        ([np.array(np.datetime64("2026-01-02"))], ["2026-01-02"]),
        ([np.float16(0.1), np.float32(0.1)], ["0.099975586", "0.1"]),
    ],
)
def test_python_values_that_polars_takes_for_others_or_not_at_all(values, keys):
    column = to_series("u", values)
    assert pl.DataFrame({"u": column}).select(text(pl.col("u"), column.dtype)).to_series().to_list() == keys
