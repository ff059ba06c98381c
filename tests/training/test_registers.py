"""Metrics and optimizers that are registered from outside the package, and the help that names those within."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conftest import tiny
from dqrm import Metric, SparseOptimizer
from dqrm.config import Config, ExchangeConfig, OptimizerConfig, TrainingConfig
from dqrm.errors import UserError
from dqrm.info import print_summary
from dqrm.kernels import sum_duplicates
from dqrm.options import field_help
from dqrm.quant.config import ACTIVATION_QUANTIZERS, QUANTIZERS, QATConfig
from dqrm.studies.folder import Result
from dqrm.studies.tables import summarize
from dqrm.training.launch import resume, train
from dqrm.training.metrics import METRICS, click_metrics, legend
from dqrm.training.optimizers import OPTIMIZERS
from dqrm.training.run import Run
from dqrm.training.selection import check_selection
from run_helpers import Killed, assert_resumes, killer


def brier(scores):
    return scores.mean((scores.probabilities - scores.labels) ** 2)


@pytest.fixture
def outside_metric(monkeypatch):
    monkeypatch.setitem(METRICS, "brier", Metric(brier, higher_is_better=False, legend="mean squared error"))


def test_a_metric_from_outside_is_computed_selected_by_and_shown(generated, tmp_path, capsys, outside_metric):
    said = []
    summary = train(generated, tmp_path / "run", tiny(select_by="brier", eval_every=5, epochs=3), log=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["brier"] for line in lines if line["kind"] == "evaluation"}
    assert summary["best"]["step"] == min(values, key=values.get)
    assert summary["selection"] == "best validation brier"
    assert f"brier {summary['best']['metrics']['brier']:.4f}" in " ".join(said)
    print_summary(tmp_path / "run", summary)
    shown = capsys.readouterr().out
    assert f"{summary['test']['brier']:.5f}" in shown
    assert "brier: mean squared error" in " ".join(shown.split())
    study = summarize({"a": {1: Result.read(tmp_path / "run")}}, "a")
    assert study["a"]["test"]["brier"]["mean"] == summary["test"]["brier"]


def test_a_run_with_a_metric_and_an_optimizer_that_are_not_here_opens_but_does_not_go_on(
    generated, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "brier", Metric(brier, higher_is_better=False))
        patch.setitem(OPTIMIZERS, "toy", OPTIMIZERS["sgd"])
        with pytest.raises(Killed):
            train(generated, tmp_path / "run", tiny(optimizer="toy", select_by="brier", eval_every=3),
                  progress=killer(9))  # fmt: skip
    assert "brier" in Run.open(tmp_path / "run").load_model()[1]["best"]["metrics"]
    with pytest.raises(UserError, match="optimizer: got 'toy', expected one of sgd, adagrad, rowwise_adagrad"):
        resume(tmp_path / "run")


def test_a_metric_against_numpy(outside_metric):
    random = np.random.default_rng(0)
    labels, logits, weights = random.integers(0, 2, 99), random.normal(size=99), random.random(99) + 0.1
    errors = (1 / (1 + np.exp(-logits)) - labels) ** 2
    assert click_metrics(labels, logits)["brier"] == pytest.approx(errors.mean())
    assert click_metrics(labels, logits, weights)["brier"] == pytest.approx(np.average(errors, weights=weights))
    assert click_metrics(labels[:0], logits[:0])["brier"] is None


def test_a_metric_that_is_not_defined_is_none(monkeypatch):
    monkeypatch.setitem(METRICS, "odd", Metric(lambda scores: float("nan"), higher_is_better=True))
    monkeypatch.setitem(METRICS, "grouped", Metric(lambda scores: 1.0, higher_is_better=True, needs_group=True))
    labels, logits = np.array([0, 1]), np.zeros(2)
    assert click_metrics(labels, logits)["odd"] is None
    assert "grouped" not in click_metrics(labels, logits)
    assert click_metrics(labels, logits, groups=np.zeros(2, int))["grouped"] == 1.0


def test_select_by_is_held_to_the_register(generated, tmp_path, monkeypatch):
    for name in ("acu", "calibration", "gauc_coverage", "rows"):
        with pytest.raises(UserError, match=f"select_by: got '{name}', expected one of auc, log_loss, accuracy, ne"):
            train(generated, tmp_path / "run", tiny(select_by=name))
    monkeypatch.setitem(METRICS, "mine", Metric(lambda scores: 1.0, higher_is_better=True, needs_group=True))
    with pytest.raises(UserError, match=r"select_by is mine, but .* has no group column"):
        check_selection(tiny(select_by="mine"), generated)
    assert not (tmp_path / "run").exists()


class RowSign(SparseOptimizer):
    """A toy: each row steps by the sign of its gradient, over the root of how often it has stepped."""

    def __init__(self, params, lr, l2=0.0, seed=0):
        super().__init__(params, lr, l2, seed)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["steps_of_row"] = torch.zeros(len(weight), 1)

    def _update(self, weight, rows, values, group):
        rows, values = sum_duplicates(rows, values)
        counts = self.state[weight]["steps_of_row"]
        counts[rows] += 1
        self._add(weight, rows, values.sign() / counts[rows].sqrt(), -group["lr"])


@pytest.fixture
def outside_optimizer(monkeypatch):
    def build(tables, others, config, seed):
        return RowSign(tables, config.learning_rate / 10, seed=seed), torch.optim.AdamW(others, config.learning_rate)

    monkeypatch.setitem(OPTIMIZERS, "row_sign", build)


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_optimizer_from_outside_trains_resumes_and_exchanges(generated, tmp_path, outside_optimizer, ranks):
    base = tiny(checkpoint_every=4, max_steps=20, callbacks=("redraw_tables:min_rows=30",))
    config = Config(base.model, base.quantization, OptimizerConfig("row_sign", 0.01), base.training,
                    ExchangeConfig(ranks))  # fmt: skip
    assert_resumes(generated, tmp_path, config, 9)


def test_an_unknown_optimizer_is_refused_before_any_work(generated, tmp_path):
    with pytest.raises(UserError, match="optimizer: got 'adamw', expected one of sgd, adagrad, rowwise_adagrad"):
        train(generated, tmp_path / "run", tiny(optimizer="adamw"))
    assert not (tmp_path / "run").exists()


def test_help_names_all_that_is_registered():
    for cls, field, names in (
        (OptimizerConfig, "optimizer", OPTIMIZERS),
        (QATConfig, "quantizer", QUANTIZERS),
        (QATConfig, "activation_quantizer", ACTIVATION_QUANTIZERS),
        (TrainingConfig, "select_by", [name for name, m in METRICS.items() if m.higher_is_better is not None]),
    ):
        for name in names:
            assert f"{name}" in field_help(cls)[field], name


def test_ne_and_calibration_are_explained_where_they_are_shown(generated, tmp_path):
    from dqrm.cli import cli

    train(generated, tmp_path / "run", tiny(max_steps=3))
    for words in (["info", tmp_path / "run"], ["eval", tmp_path / "run", generated.path]):
        shown = " ".join(CliRunner().invoke(cli, [str(word) for word in words]).output.split())
        assert "ne: normalized entropy" in shown
        assert "calibration: predicted over observed clicks" in shown
    assert legend(["auc", "unknown"]) == ""
