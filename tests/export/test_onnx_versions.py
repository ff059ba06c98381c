"""ONNX files ask for no newer runtime than their operators need.

With DQRM_OLD_ONNXRUNTIME naming the Python of an environment that has an old onnxruntime, that runs the files too:

    python3.11 -m venv old && old/bin/pip install onnxruntime==1.15.0 'numpy<2'
    DQRM_OLD_ONNXRUNTIME=old/bin/python pytest tests/test_onnx_versions.py
"""

import os
import subprocess

import numpy as np
import pytest
import torch

from dqrm.export.formats import onnx_file
from dqrm.export.formats.onnx_writer import write_onnx
from export_helpers import KINDS, assert_same, batch, expected, made, with_row_scales

onnx = pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")
OLD = os.environ.get("DQRM_OLD_ONNXRUNTIME")
RUN = (
    "import sys, numpy, onnxruntime\n"
    "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    "given = numpy.load(sys.argv[2])\n"
    "feeds = {wanted.name: given[wanted.name] for wanted in session.get_inputs()}\n"
    "numpy.save(sys.argv[3], session.run(['logit'], feeds)[0])\n"
)


def written(kind, path, offset=-1.5):
    model = made(kind)
    model.logit_offset = offset
    write_onnx(model, path)
    return model


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_versions_are_the_oldest_that_have_the_operators(kind, external, tmp_path, monkeypatch):
    if external:
        monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 10)
    model = written(kind, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").exists() == (external and bool(model.tables.multi))
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    loaded = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    opset = 16 if any(model.tables.multi) else 13
    assert [(found.domain, found.version) for found in loaded.opset_import] == [("", opset)]
    assert loaded.ir_version == {13: 7, 16: 8}[opset] == onnx.helper.find_min_ir_version_for(loaded.opset_import)
    assert not loaded.functions  # of IR 8


def test_an_older_opset_would_lack_an_operator(tmp_path):
    """Else a lower one would do."""
    for kind, lower in (("4 bits", 12), ("bags, sum", 15)):
        written(kind, tmp_path / "m.onnx")
        loaded = onnx.load(tmp_path / "m.onnx")
        loaded.opset_import[0].version = lower
        with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
            onnx.checker.check_model(loaded, full_check=True)


@pytest.mark.skipif(OLD is None, reason="DQRM_OLD_ONNXRUNTIME names no Python")
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "row scales"])
def test_an_old_runtime_gives_the_same(kind, external, tmp_path, monkeypatch):
    if external:
        monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 10)
    path = tmp_path / "m.onnx"
    if kind == "row scales":
        model = with_row_scales(made("bags, mean"))
        write_onnx(model, path)
    else:
        model = written(kind, path)
    rows = batch(model, 6)
    feeds = {"dense": rows.dense.numpy(), "ids": rows.ids.numpy().astype(np.int64)}
    for number, (values, offsets) in enumerate(rows.bags):
        feeds |= {f"values_{number}": values.numpy().astype(np.int64), f"offsets_{number}": offsets.numpy()}
    np.savez(tmp_path / "given.npz", **feeds)
    arguments = [OLD, "-c", RUN, path, tmp_path / "given.npz", tmp_path / "found.npy"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(torch.from_numpy(np.load(tmp_path / "found.npy")), expected(model, rows))
