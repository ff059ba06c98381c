"""A run counts the table weights that stale scales clamp, says their share, and warns once."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from conftest import tiny
from dqrm.config import ExchangeConfig
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import QATConfig
from dqrm.training.launch import resume, train
from dqrm.training.state import State
from run_helpers import Killed


def stale(bits=4, **training):
    """Adagrad at a high rate, with a scale of the first step for the whole run."""
    config = tiny(bits, optimizer="adagrad", period=10_000, max_steps=24, eval_every=8, log_every=4, **training)
    return replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))


def run(data, path, config):
    """Lines of the log that warn, lines of metrics.jsonl, the summary."""
    said = []
    train(data, path, config, log=said.append)
    return [line for line in said if "clamped" in line], lines(path), json.loads((path / "summary.json").read_text())


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_stale_scale_is_told_once_with_its_share_and_the_way_out(generated, tmp_path):
    told, metrics, summary = run(generated, tmp_path / "run", stale())
    assert len(told) == 1
    assert "--scale-refresh running_max" in told[0]
    assert "--scale-period" in told[0]
    evaluations = [line["clamped_weights"] for line in metrics if line["kind"] == "evaluation"]
    assert f"{evaluations[0]:.2%}" in told[0]
    assert all(0.001 < share < 1 for share in evaluations)
    assert summary["clamped_weights"] == pytest.approx(sum(evaluations) / len(evaluations))  # of equal intervals
    assert next(line for line in metrics if line["kind"] == "train")["clamped_weights"] < evaluations[0]


def test_without_a_log_it_is_a_python_warning(generated, tmp_path):
    with pytest.warns(UserWarning, match="clamped"):
        train(generated, tmp_path / "run", stale())


@pytest.mark.parametrize("rule", [{}, {"scale_refresh": "running_max"}, {"scale_period": 1}])
def test_a_fresh_scale_clamps_nothing(generated, tmp_path, rule):
    told, metrics, summary = run(generated, tmp_path / "run", replace(stale(), quantization=QATConfig(bits=4, **rule)))
    assert told == []
    assert {line["clamped_weights"] for line in metrics if line["kind"] != "calibration"} == {0.0}
    assert summary["clamped_weights"] == 0


def test_unquantized_tables_have_no_share(generated, tmp_path):
    told, metrics, summary = run(generated, tmp_path / "run", stale(bits=32))
    assert (told, summary["clamped_weights"]) == ([], None)
    assert not any("clamped_weights" in line for line in metrics)


def test_counts_and_warning_outlive_a_resume_and_are_the_sum_of_the_ranks(generated, tmp_path):
    whole = run(generated, tmp_path / "whole", stale())

    def kill(text):
        if "step 16" in text:
            raise Killed

    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", stale(), log=kill)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(tmp_path / "cut", log=said.append)
    assert not any("clamped" in text for text in said)  # it was told before
    assert [line.get("clamped_weights") for line in lines(tmp_path / "cut")] == [
        line.get("clamped_weights") for line in whole[1]
    ]
    exact = ExchangeConfig(simulate_ranks=2, table_codec="fp32", mlp_codec="fp32")
    ranks = run(generated, tmp_path / "ranks", replace(stale(), exchange=exact))
    assert ranks[2]["clamped_weights"] == pytest.approx(whole[2]["clamped_weights"], rel=0.05)


def test_a_state_without_counts_is_read():
    """As it was written before they were counted; with them, what JSON gives is what was written."""
    state = State(step=3)
    state.clamping.add([(2, 10), (1, 10)])
    content = json.loads(json.dumps(asdict(state)))
    assert State(**content) == state
    del content["clamping"]
    assert State(**content).clamping.share is None


@pytest.mark.parametrize(("clamped", "warned"), [(10, False), (11, True)])
def test_one_in_a_thousand_is_not_many_yet(clamped, warned):
    clamps = Clamps()
    clamps.counter(10_000, torch.device("cpu")).add_(clamped)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        clamps.check()
        clamps.check()  # once
    assert len(told) == warned
