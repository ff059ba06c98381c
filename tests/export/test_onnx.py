"""ONNX files give what the converted model gives, in standard operators, and are written whole or not at all."""

import re

import numpy as np
import pytest
import torch

import export_helpers as helpers
import reference
from conftest import tiny
from dqrm import Run, evaluate, export_run, train
from dqrm.data.batches import Batch
from dqrm.errors import UserError
from dqrm.quant.packing import decode

onnx = pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")


from dqrm.export.formats import format_of, onnx_file, score_file  # noqa: E402
from dqrm.export.formats.onnx_writer import write_onnx  # noqa: E402


def write(model, path, **options):
    write_onnx(model, path, **options)
    return score_file(path)


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_the_file_gives_what_the_model_gives(tmp_path, kind):
    model = helpers.made(kind)
    helpers.compare(model, write(model, tmp_path / "m.onnx"))
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    loaded = onnx.load(tmp_path / "m.onnx")
    assert {node.domain for node in loaded.graph.node} == {""}
    assert [opset.domain for opset in loaded.opset_import] == [""]
    assert loaded.producer_name == "dqrm"


@pytest.mark.parametrize("kind", ["2 bits", "4 bits", "8 bits", "16 bits", "bags, mean"])
def test_a_scale_per_row(tmp_path, kind):
    model = helpers.with_row_scales(helpers.made(kind))
    samples = helpers.batch(model, 50)
    helpers.assert_same(write(model, tmp_path / "m.onnx")(samples), helpers.expected(model, samples))


@pytest.mark.parametrize("kind", ["bags, sum", "bags, mean"])
def test_against_the_formulas_in_float64(tmp_path, kind):
    model = helpers.made(kind)
    tables, samples = model.tables, helpers.batch(model, 20)
    values = [
        decode(rows, scale, tables.bits, tables.embedding_dim).double().numpy()
        for rows, scale in zip(tables.codes.split(tables.table_rows), tables.scale)
    ]
    vectors = [values[table][samples.ids[:, table].numpy()] for table in range(tables.num_single)]
    for table, (ids, offsets) in zip(values[tables.num_single :], samples.bags):
        bags = reference.bag_positions(ids.numpy(), offsets.numpy())
        vectors.append(reference.pool(table, ids.numpy(), bags, mode=tables.pooling))

    def mlp(layers, x):
        for layer in layers:
            if isinstance(layer, torch.nn.ReLU):
                x = np.maximum(x, 0)
            else:
                x = x @ layer.weight().double().numpy().T + layer.bias.double().numpy()
        return x

    x = reference.interact(mlp(model.bottom, samples.dense.double().numpy()), np.stack(vectors, 1), False)
    wanted = torch.from_numpy(mlp(model.top, x)[:, 0])
    helpers.assert_same(write(model, tmp_path / "m.onnx")(samples), wanted.float())


def test_ids_outside_are_row_0(tmp_path):
    model = helpers.made("bags, sum")
    inside = Batch(
        torch.ones(3, 3),
        torch.tensor([[0, 0], [0, 0], [6, 0]], dtype=torch.int32),
        ((torch.tensor([0, 3]), torch.tensor([0, 1, 2])), (torch.tensor([8, 0]), torch.tensor([0, 0, 1]))),
        torch.zeros(3),
    )
    outside = Batch(
        inside.dense,
        torch.tensor([[7, 1], [-1, 2**31 - 1], [6, -(2**31)]], dtype=torch.int32),
        ((torch.tensor([40, 3]), torch.tensor([0, 1, 2])), (torch.tensor([8, -1]), torch.tensor([0, 0, 1]))),
        inside.labels,
    )
    helpers.assert_same(write(model, tmp_path / "m.onnx")(outside), helpers.expected(model, inside))


def test_probability_is_an_output_too(tmp_path):
    model = helpers.made("4 bits")
    write(model, tmp_path / "m.onnx")
    samples = helpers.batch(model, 6)
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    feeds = {"dense": samples.dense.numpy(), "ids": samples.ids.long().numpy()}
    probability, logit = session.run(["probability", "logit"], feeds)
    torch.testing.assert_close(torch.from_numpy(probability), torch.from_numpy(logit).sigmoid())
    assert [given.name for given in session.get_outputs()] == ["probability", "logit"]


def test_the_values_do_not_depend_on_the_session_options(tmp_path):
    model = helpers.made("4 bits")
    write(model, tmp_path / "m.onnx")
    samples = helpers.batch(model, 30)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "m.onnx", options)
    found = session.run(["logit"], {"dense": samples.dense.numpy(), "ids": samples.ids.long().numpy()})[0]
    helpers.assert_same(torch.from_numpy(found), helpers.expected(model, samples))


def test_codes_stay_packed(tmp_path):
    model = helpers.made("4 bits")
    write(model, tmp_path / "m.onnx")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert stored["tables.codes"].raw_data == model.tables.codes.numpy().tobytes()
    assert len(stored["top.0.weight"].raw_data) == model.top[0].codes.numel()


def test_metadata(tmp_path):
    write(helpers.made("4 bits"), tmp_path / "m.onnx", metadata={"dqrm": '{"a": 1}', "ü": "é"})
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_modelmeta().custom_metadata_map == {"dqrm": '{"a": 1}', "ü": "é"}


@pytest.mark.parametrize("kind", ["4 bits", "16 bits", "32 bits", "bags, mean"])
def test_a_large_table_lies_beside(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 100)
    model = helpers.with_row_scales(helpers.made(kind)) if kind != "32 bits" else helpers.made(kind)
    score = write(model, tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    samples = helpers.batch(model, 30)
    helpers.assert_same(score(samples), helpers.expected(model, samples))
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).rename(moved / name)
    helpers.assert_same(score_file(moved / "m.onnx")(samples), helpers.expected(model, samples))


def test_data_that_the_replaced_model_needs_is_left_alone(tmp_path, monkeypatch):
    """An export writes into a folder inside that of its output."""
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 100)
    work, model = tmp_path / "m.onnx.partial", helpers.made("8 bits")
    work.mkdir()
    (tmp_path / "m.onnx.data").write_bytes(b"needed")
    (tmp_path / "m.onnx.backup.data").write_bytes(b"mine")
    score = write(model, work / "m.onnx")
    samples = helpers.batch(model, 30)
    helpers.assert_same(score(samples), helpers.expected(model, samples))
    (data,) = {path.name for path in work.iterdir()} - {"m.onnx"}
    assert re.fullmatch(r"m\.onnx\.[0-9a-f]{8}\.data", data)
    for name in (data, "m.onnx.data"):
        (tmp_path / name).touch()
    companions = format_of(tmp_path / "m.onnx").companions(tmp_path / "m.onnx")
    assert sorted(path.name for path in companions) == sorted([data, "m.onnx.data"])


def test_damaged_and_missing_files(tmp_path, monkeypatch):
    write(helpers.made("4 bits"), tmp_path / "m.onnx")
    whole = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"m\.onnx cannot be loaded: damaged"):
        score_file(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="no such file"):
        score_file(tmp_path / "none.onnx")
    with pytest.raises(UserError, match=r"\.onnx, \.pt2, \.pte or /"):
        score_file(tmp_path / "m.bin")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"dqrm\[onnx\]"):
        score_file(tmp_path / "m.onnx")


def test_an_unconverted_model_is_refused(tmp_path):
    from dqrm.models.dlrm import DLRM

    with pytest.raises(ValueError, match="convert"):
        write_onnx(DLRM(2, (3, 4)), tmp_path / "m.onnx")


def test_eval_takes_onnx_of_the_same_data_and_no_pt2(generated, bags_data, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=5))
    export_run(tmp_path / "run", tmp_path / "m.onnx")
    expected = evaluate(Run.open(tmp_path / "run").load_model()[0], generated, "test")
    found = evaluate(tmp_path / "m.onnx", generated.path)
    assert found["auc"] == pytest.approx(expected["auc"], abs=5e-7)
    assert found["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-6)
    with pytest.raises(UserError, match="is not the dataset that"):
        evaluate(tmp_path / "m.onnx", bags_data.path)
    (tmp_path / "m.pt2").write_bytes(b"PK")
    with pytest.raises(UserError, match="can run code"):
        evaluate(tmp_path / "m.pt2", generated.path)
