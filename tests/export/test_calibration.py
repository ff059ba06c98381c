"""Calibration after training: its fit, and that every format and every way to score applies it."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import dqrm
from cli_helpers import command
from conftest import tiny
from dqrm import Artifact, ExportConfig, PrepareConfig, PTQConfig, UserError
from dqrm.config import ModelConfig
from dqrm.data.subsampling import negative_weight
from dqrm.export.calibrate import fit
from dqrm.export.formats import score_file
from dqrm.models.calibration import Calibration
from dqrm.training.metrics import click_metrics
from export.test_base_rate import RUNTIMES, rewritten

METHODS = ("platt", "isotonic")
SHARE = 0.5


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A log of weighted rows whose negatives were subsampled, a run that is far too sure of itself, and its files."""
    folder = tmp_path_factory.mktemp("calibrated")
    random = np.random.default_rng(0)
    users, weights = random.integers(0, 200, 8000), random.integers(1, 3, 8000)
    clicks = random.random(8000) < 0.05 + 0.3 * (users % 7 == 0)
    frame = {"click": clicks.astype(int), "user": users, "price": random.random(8000), "weight": weights}
    pl.DataFrame(frame).write_parquet(folder / "log.parquet")
    config = PrepareConfig(
        label="click", categorical=("user",), dense=("price",), weight="weight", subsample_negatives=SHARE,
        validation_fraction=0.3,
    )  # fmt: skip
    dataset = dqrm.prepare(folder / "log.parquet", folder / "data", config)
    dqrm.train(dataset, folder / "run", tiny(optimizer="adagrad", epochs=6))
    dqrm.export_run(folder / "run", folder / "m.dqrm", ExportConfig("last"))
    for method in METHODS:
        dqrm.export_run(folder / "run", folder / f"{method}.dqrm", ExportConfig("last", calibrate=method))
    return folder


def plain(calibration, logits):
    """The calibrated logits, in float64."""
    if calibration.method == "platt":
        return calibration.slope * logits + calibration.values[0]
    knots, values = np.array(calibration.knots), np.array(calibration.values)
    outside = np.minimum(logits - knots[0], 0) + np.maximum(logits - knots[-1], 0)
    return np.interp(logits, knots, values) + outside


class Known:
    """A model whose logits are known, of a dataset."""

    def __init__(self, monkeypatch, logits):
        monkeypatch.setattr("dqrm.export.calibrate.predict_logits", lambda *arguments: np.float32(logits))


def fitted(monkeypatch, method, folder, distort):
    """A calibration of logits that are a function of the true ones, and both: of the validation rows."""
    dataset = dqrm.Dataset(folder / "data")
    labels = np.asarray(dataset.split("validation").labels(), float)
    random = np.random.default_rng(3)
    logits = random.normal(size=len(labels)) + labels
    return fit(method, Known(monkeypatch, distort(logits)), dataset), distort(logits), labels, dataset


def weighted(dataset, labels):
    return np.asarray(dataset.split("validation").weights()) * np.where(labels > 0, 1, negative_weight(SHARE))


def test_platt_scaling_is_the_maximum_of_the_likelihood(shipped, monkeypatch):
    found, logits, labels, dataset = fitted(monkeypatch, "platt", shipped, lambda true: 3 * true - 1)
    weights = weighted(dataset, labels)
    probability = 1 / (1 + np.exp(-plain(found, logits)))
    residual = weights * (probability - labels)
    # The gradient by offset is 0, that by slope is the penalty's.
    assert residual.sum() == pytest.approx(0, abs=1e-2)
    assert (residual * logits).sum() == pytest.approx(-found.slope, abs=1e-2)
    assert (found.rows, found.split, found.fingerprint) == (len(labels), "validation", dataset.fingerprint)


def test_isotonic_regression_gives_each_bin_its_click_rate(shipped, monkeypatch):
    found, logits, labels, dataset = fitted(monkeypatch, "isotonic", shipped, lambda true: np.sign(true) * true**2)
    weights = weighted(dataset, labels)
    assert 10 < len(found.knots) <= 50
    calibrated = plain(found, logits)
    order = np.argsort(calibrated)
    for rows in np.array_split(order, 5):
        rate = np.average(labels[rows], weights=weights[rows])
        assert np.average(1 / (1 + np.exp(-calibrated[rows])), weights=weights[rows]) == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_that_fall_as_clicks_rise_are_refused(shipped, monkeypatch, method):
    with pytest.raises(UserError, match=f"calibrate is '{method}', but .* falls as the model's predictions rise"):
        fitted(monkeypatch, method, shipped, lambda true: -true)
    with pytest.raises(UserError, match="the model predicts inf on validation: its training diverged"):
        fitted(monkeypatch, method, shipped, lambda true: true * np.inf)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_computed_is_the_function(shipped, method):
    found = Artifact.open(shipped / f"{method}.dqrm").calibration
    logits = np.linspace(-12, 12, 301)
    calibrated = found(torch.tensor(logits, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(calibrated, plain(found, logits), atol=1e-5, rtol=1e-5)
    assert (np.diff(calibrated) >= -1e-6).all()
    assert found(torch.tensor([torch.nan])).isnan().all()
    assert found(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_format_applies_it(shipped, suffix, method, tmp_path):
    pytest.importorskip(RUNTIMES[suffix], reason=f"{RUNTIMES[suffix]} is not installed")
    batch = next(iter(dqrm.Dataset(shipped / "data").split("test").batches(50)))
    calibration = Artifact.open(shipped / f"{method}.dqrm").calibration
    wanted = calibration(score_file(shipped / "m.dqrm")(batch))
    dqrm.export_run(shipped / "run", tmp_path / f"a{suffix}", ExportConfig("last", calibrate=method))
    torch.testing.assert_close(score_file(tmp_path / f"a{suffix}")(batch), wanted, rtol=0, atol=1e-5)
    if suffix == ".onnx":
        dqrm.export_run(shipped / f"{method}.dqrm", tmp_path / f"b{suffix}")
        torch.testing.assert_close(score_file(tmp_path / f"b{suffix}")(batch), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_of_probabilities_is_that_of_clicks(shipped, method, tmp_path):
    before, after = (dqrm.evaluate(shipped / f"{name}.dqrm", shipped / "data", "validation") for name in ("m", method))
    assert after["ne"] < before["ne"] - 0.02
    assert after["calibration"] == pytest.approx(1, abs=0.02)
    assert after["auc"] > before["auc"] - 0.02
    dqrm.predict(shipped / f"{method}.dqrm", shipped / "log.parquet", tmp_path / "p.parquet")
    probabilities = pl.read_parquet(tmp_path / "p.parquet")["probability"].to_numpy()
    rows = pl.read_parquet(shipped / "log.parquet")
    np.testing.assert_array_equal(dqrm.load(shipped / f"{method}.dqrm").score(rows), probabilities)
    found = click_metrics(rows["click"].to_numpy(), np.log(probabilities / (1 - probabilities)))
    assert found["calibration"] == pytest.approx(1, abs=0.1)


def test_onnx_is_evaluated_as_the_artifact(shipped, tmp_path):
    pytest.importorskip("onnxruntime")
    dqrm.export_run(shipped / "isotonic.dqrm", tmp_path / "m.onnx")
    found, wanted = (dqrm.evaluate(path, shipped / "data") for path in (tmp_path / "m.onnx", shipped / "isotonic.dqrm"))
    assert found.pop("base_rate") == wanted.pop("base_rate")
    assert found == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="the model is calibrated, on the log's own click rate; leave out"):
        dqrm.evaluate(tmp_path / "m.onnx", shipped / "data", correct_subsampling=False)


def test_a_model_quantized_after_training_is_calibrated(generated, tmp_path):
    dqrm.train(generated, tmp_path / "run", tiny(32, max_steps=50))
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(calibrate="platt"), PTQConfig(bits=4))
    found = dqrm.evaluate(tmp_path / "m.dqrm", generated, "validation")
    assert found["calibration"] == pytest.approx(1, abs=1e-3)


def test_the_command_line_tells_and_refuses(shipped, tmp_path, capsys):
    run, file = shipped / "run", tmp_path / "m.dqrm"
    code, out, err = command(capsys, "export", run, "-o", file, "--calibrate", "platt")
    assert not code, err
    assert "Probabilities are calibrated by Platt scaling" in out
    assert "validation rows" in " ".join(command(capsys, "info", file)[1].split())
    for words, told in (
        (("export", run, "-o", file, "--calibrate", "platt", "--no-correct-subsampling"), "use one of them"),
        (("export", file, "-o", tmp_path / "m.pt2", "--calibrate", "platt"), "starts from a run folder"),
        (("export", file, "-o", tmp_path / "m.pt2", "--no-correct-subsampling"), "m.dqrm is calibrated"),
        (("eval", file, shipped / "data", "--no-correct-subsampling"), "the model is calibrated"),
    ):
        code, _, err = command(capsys, *words)
        assert code, words
        assert told in " ".join(err.split()), words
    assert not (tmp_path / "m.pt2").exists()


def test_a_split_of_one_label_cannot_be_calibrated_on(tmp_path):
    frame = pl.DataFrame({"click": [0, 1] * 45 + [0] * 20, "user": [n % 4 for n in range(110)]})
    frame.write_csv(tmp_path / "log.csv")
    config = PrepareConfig(label="click", categorical=("user",), split="time", validation_fraction=0.05)
    dqrm.prepare(tmp_path / "log.csv", tmp_path / "data", config)
    model = ModelConfig(interaction="cat", top_mlp=(1,))
    dqrm.train(tmp_path / "data", tmp_path / "run", replace(tiny(max_steps=1), model=model))
    with pytest.raises(UserError, match=r"the validation split of .* has 6 rows and 0 clicks; expected rows of both"):
        dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(calibrate="isotonic"))
    assert not (tmp_path / "m.dqrm").exists()


def test_only_calibrated_files_need_a_newer_reader(shipped):
    assert Artifact.open(shipped / "m.dqrm").container.version == 1
    assert "calibration" not in Artifact.open(shipped / "m.dqrm").content
    assert Artifact.open(shipped / "platt.dqrm").container.version == 5


@pytest.mark.parametrize("wrong", [{}, 3, {"slope": 0.0}, {"slope": -1.0}, {"slope": "1"}, {"method": "beta"},
                                   {"values": [1.0, 2.0]}, {"knots": [1.0, 1.0], "method": "isotonic"},
                                   {"values": [1e30]}, {"rows": "many"}, {"split": 1}, {"more": 1}])  # fmt: skip
def test_a_header_that_describes_no_calibration_is_refused(shipped, tmp_path, wrong):
    def edit(content):
        content["calibration"] = {**content["calibration"], **wrong} if wrong and wrong != 3 else wrong

    with pytest.raises(UserError, match="damaged"):
        Artifact.open(rewritten(shipped / "platt.dqrm", tmp_path / "bad.dqrm", edit))


def test_the_header_is_what_it_was_made_of(shipped):
    for method in METHODS:
        found = Artifact.open(shipped / f"{method}.dqrm").calibration
        assert Calibration.of(json.loads(json.dumps({"calibration": found.header()}))) == found
    assert Calibration.of({}) is None
