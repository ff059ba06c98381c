"""Metrics against their definitions, and where they are not defined."""

import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from dqrm.training.metrics import calibration_curve, click_metrics, roc_auc


def test_against_the_definitions():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 300), random.standard_normal(300).astype(np.float32).round(1)
    found = click_metrics(labels, logits)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    rate = labels.mean()
    positive, negative = logits[labels == 1][:, None], logits[labels == 0][None]
    auc = ((positive > negative) + 0.5 * (positive == negative)).mean()  # ties count half
    assert found["rows"] == 300
    assert found["auc"] == pytest.approx(auc, abs=1e-12)
    assert found["log_loss"] == pytest.approx(loss, abs=1e-9)
    assert found["accuracy"] == pytest.approx(((p > 0.5) == labels).mean(), abs=1e-12)
    assert found["ne"] == pytest.approx(loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)), abs=1e-9)
    assert found["calibration"] == pytest.approx(p.sum() / labels.sum(), abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("digits", [0, 1, 7])  # from many ties to none
def test_auc_and_log_loss_are_those_of_scikit_learn(weighted, digits):
    random = np.random.default_rng(digits)
    labels = random.integers(0, 2, 5000)
    logits = (random.standard_normal(5000) * 4 + labels).astype(np.float32).round(digits)
    weights = 10.0 ** random.uniform(-3, 3, 5000) if weighted else None
    found = click_metrics(labels, logits, weights)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights), abs=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(labels, p, sample_weight=weights), rel=1e-12)


def test_auc_of_huge_weights_and_of_logits_that_are_not_numbers():
    labels, logits = np.array([1, 0, 1, 0]), np.array([3.0, 1.0, 0.0, 2.0], np.float32)
    assert roc_auc(labels, logits, np.full(4, 1e300)) == 0.5
    assert math.isnan(roc_auc(labels, np.array([0, 1, math.nan, 2], np.float32)))
    assert click_metrics(labels, np.array([0, 1, math.nan, 2], np.float32))["auc"] is None


def test_metrics_import_neither_scikit_learn_nor_scipy():
    code = (
        "import numpy, sys; from dqrm.training.metrics import click_metrics; "
        "click_metrics(numpy.arange(4) % 2, numpy.arange(4.)); print({'sklearn', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_predicting_the_rate_has_normalized_entropy_and_calibration_1():
    labels = np.array([1, 0, 0, 0])
    found = click_metrics(labels, np.full(4, math.log(0.25 / 0.75)))
    assert found["ne"] == pytest.approx(1)
    assert found["calibration"] == pytest.approx(1)
    assert found["auc"] == 0.5


def test_one_class_and_no_rows_are_told_as_none():
    assert click_metrics(np.ones(3), np.zeros(3))["auc"] is None
    assert click_metrics(np.zeros(3), np.zeros(3))["calibration"] is None
    assert click_metrics(np.zeros(0), np.zeros(0)) == {
        "rows": 0, "auc": None, "log_loss": None, "accuracy": None, "ne": None, "calibration": None,
    }  # fmt: skip


def test_extreme_logits_stay_finite():
    found = click_metrics(np.array([0, 1, 0, 1]), np.array([1e4, -1e4, -1e4, 1e4], np.float32))
    assert all(math.isfinite(value) for value in found.values())


def test_a_calibration_curve_has_bins_of_equal_rows():
    random = np.random.default_rng(0)
    logits = random.permutation(np.linspace(-3, 3, 1000)).astype(np.float32)
    labels = (random.random(1000) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    curve = calibration_curve(labels, logits)
    order = np.argsort(logits).reshape(20, 50)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert curve["rows"] == [50] * 20
    assert curve["predicted"] == pytest.approx(probabilities[order].mean(1), rel=1e-5)
    assert curve["clicked"] == pytest.approx(labels[order].mean(1), rel=1e-5)


def test_a_calibration_curve_weighs_rows_and_keeps_ties_together():
    labels, logits = np.array([1, 0, 1, 0]), np.array([0.0, 0.0, 0.0, 2.0], np.float32)
    curve = calibration_curve(labels, logits, np.array([3.0, 1.0, 0.0, 2.0]), bins=4)
    assert curve == {"rows": [4, 2], "predicted": [0.5, 0.880797], "clicked": [0.75, 0]}
    assert calibration_curve(labels[:0], logits[:0]) == {"rows": [], "predicted": [], "clicked": []}
    assert calibration_curve(labels, logits, np.zeros(4))["rows"] == []
    assert len(calibration_curve(np.ones(1), np.zeros(1, np.float32))["rows"]) == 1
