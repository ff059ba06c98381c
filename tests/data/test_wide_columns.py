"""A raw timestamp among the dense columns: `prepare` warns of it, and a diverged training names it."""

import json
import sys

import numpy as np
import polars as pl
import pytest

import dqrm
from conftest import tiny
from dqrm.cli import main
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError

SPAN = 1_700_000_000  # seconds before and after some moment


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    random = np.random.default_rng(0)
    frame = pl.DataFrame({"label": random.integers(0, 2, 200), "c": ["a", "b"] * 100, "small": [0.5, -99.0] * 100})
    time = np.append(random.uniform(-SPAN, SPAN, 199), SPAN)
    frame.with_columns(pl.Series("time", time)).write_parquet(folder / "log.parquet")
    config = PrepareConfig(categorical=("c",), dense=("small", "time"), dense_transform="none")
    return dqrm.prepare(folder / "log.parquet", folder / "data", config)


def refused(dataset, run):
    with pytest.raises(UserError) as caught:
        dqrm.train(dataset, run, tiny(bits=32, batch_size=16, epochs=5))
    return str(caught.value)


def test_the_column_and_the_transformation_are_named(data, tmp_path):
    said = refused(data, tmp_path / "run")
    assert said.startswith("training diverged: the loss is ")
    assert "values of the dense column time (up to 1.7e+09) are too large: prepare the data with" in said
    assert "dense_transform log1p (now none)" in said
    assert "lower learning_rate (now 0.1)" in said
    assert "small" not in said


def test_so_in_a_dataset_that_did_not_note_it(data, tmp_path):
    info = json.loads((data.path / "dataset.json").read_text())
    assert info["dense_largest"] == pytest.approx([99, SPAN])
    del info["dense_largest"]
    old = Dataset(data.path)
    old.info.pop("dense_largest")
    assert old.wide(100) == {"time": pytest.approx(SPAN)}
    assert "column time (up to 1.7e+09)" in refused(old, tmp_path / "run")


def test_transformed_it_trains(data, tmp_path):
    config = PrepareConfig(categorical=("c",), dense=("small", "time"))
    dataset = dqrm.prepare(data.path.parent / "log.parquet", tmp_path / "data", config)
    assert dataset.wide(100) == {}
    dqrm.train(dataset, tmp_path / "run", tiny(batch_size=16, max_steps=4))


@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_prepare_warns(transform, data, tmp_path, monkeypatch, capsys):
    log = str(data.path.parent / "log.parquet")
    flags = ["--dense", "small,time", "--dense-transform", transform, "--json"]
    monkeypatch.setattr(sys, "argv", ["dqrm", "prepare", log, "-o", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"]["train"] == 160
    told = " ".join(printed.err.split())
    warned = "Warning: dense column time holds values up to 1.7e+09" in told and "--dense-transform log1p" in told
    assert warned == (transform == "none")
    assert "column small" not in told
