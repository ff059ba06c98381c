"""LIBSVM's and libffm's text, from the log to probabilities."""

import dataclasses
import gzip
import json
import sys

import polars as pl
import pytest

import dqrm
from conftest import tiny
from data_helpers import content, write
from dqrm.cli import main
from dqrm.data import lines
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError

IN_ORDER = {"split": "time", "validation_fraction": 0.2, "test_fraction": 0.2}
ROWS = [
    {"label": n % 2, "0": [str(n % 7)], "3": [str(n % 5), str(10 + n % 3)] if n % 4 else [], "12": [str(n % 2)]}
    for n in range(60)
]


def ffm(rows, label=True):
    return [
        " ".join(
            [str(row["label"])] * label
            + [f"{field}:{index}:1" for field in row if field != "label" for index in row[field]]
        )
        for row in rows
    ]


def keys(dataset):
    return {
        column.name: pl.read_parquet(dataset.vocabulary_path(column.name))["key"].to_list()
        for column in dataset.columns
    }


def test_libffm_is_a_table_of_multi_valued_columns(tmp_path, monkeypatch):
    fields = ("0", "3", "12")
    config = PrepareConfig(layout="libffm", **IN_ORDER)
    dataset = prepare(write(tmp_path / "a.ffm", ffm(ROWS)), tmp_path / "ffm", config)
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    same = prepare(
        tmp_path / "a.parquet", tmp_path / "table", PrepareConfig(categorical=fields, multi=fields, **IN_ORDER)
    )
    assert content(dataset) == content(same)
    assert keys(dataset) == keys(same)
    assert dataset.info["options"]["categorical"] == ["0", "3", "12"]  # by number, whatever comes first
    # However it is parted, spelt, compressed and cut into blocks.
    monkeypatch.setattr(lines, "_BLOCK", 200)
    odd = [line.replace("0:0:1", "00:000:1e0") if n % 2 else line for n, line in enumerate(ffm(ROWS))]
    odd = [line.replace(" ", "\t").replace(":1\t", ":1.0  ") + " " for line in odd]
    odd = [("-1" + line[1:] if line[0] == "0" else "+1" + line[1:]) for line in odd]
    (tmp_path / "b.ffm.gz").write_bytes(gzip.compress("\r\n".join(odd).encode()))
    again = prepare(tmp_path / "b.ffm.gz", tmp_path / "again", config)
    assert (content(again), keys(again)) == (content(dataset), keys(dataset))
    some = prepare(
        tmp_path / "a.ffm", tmp_path / "some", PrepareConfig(layout="libffm", categorical=("3",), **IN_ORDER)
    )
    assert keys(some) == {"3": keys(dataset)["3"]}


def test_libsvm_is_one_column_of_indices(tmp_path):
    text = ["1 3:1 17:1", "0 3:1", "1", "0 5:1.0 3:1"]
    config = PrepareConfig(layout="libsvm", split="time", validation_fraction=0, test_fraction=0)
    dataset = prepare(write(tmp_path / "a.svm", text), tmp_path / "out", config)
    assert keys(dataset) == {"features": ["3", "17", "5"]}
    (batch,) = dataset.split("train").batches(9)
    assert [part.tolist() for part in batch.bags[0]] == [[1, 2, 1, 3, 1], [0, 2, 3, 3]]
    assert batch.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("layout", ["libffm", "libsvm"])
def test_from_the_log_to_probabilities(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def spell(label):
        text = ffm(ROWS, label)
        if layout == "libffm":
            return text
        return [
            " ".join(part.split(":", 1)[-1] if part.count(":") == 2 else part for part in row.split()) for row in text
        ]

    write(tmp_path / "log", spell(True))
    dataset = prepare("log", "data", PrepareConfig(layout=layout, **IN_ORDER))
    config = tiny(max_steps=3)
    if layout == "libsvm":  # one vector has no dot product with another
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, interaction="cat"))
    dqrm.train(dataset, "run", config)
    dqrm.export_run("run", "m.dqrm")
    write(tmp_path / "bare", spell(False))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dqrm", *arguments, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return json.loads(printed.out)

    assert call("eval", "m.dqrm", "data")["rows"] == 12
    for log in ("log", "bare"):
        assert call("predict", "m.dqrm", log, "-o", f"{log}.parquet", "--keep", "label")["rows"] == 60
    read = [pl.read_parquet(f"{log}.parquet") for log in ("log", "bare")]
    assert read[0]["probability"].to_list() == read[1]["probability"].to_list()
    assert read[0]["label"].to_list() == [str(row["label"]) for row in ROWS]
    assert read[1]["label"].to_list() == [None] * 60
    test = dqrm.evaluate(dqrm.load("m.dqrm"), dataset, "test")
    labels = pl.Series([row["label"] for row in ROWS[48:]])
    scored = read[0]["probability"][48:]
    loss = -(labels * scored.log() + (1 - labels) * (1 - scored).log()).mean()
    assert test["log_loss"] == pytest.approx(loss, abs=1e-5)
    with pytest.raises(UserError, match=r"keep names '.*', but of layout lib... only the label can be kept"):
        dqrm.predict("m.dqrm", "log", "p.parquet", dqrm.PredictConfig(keep=("3",)))


@pytest.mark.parametrize(
    ("layout", "line", "says"),
    [
        ("libsvm", "1 3:0.5", "the feature '3:0.5', expected index:1: features are ids, and weights other than 1"),
        ("libsvm", "1 3:1 4:0", "the feature '4:0', expected index:1: features are ids"),
        ("libsvm", "1 3", "the feature '3', expected index:1"),
        ("libsvm", "1 a:1", "the feature 'a:1', expected index:1"),
        ("libsvm", "1 -3:1", "the feature '-3:1', expected index:1"),
        ("libsvm", "1 qid:4 3:1", "the feature 'qid:4', expected index:1"),
        ("libsvm", "1 0:3:1", "the feature '0:3:1', expected index:1"),
        ("libffm", "1 0:3:2", "the feature '0:3:2', expected field:index:1: features are ids"),
        ("libffm", "1 3:1", "the feature '3:1', expected field:index:1"),
        ("libsvm", "2 3:1", "column label holds '2', expected 0 or 1"),
        ("libsvm", "3:1", "column label holds nothing, expected 0 or 1"),
        ("libsvm", "", "an empty line"),
    ],
)
def test_what_is_not_supported_is_told(layout, line, says, tmp_path):
    good = "1 3:1" if layout == "libsvm" else "1 0:3:1"
    write(tmp_path / "log", [good, line, good])
    config = PrepareConfig(layout=layout, split="time", validation_fraction=0, test_fraction=0)
    with pytest.raises(UserError, match=f"line 2: {says}"):
        prepare(tmp_path / "log", tmp_path / "out", config)
    skipped = PrepareConfig(layout=layout, split="time", validation_fraction=0, test_fraction=0, on_error="skip")
    dataset = prepare(tmp_path / "log", tmp_path / "out", skipped)
    assert (dataset.rows["train"], dataset.info["lines_skipped"]) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layout": "libsvm", "categorical": ("3",)}, "categorical is for layout table"),
        ({"layout": "libffm", "categorical": ("user",)}, "categorical has 'user', expected field numbers"),
        ({"layout": "libffm", "dense": ("3",)}, "dense is for layout table"),
        ({"layout": "libffm", "cross": ("1*2",)}, "cross is not for layout libffm"),
        ({"layout": "libsvm", "null_values": ("0",)}, "null_values is not for layout libsvm"),
    ],
)
def test_options_of_other_layouts(fields, says):
    with pytest.raises(ValueError, match=says):
        PrepareConfig(**fields)


def test_a_file_without_a_feature(tmp_path):
    with pytest.raises(UserError, match=r"no feature in .*, expected lines such as '1 0:3:1 1:17:1'"):
        prepare(write(tmp_path / "log", ["1", "0"]), tmp_path / "out", PrepareConfig(layout="libffm"))
