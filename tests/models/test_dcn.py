"""DCNv2 against a slow float64 reference: forward, gradients, initial weights; batch normalization folded."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import reference
from conftest import tensors, tiny
from dqrm import (
    DCN,
    DLRM,
    Artifact,
    Config,
    ExchangeConfig,
    ModelConfig,
    OptimizerConfig,
    PTQConfig,
    QATConfig,
    Run,
    evaluate,
    export_run,
    load,
    predict,
    resume,
    train,
)
from dqrm.export.formats.traceable import packed_stack
from dqrm.models.base import Layer, build_stack
from dqrm.quant.convert import convert, pack_linear
from dqrm.quant.ptq import row_scales
from export_helpers import train_norm

ROWS = [7, 1, 20, 5]
KINDS = {
    "parallel": {},
    "stacked": {"structure": "stacked"},
    "low rank": {"cross_rank": 2},
    "stacked, low rank": {"structure": "stacked", "cross_rank": 3, "cross_layers": 1},
    "no deep": {"deep_mlp": ()},
}


def architecture(**changes):
    return ModelConfig(**{"model": "dcn", "embedding_dim": 3, "cross_layers": 2, "deep_mlp": (6, 4)} | changes)


def weights(layer):
    """A layer's weight as it is multiplied, and its bias, in float64."""
    weight = reference.array(layer.weight)
    if layer.bits != 32:
        scale = reference.scale_from_max(np.abs(weight).max(1), layer.bits)
        weight = reference.fake_quantize(weight, scale[:, None], layer.bits)
    return weight, 0.0 if layer.bias is None else reference.array(layer.bias)


class Slow:
    """DCNv2 in float64 numpy, from the paper's formulas: the logit, and the gradients of sum(grad * logit)."""

    def __init__(self, model):
        self.config, self.training, self.grads = model.config, model.training, {}
        self.layers, self.norms, linear = {}, {}, ""
        for path, stack in model.stacks().items():
            for number, layer in enumerate(stack.children()):
                if isinstance(layer, torch.nn.Linear):
                    linear = f"{path}.{number}"
                    self.layers[linear] = weights(layer)
                elif isinstance(layer, torch.nn.BatchNorm1d):
                    parts = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
                    self.norms[linear] = [reference.array(part) for part in parts]

    def linear(self, name, x):
        weight, bias = self.layers[name]
        return x @ weight.T + bias

    def norm(self, name, y):
        if name not in self.norms:
            return y
        mean, variance, weight, bias = self.norms[name]
        if self.training:
            mean, variance = y.mean(0), y.var(0)
        return (y - mean) / np.sqrt(variance + 1e-5) * weight + bias

    def back(self, name, grad, x):
        """The gradient of a linear layer's input; those of its weight and bias are kept."""
        self.grads[f"{name}.weight"], self.grads[f"{name}.bias"] = grad.T @ x, grad.sum(0)
        return grad @ self.layers[name][0]

    def run(self, x0, grad=None):
        xs, products, low = [x0], [], self.config.cross_rank > 0
        for number in range(self.config.cross_layers):
            inner = self.linear(f"cross.{number}.0", xs[-1])
            product = self.linear(f"cross.{number}.1", inner) if low else inner
            products.append((inner, product))
            xs.append(x0 * product + xs[-1])
        parallel, deep = self.config.structure == "parallel", [name for name in self.layers if name[:4] == "deep"]
        hidden = [x0 if parallel else xs[-1]]
        for name in deep:
            hidden.append(np.maximum(self.norm(name, self.linear(name, hidden[-1])), 0))
        last = np.concatenate([xs[-1], hidden[-1]], 1) if deep and parallel else hidden[-1] if deep else xs[-1]
        logits = self.linear("head.0", last)[:, 0]
        if grad is None:
            return logits
        grad_last = self.back("head.0", grad[:, None], last)
        width = x0.shape[1]
        grad_x, grad_hidden = (grad_last[:, :width], grad_last[:, width:]) if parallel or not deep else (0, grad_last)
        for name, x, y in reversed(list(zip(deep, hidden, hidden[1:]))):
            grad_hidden = self.back(name, np.where(y > 0, grad_hidden, 0), x)
        grad_x0 = grad_hidden if deep and parallel else 0
        grad_x = grad_x + (grad_hidden if deep and not parallel else 0)
        for number in range(self.config.cross_layers - 1, -1, -1):
            inner, product = products[number]
            grad_x0 = grad_x0 + grad_x * product
            back = grad_x * x0
            back = self.back(f"cross.{number}.1", back, inner) if low else back
            grad_x = grad_x + self.back(f"cross.{number}.0", back, xs[number])
        return logits, grad_x0 + grad_x


def inputs(batch, num_dense):
    random = torch.Generator().manual_seed(batch)
    ids = torch.stack([torch.randint(0, rows, (batch,), generator=random) for rows in ROWS], 1)
    return torch.randn(batch, num_dense, generator=random), ids


def first_layer(model, dense, ids):
    """x0 in float64: dense columns, then the fake-quantized row of each table."""
    parts = [reference.array(dense)]
    for number in range(len(ROWS)):
        table = reference.array(model.tables.table(number))
        if model.tables.bits != 32:
            scale = reference.scale_from_max(np.abs(table).max(), model.tables.bits)
            table = reference.fake_quantize(table, scale, model.tables.bits)
        parts.append(table[ids[:, number].numpy()])
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_forward_and_gradients_equal_the_reference(kind, num_dense, bits, batch):
    model = DCN(num_dense, ROWS, config=architecture(**KINDS[kind]), qat=QATConfig(bits=bits), seed=3).train()
    dense, ids = inputs(batch, num_dense)
    logits = model(dense, ids)
    assert logits.shape == (batch,)
    grad = torch.linspace(-1, 2, batch)
    (logits * grad).sum().backward()
    slow = Slow(model)
    wanted, grad_x0 = slow.run(first_layer(model, dense, ids), reference.array(grad))
    np.testing.assert_allclose(logits.detach(), wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name != "tables.weight":
            np.testing.assert_allclose(parameter.grad, slow.grads[name], rtol=1e-3, atol=1e-5, err_msg=name)
    expected = np.zeros(model.tables.weight.shape)
    for table, start in enumerate(model.tables.row_offsets.tolist()):
        at = num_dense + 3 * table
        np.add.at(expected, ids[:, table].numpy() + start, grad_x0[:, at : at + 3])
    np.testing.assert_allclose(model.tables.weight.grad.to_dense(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_equals_the_reference(training):
    """On the statistics of the batch, then on the running ones; one sample is normalized as in evaluation."""
    config = architecture(batch_norm=True, dropout=0.0 if training else 0.4)
    model = DCN(3, ROWS, config=config, qat=QATConfig(bits=32)).train(training)
    for part in model.deep:
        if isinstance(part, torch.nn.BatchNorm1d):
            train_norm(part)
    dense, ids = inputs(5, 3)
    slow, x0 = Slow(model), first_layer(model, dense, ids)
    with torch.no_grad():
        np.testing.assert_allclose(model(dense, ids), slow.run(x0), rtol=1e-4, atol=1e-5)
        slow = Slow(model.train())  # the statistics have moved
        alone = model(dense[:1], ids[:1])
        if training:
            slow.training = False
            np.testing.assert_allclose(alone, slow.run(x0[:1]), rtol=1e-4, atol=1e-5)


def test_dropout_zeroes_in_training_alone():
    model = DCN(3, ROWS, config=architecture(dropout=0.5), qat=QATConfig(bits=32))
    batch = inputs(50, 3)
    assert not torch.equal(model(*batch), model(*batch))
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_gives_what_evaluation_gives_on_the_codes_of_training(bits, granularity, bias):
    qat = QATConfig(bits=bits, linear_granularity=granularity)
    stack = build_stack([Layer(9, 6, bias, batch_norm=True, dropout=0.5), Layer(6, 2, relu=False)], qat).eval()
    torch.manual_seed(bits)
    train_norm(stack[1])
    x = torch.randn(50, 9)
    folded = packed_stack(stack, pack_linear)
    assert [type(module).__name__ for module in folded] == ["PackedLinear", "ReLU", "PackedLinear"]
    if bits != 32:
        assert torch.equal(folded[0].codes, pack_linear(stack[0]).codes)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), stack(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed_stack(convert(stack))(x), stack(x), rtol=1e-5, atol=1e-5)


def test_golden_initial_weights():
    """The streams behind the seeds: a change here changes every model that a seed stands for."""
    model = DCN(13, [100, 7], seed=1)
    first = [
        *model.tables.table(0)[0, :2].tolist(),
        *model.cross[0][0].weight[0, :2].tolist(),
        model.deep[0].bias[0].item(),
        model.head[0].weight[0, 0].item(),
    ]
    golden = [-0.0053622723, 0.0023643137, 0.062975518, 0.10665393, 0.023939824, -0.0078061111]
    assert first == pytest.approx(golden, rel=1e-6)


def test_sizes():
    model = DCN(13, [2] * 26, qat=QATConfig(bits=32))
    width = 13 + 26 * 16
    assert [part[0].weight.shape for part in model.cross] == [(width, width)] * 3
    assert model.head[0].in_features == width + 256
    low = DCN(13, [2] * 26, config=ModelConfig(model="dcn", cross_rank=7, structure="stacked"))
    assert [(layer.weight.shape, layer.bias is None) for layer in low.cross[0]] == [
        ((7, width), True), ((width, 7), False)
    ]  # fmt: skip
    assert low.head[0].in_features == 256


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"cross_layers": 4}, r"cross_layers is 4: a field of model 'dcn', but model is 'dlrm'"),
        ({"deep_mlp": (8, 4)}, r"deep_mlp is 8-4: a field of model 'dcn'"),
        ({"batch_norm": True}, r"batch_norm is True: a field of model 'dcn'"),
        ({"model": "dcn", "bottom_mlp": (8, 16)}, r"bottom_mlp is 8-16: a field of model 'dlrm', but model is 'dcn'"),
        ({"model": "dcn", "interaction": "cat"}, r"interaction is cat: a field of model 'dlrm'"),
        ({"model": "dcn", "cross_layers": 0}, r"cross_layers is 0, expected 1 or more"),
        ({"model": "dcn", "cross_layers": 101}, r"cross_layers is 101, expected at most 100"),
        ({"model": "dcn", "dropout": 1.0}, r"dropout is 1.0, expected at least 0 and below 1"),
        ({"model": "dcn", "deep_mlp": (0,)}, r"deep_mlp is '0', expected widths from 1"),
    ],
)
def test_impossible_configurations_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**fields)


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="neither dense columns nor tables"):
        DCN(0, [])
    with pytest.raises(ValueError, match="cross_rank is 9, expected at most the 8 inputs"):
        DCN(2, [5, 5], config=architecture(cross_rank=9))


def dcn(bits=4, **changes):
    """A small DCNv2 that trains in a second, every part of it in use; other keyword arguments as of `tiny`."""
    fields = {name: changes.pop(name) for name in list(changes) if name in ModelConfig.__dataclass_fields__}
    base, model = tiny(bits, **changes), architecture(**{"embedding_dim": 4, "deep_mlp": (8, 4), **fields})
    return Config(model, base.quantization, OptimizerConfig("adagrad", 0.02), base.training)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("structure", "ranks"), [("parallel", 0), ("stacked", 0), ("parallel", 2)])
def test_killed_and_resumed_is_as_if_never_killed(generated, tmp_path, structure, ranks):
    norm = not ranks
    config = dcn(structure=structure, batch_norm=norm, dropout=0.3, checkpoint_every=4, eval_every=11, max_steps=40)
    config = replace(config, exchange=ExchangeConfig(simulate_ranks=ranks))
    train(generated, tmp_path / "whole", config)
    calls = iter(range(1000))

    def kill_later(*_):
        if next(calls) in (9, 30):
            raise Killed

    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, progress=kill_later)
    with pytest.raises(Killed):
        resume(tmp_path / "cut", progress=kill_later)
    resume(tmp_path / "cut")
    steps = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    assert steps == sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir())
    for step in steps:
        whole, cut = (tensors(tmp_path / name / "checkpoints" / step) for name in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert ("weights.safetensors/deep.1.running_var" in whole) == norm
        for name in whole.keys() - {"exchange.safetensors/counters"}:  # which hold times
            assert torch.equal(whole[name], cut[name]), name


@pytest.mark.parametrize("bits", [4, 32])
def test_it_learns(generated, tmp_path, bits):
    summary = train(generated, tmp_path / "run", dcn(bits, epochs=3))
    assert summary["best"]["metrics"]["auc"] > 0.52
    assert Run.open(tmp_path / "run").config.model.model == "dcn"


@pytest.mark.parametrize(
    "fields",
    [{}, {"cross_rank": 2, "structure": "stacked"}, {"batch_norm": True, "dropout": 0.2}, {"deep_mlp": ()}],
    ids=str,
)
def test_the_artifact_answers_as_the_run(generated, tmp_path, fields):
    train(generated, tmp_path / "run", dcn(max_steps=30, **fields))
    found = export_run(tmp_path / "run", tmp_path / "m.dqrm")
    batch = next(iter(generated.split("test").batches(100)))
    model, loaded = Run.open(tmp_path / "run").load_model()[0], load(tmp_path / "m.dqrm")
    assert isinstance(loaded, DCN)
    assert loaded.config == model.config
    with torch.no_grad():
        wanted, logits = model(batch.dense, batch.ids), loaded(batch.dense, batch.ids)
    figures = [evaluate(one, generated, "test") for one in (model, loaded)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    if fields.get("batch_norm"):
        assert found["largest_difference"] < 1e-6
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, wanted)


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_quantization_after_training_of_normalized_layers(generated, tmp_path, clip):
    """The codes are those of the trained weight; only scales and biases are folded."""
    train(generated, tmp_path / "run", dcn(32, max_steps=30, batch_norm=True))
    found = export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=PTQConfig(bits=8, clip=clip))
    assert found["largest_difference"] < 1e-6
    assert 0 < found["largest_difference_from_fp32"] < 0.05
    layer, packed = Run.open(tmp_path / "run").load_model()[0].deep[0], load(tmp_path / "m.dqrm").deep[0]
    scale = row_scales(layer.weight.detach(), 8, clip)
    assert torch.equal(packed.codes, pack_linear(layer, scale, 8).codes)


def test_score_and_predict_give_what_the_model_gives(generated, tmp_path):
    train(generated, tmp_path / "run", dcn(max_steps=30, batch_norm=True, structure="stacked"))
    export_run(tmp_path / "run", tmp_path / "m.dqrm")
    log = generated.path.parent / "log.txt"
    rows = [line.split("\t") for line in log.read_text().splitlines()[:50]]
    names = [*generated.info["schema"]["dense"], *(column.name for column in generated.columns)]
    model = load(tmp_path / "m.dqrm")
    scored = model.score([dict(zip(names, row[1:])) for row in rows])
    copied = copy.deepcopy(model)
    assert isinstance(copied, DCN)
    assert np.array_equal(copied.score([dict(zip(names, row[1:])) for row in rows]), scored)
    assert np.array_equal(pickle.loads(pickle.dumps(model.eval())).head[0].codes, model.head[0].codes)
    predict(tmp_path / "m.dqrm", log, tmp_path / "p.parquet")
    np.testing.assert_allclose(pl.read_parquet(tmp_path / "p.parquet")["probability"][:50], scored, atol=1e-6)


def test_a_run_without_the_new_fields_is_a_dlrm(generated, tmp_path):
    """As runs were written before there was a second model."""
    whole = train(generated, tmp_path / "whole", tiny(max_steps=12, checkpoint_every=4))
    calls = iter(range(1000))

    def kill_later(*_):
        if next(calls) == 6:
            raise Killed

    with pytest.raises(Killed):
        train(generated, tmp_path / "run", tiny(max_steps=12, checkpoint_every=4), progress=kill_later)
    file = tmp_path / "run/run.json"
    info = json.loads(file.read_text())
    fields = ("embedding_dim", "bottom_mlp", "top_mlp", "interaction", "self_interaction", "pooling")
    info["config"]["model"] = {name: info["config"]["model"][name] for name in fields}
    file.write_text(json.dumps(info))
    assert resume(tmp_path / "run")["best"] == whole["best"]
    assert isinstance(Run.open(tmp_path / "run").load_model()[0], DLRM)
    export_run(tmp_path / "run", tmp_path / "m.dqrm")
    assert set(Artifact.open(tmp_path / "m.dqrm").content["model"]["config"]) == set(fields)
