"""The demo on small data: it measures what it says it measures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from conftest import tiny
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.studies import demo


def test_the_demo(tmp_path, capsys):
    folder = tmp_path / "demo"
    result = demo.run_demo(folder, log=GenerateConfig(rows=1500), config=tiny(epochs=3))
    shown = capsys.readouterr().out
    assert "GENERATED" in shown
    assert "ceiling" in shown
    assert shown.count("INT4") == 4  # three epochs and the test line
    assert shown.count("FP32") == 4 + shown.count(demo.PAPER)
    paper = result["variants"][demo.PAPER]
    assert [line["epoch"] for line in paper["evaluations"]] == [1, 2, 3, 4, 5]
    assert f"{paper['test']['auc']:.4f}" in shown
    for name, bits in (("FP32", 32), ("INT4", 4)):
        variant = result["variants"][name]
        assert [line["epoch"] for line in variant["evaluations"]] == [1, 2, 3]
        assert variant["config"]["quantization"]["bits"] == bits
        assert f"{variant['test']['auc']:.4f}" in shown
    stored = {name: result["variants"][name]["stored_bytes"]["total"] for name in ("FP32", "INT4")}
    assert stored["INT4"] < stored["FP32"] / 3.9  # 8 bits: the MLP, and all tables of a log this small
    assert json.loads((folder / "demo.json").read_text()) == result
    assert result["artifact"]["test"] == result["variants"]["INT4"]["test"]
    assert (folder / "int4.dqrm").stat().st_size == result["artifact"]["bytes"]
    assert "int4.dqrm, packed" in shown
    # The ceiling belongs to the rows of the split: the truth file is in the order of the log.
    dataset, truth = Dataset(folder / "data"), np.load(folder / "log.truth.npy")
    train, test = dataset.rows["train"], dataset.rows["test"]
    lines = (folder / "log.txt").read_text().splitlines()
    labels = np.array([int(line.split("\t")[0]) for line in lines])
    assert labels[train : train + test].tolist() == dataset.split("test").labels().tolist()
    assert result["ceiling"]["test"] == roc_auc_score(labels[train : train + test], truth[train : train + test])
    # A second demo replaces the first.
    capsys.readouterr()
    again = demo.run_demo(folder, True, log=GenerateConfig(rows=1500), config=tiny(epochs=3))
    assert json.loads(capsys.readouterr().out) == again
    assert again["variants"]["INT4"]["test"] == result["variants"]["INT4"]["test"]


def test_the_demo_does_not_write_over_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no demo"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_demo_compares_the_recipe_in_two_widths_with_the_papers():
    (_, fp32), (_, int4), (_, paper) = demo.variants_of(demo.CONFIG).values()
    assert replace(fp32, quantization=int4.quantization) == int4
    assert (fp32.quantization.bits, int4.quantization) == (32, Config().quantization)
    assert replace(int4.training, threads=0, patience=5) == replace(Config().training, patience=5)
    assert int4.optimizer == Config().optimizer
    shipped = Config.load(Path(__file__).parents[2] / "configs" / "kaggle_fp32.yaml")
    same = replace(shipped.training, eval_every=0, threads=paper.training.threads)
    assert (paper.quantization, paper.optimizer, paper.training) == (shipped.quantization, shipped.optimizer, same)
