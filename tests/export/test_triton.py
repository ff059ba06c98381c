"""`config.pbtxt` beside an ONNX file: what Triton's schema parses, with the file's own inputs and outputs."""

import re

import pytest

import dqrm
from conftest import tiny
from dqrm import ExportConfig, UserError
from dqrm.export.formats.triton import triton_config

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.mark.parametrize("bags", [False, True])
def test_the_configuration_is_that_of_the_file(generated, bags_data, tmp_path, bags):
    runtime = pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")
    dqrm.train(bags_data if bags else generated, tmp_path / "run", tiny(max_steps=1, threads=1))
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.onnx", ExportConfig(triton=True))
    assert str(tmp_path / "config.pbtxt") in found["files"]
    text = (tmp_path / "config.pbtxt").read_text()
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    batched = 0 if bags else 1
    for kind, ports in (("input", session.get_inputs()), ("output", session.get_outputs())):
        declared = re.findall(kind + r' \[ \{ name: "(\w+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]', text)
        assert {(name, datatype) for name, datatype, _ in declared} == {(port.name, TYPES[port.type]) for port in ports}
        for port in ports:
            (dims,) = [dims for name, _, dims in declared if name == port.name]
            inner = [size if isinstance(size, int) else -1 for size in port.shape][batched:]
            assert [int(size) for size in dims.split(",")] == (inner or [1])
    assert ("dynamic_batching { }" in text) is not bags
    assert f"max_batch_size: {0 if bags else 1024}\n" in text
    assert 'default_model_filename: "m.onnx"' in text
    # Again: our own file is replaced, another one is not.
    dqrm.export_run(tmp_path / "run", tmp_path / "m.onnx", ExportConfig(triton=True))
    (tmp_path / "config.pbtxt").write_text("mine")
    with pytest.raises(UserError, match="was not written by dqrm export and would be overwritten"):
        dqrm.export_run(tmp_path / "run", tmp_path / "m.onnx", ExportConfig(triton=True))
    assert (tmp_path / "config.pbtxt").read_text() == "mine"


def test_tritons_schema_parses_it():
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    for multi in ([False, False], [False, True]):
        text = triton_config({"multi": multi, "num_dense": 3}, "m.onnx")
        parsed = text_format.Parse(text, schema.ModelConfig())
        assert parsed.backend == "onnxruntime"
        assert [port.name for port in parsed.input][:2] == ["dense", "ids"]
        assert len(parsed.input) == 2 + 2 * sum(multi)
        assert [list(port.dims) for port in parsed.output] == [[-1 if sum(multi) else 1]] * 2
        assert parsed.HasField("dynamic_batching") is not any(multi)


def test_other_files_have_none(tmp_path):
    with pytest.raises(UserError, match=r"triton is for \.onnx files"):
        dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(triton=True))
