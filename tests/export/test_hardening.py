"""The worst moment, and numbers chosen to do harm: the old file stays whole, nothing reads wrongly."""

import json
import os

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm import Artifact, Config, ExportConfig, QATConfig, UserError
from dqrm.export.check import generate
from dqrm.export.formats import onnx_file
from dqrm.export.formats.dqrm import DqrmFormat
from dqrm.export.formats.onnx import OnnxFormat
from export.test_fuzz import changed, parts, sealed, with_text

runtime = pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")


@pytest.fixture(scope="module")
def runs(generated, bags_data, tmp_path_factory):
    """Two runs on two datasets."""
    folder = tmp_path_factory.mktemp("runs")
    for name, data in (("one", generated), ("two", bags_data)):
        dqrm.train(data, folder / name, tiny(max_steps=8))
    return folder / "one", folder / "two"


def fail_at_last_rename(monkeypatch, name):
    """Make the rename of the file that makes the others valid fail."""
    replace = os.replace

    def failing(source, target):
        if os.fspath(target).endswith(name):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


def test_vocabularies_beside_survive_a_failed_export(runs, tmp_path, monkeypatch):
    output = tmp_path / "m.dqrm"
    dqrm.export_run(runs[0], output, ExportConfig(vocabulary="beside"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        fail_at_last_rename(patch, str(output))
        with pytest.raises(UserError, match="unchanged"):
            dqrm.export_run(runs[1], output, ExportConfig(vocabulary="beside"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Artifact.open(output).vocabulary(0)
    dqrm.export_run(runs[1], output, ExportConfig(vocabulary="beside"))
    assert Artifact.open(output).vocabulary(0)
    assert len(list(tmp_path.iterdir())) == 2
    dqrm.export_run(runs[1], output)
    assert [path.name for path in tmp_path.iterdir()] == ["m.dqrm"]


def test_what_is_stale_is_deleted_under_the_lock(runs, tmp_path, monkeypatch):
    """Else the next export, which may begin as soon as the lock is gone, would lose its vocabularies."""
    companions, locked = DqrmFormat.companions, []

    def looking(self, path):
        locked.append((tmp_path / "m.dqrm.partial" / ".lock").exists())
        return companions(self, path)

    monkeypatch.setattr(DqrmFormat, "companions", looking)
    dqrm.export_run(runs[0], tmp_path / "m.dqrm", ExportConfig(vocabulary="beside"))
    assert locked == [True]
    assert len(list(tmp_path.iterdir())) == 2


def test_external_tables_survive_a_failed_export(runs, generated, bags_data, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    output = tmp_path / "m.onnx"
    dqrm.export_run(runs[0], output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    dqrm.train(generated, tmp_path / "other", tiny(max_steps=3, seed=5))
    with monkeypatch.context() as patch:
        fail_at_last_rename(patch, f"{tmp_path}/m.onnx")
        with pytest.raises(UserError, match="unchanged"):
            dqrm.export_run(tmp_path / "other", output)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    for run in (tmp_path / "other", runs[0]):  # each time the data's name is another
        dqrm.export_run(run, output)
        assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 2
        from dqrm.serving.evaluation import evaluate

        expected = dqrm.evaluate(dqrm.Run.open(run).load_model()[0], generated, "test")
        assert evaluate(output, generated.path)["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-6)


def test_rows_whose_sum_wraps_are_refused(runs, tmp_path):
    dqrm.export_run(runs[0], tmp_path / "m.dqrm", ExportConfig(vocabulary="none"))
    _, header, body = parts(tmp_path / "m.dqrm")
    content = json.loads(header["__metadata__"]["content"])
    rows = list(content["model"]["table_rows"])
    rows[:4] = [2**62, 2**62, 2**62, 2**62 + sum(rows[:4])]
    for wrong in (rows, [*content["model"]["table_rows"][:-1], 5.0]):
        other = changed(content, ("model", "table_rows"), wrong)
        for column, count in zip(other["schema"]["columns"], wrong):
            column["rows"] = count
        (tmp_path / "f.dqrm").write_bytes(sealed(with_text(header, "content", other), body))
        with pytest.raises(UserError, match="damaged"):
            dqrm.load(tmp_path / "f.dqrm", verify=True)
    for bits in (4.0, True, "4"):
        other = changed(content, ("model", "table_bits"), bits)
        (tmp_path / "f.dqrm").write_bytes(sealed(with_text(header, "content", other), body))
        with pytest.raises(UserError, match="damaged"):
            dqrm.load(tmp_path / "f.dqrm")


def test_an_artifact_that_is_replaced_after_it_was_opened(runs, tmp_path):
    output = tmp_path / "m.dqrm"
    dqrm.export_run(runs[0], output)
    opened = Artifact.open(output)
    dqrm.export_run(runs[1], output)
    for use in (opened.model, opened.container.verify, lambda: opened.vocabulary(0)):
        with pytest.raises(UserError, match="was replaced while it was being read"):
            use()


@pytest.mark.parametrize("native", [True, False])
def test_another_number_of_dense_rows_than_of_ids(runs, tmp_path, monkeypatch, native):
    if not native:
        monkeypatch.setattr("dqrm.kernels.BACKENDS", [])
    dqrm.export_run(runs[0], tmp_path / "m.dqrm")
    model = dqrm.load(tmp_path / "m.dqrm")
    batch = generate(Artifact.open(tmp_path / "m.dqrm").content["model"], 7)
    for dense, ids in ((batch.dense[:1], batch.ids), (batch.dense, batch.ids[:2])):
        with pytest.raises(ValueError, match="expected the same number"), torch.inference_mode():
            model(dense, ids)


def test_models_with_quantized_inputs_export_to_other_runtimes(generated, tmp_path):
    base = tiny(max_steps=8)
    for seed in range(3):
        config = Config(base.model, QATConfig(bits=4, activation_bits=8), base.optimizer, tiny(seed=seed).training)
        dqrm.train(generated, tmp_path / f"run{seed}", config)
        found = dqrm.export_run(tmp_path / f"run{seed}", tmp_path / "m.onnx")
        assert found["largest_difference"] < 1e-2


@pytest.mark.parametrize(("bits", "rows", "by", "accepted"), [
    (32, 1, 1e-3, False), (8, 1, 1e-3, True), (8, 2, 1e-3, False), (8, 1, 0.1, False),
])  # fmt: skip
def test_how_far_another_runtime_may_differ(generated, tmp_path, monkeypatch, bits, rows, by, accepted):
    base = tiny(max_steps=3)
    config = Config(base.model, QATConfig(bits=4, activation_bits=bits), base.optimizer, base.training)
    dqrm.train(generated, tmp_path / "run", config)

    def wrong(self, path, threads=0):
        model = dqrm.Run.open(tmp_path / "run").load_model()[0]

        def score(batch):
            probabilities = model(batch.dense, batch.ids, batch.bags).detach().sigmoid()
            probabilities[:rows] += by
            return probabilities.logit()

        return score

    monkeypatch.setattr(OnnxFormat, "open", wrong)
    options = (tmp_path / "run", tmp_path / "m.onnx", ExportConfig(check_rows=120))
    assert generated.rows["test"] >= 120  # so that one row in a hundred is one row
    if accepted:
        assert dqrm.export_run(*options)["largest_difference"] == pytest.approx(by, rel=1e-3)
    else:
        with pytest.raises(UserError, match="nothing was written"):
            dqrm.export_run(*options)
        assert not (tmp_path / "m.onnx").exists()
