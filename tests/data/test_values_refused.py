"""Values are checked before they are transformed, and labels by what they are worth."""

import dataclasses
import re

import polars as pl
import pytest

from data_helpers import write
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build

DENSE = PrepareConfig(dense=("d",), categorical=("c",), split="time", validation_fraction=0.0, test_fraction=0.0)


def open_log(dataset, path, **more):
    columns = dataset.info["schema"]["columns"]
    tables = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    return RawLog(path, RawEncoder(build(PrepareConfig, dataset.info["options"], "test"), columns, tables, **more))


@pytest.mark.parametrize("transform", ["log1p", "none"])
@pytest.mark.parametrize("value", ["inf", "-inf", "1e39", "-1e39", "1e999", "-1e999"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_numbers_outside_of_float32_are_named_before_they_are_transformed(transform, value, suffix, tmp_path):
    config = dataclasses.replace(DENSE, dense_transform=transform)
    path, good = tmp_path / f"log.{suffix}", write(tmp_path / "good.csv", ["label,c,d", "1,x,2", "0,y,3"])
    if suffix == "csv":
        write(path, ["label,c,d", "1,x,2", f"0,y,{value}", "0,y,nan"])
    else:
        frame = pl.DataFrame({"label": [1, 0, 0], "c": ["x", "y", "y"], "d": [2.0, float(value), float("nan")]})
        frame.write_parquet(path)
    where = "line 3" if suffix == "csv" else "row 2"
    held = f"'{value}'" if suffix == "csv" else str(float(value))
    says = re.escape(f"{path}, {where}: column d holds {held}, expected a finite number")
    with pytest.raises(UserError, match=says):
        prepare(path, tmp_path / "out", config)
    dataset = prepare(good, tmp_path / "good", config)
    with pytest.raises(UserError, match=says):
        list(open_log(dataset, path).blocks())
    skipping = open_log(dataset, path, on_error="skip")
    assert sum(len(batch) for _, batch in skipping.blocks()) == 2
    assert skipping.skipped == 1


def test_labels_are_numbers(tmp_path):
    spellings = {1: ["1", "1.00", "1e0", " 1", "+1", "true", "TRUE ", "1."], 0: ["0", "0.000", "0e5", "-0", "False"]}
    cells = [(text, value) for value, texts in spellings.items() for text in texts]
    path = write(tmp_path / "a.csv", ["label,c,d", *(f"{text},x,1" for text, _ in cells)])
    assert prepare(path, tmp_path / "out", DENSE).split("train").labels().tolist() == [value for _, value in cells]
    kinds = [pl.Float32, pl.Int8, pl.UInt64, pl.Decimal(5, 2), pl.Boolean]
    for number, series in enumerate([*(pl.Series([1, 0]).cast(kind) for kind in kinds), pl.Series([b"1.0", b"false"])]):
        pl.DataFrame({"label": series, "c": ["x", "y"], "d": [1, 2]}).write_parquet(tmp_path / "a.parquet")
        dataset = prepare(tmp_path / "a.parquet", tmp_path / f"{number}", DENSE)
        assert dataset.split("train").labels().tolist() == [1, 0]
    criteo = "\t".join(["1.0", *["1"] * 13, *["a"] * 26])
    write(tmp_path / "b.txt", [criteo] * 14)
    assert (
        prepare(tmp_path / "b.txt", tmp_path / "kaggle", PrepareConfig(layout="criteo-kaggle")).info["clicks"]["train"]
        == 12
    )


@pytest.mark.parametrize("text", ["", "2", "0.5", "-1", "yes", "nan", "1e-320"])
def test_what_is_no_label(text, tmp_path):
    path = write(tmp_path / "a.csv", ["label,c,d", "1,x,1", f"{text},x,1"])
    with pytest.raises(UserError, match=f"line 3: column label holds {repr(text) if text else 'nothing'}, expected 0"):
        prepare(path, tmp_path / "out", DENSE)


def test_markers_of_missing_values(tmp_path):
    path = write(tmp_path / "a.csv", ["label,c,d,m", r"1,\N,\N,a|\N", "0,x,NULL,NULL", "1,NULL,3,", "0,NA,4,NA|b"])
    config = dataclasses.replace(
        DENSE, categorical=("c", "m"), multi=("m",), cross=("c*d",), null_values=(r"\N", "NULL"), dense_transform="none"
    )
    with pytest.raises(UserError, match=r"line 2: column d holds '\\\\N', expected a finite number"):
        prepare(path, tmp_path / "none", dataclasses.replace(config, null_values=()))
    dataset = prepare(path, tmp_path / "out", config)
    vocabularies = {name: pl.read_parquet(dataset.vocabulary_path(name))["key"].to_list() for name in ("c", "m", "c*d")}
    assert vocabularies == {"c": ["", "x", "NA"], "m": ["a", "NA", "b"], "c*d": ["", "NA\x1f4"]}
    (batch,) = dataset.split("train").batches(9)
    assert batch.dense[:, 0].tolist() == [0, 0, 3, 4]
    ((_, scored),) = open_log(dataset, path).blocks()  # by the model's own options
    assert (scored.dense.tolist(), scored.ids.tolist()) == (batch.dense.tolist(), batch.ids.tolist())
    write(path, ["label,c,d,m", r"1,x,1,a", r"\N,x,1,a"])
    with pytest.raises(UserError, match=r"line 3: column label holds '\\\\N', expected 0 or 1 \(null_values says"):
        prepare(path, tmp_path / "label", config)
    criteo = ["\t".join(["1", *["1"] * 12, r"\N", *["a"] * 25, r"\N"])] * 14
    kaggle = PrepareConfig(layout="criteo-kaggle", null_values=(r"\N",))
    made = prepare(write(tmp_path / "b.txt", criteo), tmp_path / "kaggle", kaggle)
    assert pl.read_parquet(made.vocabulary_path("C26"))["key"].to_list() == [0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n1,x,2\n", "log.csv, line 1, is empty, expected a line with the names of the columns"),
        ("1,x,2\n0,y,3\n", "the first line of .*log.csv is '1,x,2', which looks like data, expected a line with the n"),
        ("\ufeff1,x,0.5\n0,y,3\n", "the first line of .*log.csv is '1,x,0.5', which looks like data"),
        ("label,c,d,c\n1,x,2,y\n", "log.csv has 2 columns named 'c', expected one"),
        ("click,c,d\n1,x,2\n", "no column 'label' in"),
    ],
)
def test_first_lines_that_name_no_columns(text, says, tmp_path):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        prepare(tmp_path / "log.csv", tmp_path / "out", DENSE)
    good = write(tmp_path / "good.csv", ["label,c,d", "1,x,2", "0,y,3"])
    if not text.startswith("click"):  # no label is needed there
        with pytest.raises(UserError, match=says):
            open_log(prepare(good, tmp_path / "good", DENSE), tmp_path / "log.csv")


def test_byte_order_marks(tmp_path):
    text = "label,c,d\n1,x,2\n0,y,3\n"
    for number, data in enumerate(
        (b"\xef\xbb\xbf" + text.encode(), b"\xef\xbb\xbf" + text.replace("label", '"label"').encode())
    ):
        (tmp_path / "log.csv").write_bytes(data)
        assert prepare(tmp_path / "log.csv", tmp_path / f"{number}", DENSE).rows["train"] == 2
    (tmp_path / "log.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text by its byte order mark, expected UTF-8"):
        prepare(tmp_path / "log.csv", tmp_path / "out", DENSE)
