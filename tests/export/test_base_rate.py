"""Models of logs whose negatives were subsampled predict, and are evaluated, on the click rate of the log itself."""

import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch

import dqrm
from cli_helpers import command
from conftest import tiny
from dqrm import Artifact, ExportConfig, PrepareConfig, PTQConfig, Run, UserError
from dqrm.data.subsampling import logit_offset, negative_weight
from dqrm.export.formats import score_file
from dqrm.training.metrics import click_metrics
from export.test_fuzz import parts, sealed

SHARE, RATE = 0.9, 0.04
KEPT = 1 - SHARE
SAMPLED = ExportConfig(correct_subsampling=False)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A log of few clicks, prepared with subsample_negatives, an FP32 run, and its artifacts, corrected and not."""
    folder = tmp_path_factory.mktemp("rare")
    random = np.random.default_rng(0)
    users = random.integers(0, 5, 20_000)
    clicks = random.random(20_000) < RATE * (users + 1) / 3
    pl.DataFrame({"click": clicks.astype(int), "user": users, "price": random.random(20_000)}).write_parquet(
        folder / "log.parquet"
    )
    config = PrepareConfig(label="click", categorical=("user",), dense=("price",), subsample_negatives=SHARE)
    dataset = dqrm.prepare(folder / "log.parquet", folder / "data", config)
    dqrm.train(dataset, folder / "run", tiny(32, epochs=8))
    dqrm.export_run(folder / "run", folder / "m.dqrm")
    dqrm.export_run(folder / "run", folder / "sampled.dqrm", SAMPLED)
    return folder


def printed(capsys, *arguments):
    """Standard output and standard error of a command that succeeds."""
    code, out, err = command(capsys, *arguments)
    assert not code, err
    return out, " ".join(err.split())


def probabilities(shipped, name):
    dqrm.predict(shipped / name, shipped / "log.parquet", shipped / "p.parquet")
    return pl.read_parquet(shipped / "p.parquet")["probability"].to_numpy().astype(float)


def test_predictions_are_at_the_click_rate_of_the_log(shipped):
    observed = pl.read_parquet(shipped / "log.parquet")["click"].mean()
    corrected, sampled = probabilities(shipped, "m.dqrm"), probabilities(shipped, "sampled.dqrm")
    assert corrected.mean() == pytest.approx(observed, rel=0.25)
    assert sampled.mean() > 4 * observed
    np.testing.assert_allclose(corrected, sampled / (sampled + (1 - sampled) / KEPT), rtol=1e-5)


# What runs a file of each kind, where it is no dependency of ours.
RUNTIMES = {".dqrm": "torch", ".onnx": "onnxruntime", ".pt2": "torch", ".pte": "executorch"}


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("ptq", [None, PTQConfig(bits=8)])
def test_every_format_adds_the_same_to_the_logit(shipped, suffix, ptq, tmp_path):
    pytest.importorskip(RUNTIMES[suffix], reason=f"{RUNTIMES[suffix]} is not installed")
    batch = next(iter(dqrm.Dataset(shipped / "data").split("test").batches(50)))
    logits = {}
    for correct in (True, False):
        path = tmp_path / f"{correct}{suffix}"
        found = dqrm.export_run(shipped / "run", path, ExportConfig(correct_subsampling=correct), ptq)
        assert found["subsampling"] == {"subsample_negatives": SHARE, "corrected": correct}
        logits[correct] = score_file(path)(batch)
    torch.testing.assert_close(logits[True], logits[False] + math.log(KEPT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [suffix for suffix in RUNTIMES if suffix != ".dqrm"])
def test_an_artifact_is_written_in_other_formats_as_asked(shipped, suffix, tmp_path):
    pytest.importorskip(RUNTIMES[suffix], reason=f"{RUNTIMES[suffix]} is not installed")
    batch = next(iter(dqrm.Dataset(shipped / "data").split("test").batches(50)))
    made, wanted = tmp_path / f"m{suffix}", score_file(shipped / "m.dqrm")(batch)
    for source in ("m.dqrm", "sampled.dqrm"):
        dqrm.export_run(shipped / source, made)
        torch.testing.assert_close(score_file(made)(batch), wanted)
    dqrm.export_run(shipped / "m.dqrm", made, SAMPLED)
    torch.testing.assert_close(score_file(made)(batch), score_file(shipped / "sampled.dqrm")(batch))


def test_checkpoint_and_files_are_evaluated_alike(shipped, tmp_path):
    model, data = Run.open(shipped / "run").load_model()[0], shipped / "data"
    of_run = dqrm.evaluate(model, data, "test")
    assert of_run == dqrm.evaluate(dqrm.load(shipped / "m.dqrm"), data, "test")
    assert of_run["base_rate"] == "true"
    assert of_run["calibration"] == pytest.approx(1, abs=0.4)
    as_trained = dqrm.evaluate(model, data, "test", correct_subsampling=False)
    for name in ("m.dqrm", "sampled.dqrm"):
        assert as_trained == dqrm.evaluate(dqrm.load(shipped / name), data, "test", correct_subsampling=False)
    assert as_trained == {**Run.open(shipped / "run").summary["test"], "base_rate": "sampled"}
    assert as_trained["auc"] == pytest.approx(of_run["auc"], abs=1e-4)  # but for rounding of the sum
    assert of_run["log_loss"] < as_trained["log_loss"] / 2
    # What a file without the correction predicts is that much too high, and evaluation does not hide it.
    assert dqrm.evaluate(dqrm.load(shipped / "sampled.dqrm"), data, "test")["calibration"] > 3


def test_the_figures_are_those_of_the_log_before_negatives_were_dropped(shipped):
    random = np.random.default_rng(1)
    labels, logits = (random.random(400) < 0.3).astype(np.uint8), random.standard_normal(400).astype(np.float32)
    found = click_metrics(labels, logits, negative_weight=8.0)
    repeats = np.where(labels == 1, 1, 8)
    wanted = click_metrics(np.repeat(labels, repeats), np.repeat(logits, repeats))
    assert found["rows"] == 400
    assert found["auc"] == click_metrics(labels, logits)["auc"]
    assert found == pytest.approx({**wanted, "rows": 400})


def test_the_correction_is_the_formula():
    p = np.linspace(0.001, 0.999, 50)
    moved = np.log(p / (1 - p)) + logit_offset(0.875)
    np.testing.assert_allclose(1 / (1 + np.exp(-moved)), p / (p + (1 - p) / 0.125))
    assert negative_weight(0.875) == 8


def test_the_command_line_says_which_base_rate(shipped, tmp_path, capsys):
    run, data, log = shipped / "run", shipped / "data", shipped / "log.parquet"
    for switch, told in (
        ("--correct-subsampling", "are on the true base rate"),
        ("--no-correct-subsampling", "NOT on"),
    ):
        file = tmp_path / "m.dqrm"
        for out in (
            printed(capsys, "export", run, "-o", file, switch)[0],
            printed(capsys, "info", file)[0],
            printed(capsys, "predict", file, log, "-o", tmp_path / "p.csv")[1],
        ):
            assert f"Probabilities {told}" in out or f"Probabilities are {told}" in out
            assert "subsample_negatives 0.9" in out
        rate = "true base rate" if switch == "--correct-subsampling" else "base rate of the sampled rows"
        for model in (run, file):
            out, _ = printed(capsys, "eval", model, data, switch)
            assert rate in out
            assert "subsample_negatives 0.9" in out
            found = json.loads(printed(capsys, "eval", model, data, switch, "--json")[0])
            assert found["base_rate"] == ("true" if switch == "--correct-subsampling" else "sampled")
    assert "sampled rows (subsample_negatives 0.9)" in printed(capsys, "info", run)[0]


def test_onnx_is_evaluated_as_the_run(shipped, tmp_path):
    pytest.importorskip("onnxruntime")
    from dqrm.serving.evaluation import evaluate

    dqrm.export_run(shipped / "run", tmp_path / "m.onnx")
    model = Run.open(shipped / "run").load_model()[0]
    for correct in (True, False):
        wanted = dqrm.evaluate(model, shipped / "data", "test", correct_subsampling=correct)
        found = evaluate(tmp_path / "m.onnx", shipped / "data", correct_subsampling=correct)
        assert found.pop("base_rate") == wanted.pop("base_rate")
        assert found == pytest.approx(wanted, rel=1e-4)


def rewritten(source, target, edit):
    """The artifact `source` with another header."""
    _, header, body = parts(source)
    content = json.loads(header["__metadata__"]["content"])
    edit(content)
    header["__metadata__"]["content"] = json.dumps(content)
    target.write_bytes(sealed(header, body))
    return target


def test_an_older_artifact_opens_and_is_said_to_be_uncorrected(shipped, tmp_path, capsys):
    old = rewritten(shipped / "sampled.dqrm", tmp_path / "old.dqrm", lambda content: content.pop("subsampling"))
    assert dqrm.load(old).logit_offset == 0
    assert Artifact.open(old).base_rate == Artifact.open(shipped / "sampled.dqrm").base_rate
    assert "NOT on the true base rate" in printed(capsys, "info", old)[0]


def test_a_run_of_an_older_dqrm_is_corrected(shipped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shipped / "run", run)
    info = json.loads((run / "run.json").read_text())
    del info["data"]["subsample_negatives"]
    (run / "run.json").write_text(json.dumps(info))
    dqrm.export_run(run, tmp_path / "m.dqrm")  # its dataset says it
    assert Artifact.open(tmp_path / "m.dqrm").base_rate.corrected
    info["data"]["path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(info))
    found = dqrm.export_run(run, tmp_path / "m.dqrm", ExportConfig(vocabulary="none"))
    assert found["subsampling"] == {"subsample_negatives": None, "corrected": False}
    assert "not known" in Artifact.open(tmp_path / "m.dqrm").base_rate.tell()


@pytest.mark.parametrize("wrong", [{}, 3, {"subsample_negatives": 1.0, "corrected": True},
                                   {"subsample_negatives": "0.9", "corrected": True},
                                   {"subsample_negatives": None, "corrected": True},
                                   {"subsample_negatives": 0.9, "corrected": 1}])  # fmt: skip
def test_a_header_that_describes_no_correction_is_refused(shipped, tmp_path, wrong):
    bad = rewritten(shipped / "m.dqrm", tmp_path / "bad.dqrm", lambda content: content.update(subsampling=wrong))
    with pytest.raises(UserError, match="damaged"):
        dqrm.load(bad)


def test_data_without_subsampling_is_as_ever(generated, tmp_path):
    dqrm.train(generated, tmp_path / "run", tiny(max_steps=3))
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
    assert found["subsampling"] == {"subsample_negatives": 0.0, "corrected": False}
    assert dqrm.load(tmp_path / "m.dqrm").logit_offset == 0
    metrics = dqrm.evaluate(dqrm.load(tmp_path / "m.dqrm"), generated, "test")
    assert metrics == Run.open(tmp_path / "run").summary["test"]
