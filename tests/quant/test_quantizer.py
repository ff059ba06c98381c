"""The door for quantizers: one that learns its scales, registered here, is trained, saved, converted and exported."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dqrm
import reference as ref
from conftest import tiny
from dqrm.quant.config import QUANTIZERS
from dqrm.quant.convert import stored_bytes
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.quant.uniform import code_limits
from dqrm.training.checkpoints import load_weights
from kernel_helpers import NATIVE, PATHS, on
from run_helpers import assert_resumes

ROWS, DIM = (30, 1, 17), 4
NAME = "tables.weight_fake_quantizer.scale"


class Learned(WeightFakeQuantizer):
    """Learned step size quantization (arXiv 1902.08153) without its factor on the gradient."""

    def __init__(self, qat, bits, groups):
        super().__init__(qat, bits, groups)
        self.scale = nn.Parameter(torch.zeros(groups.count))

    def fake_quantize(self, values, group=slice(None)):
        scale = self.scale[group, None]
        inside = (values / scale).clamp(*code_limits(self.bits))
        return (inside + (inside.round() - inside).detach()) * scale


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "learned", Learned)


def gradients(values, scale, grad, bits):
    """By weight and by scale, number by number in float64: what is clamped gives its limit to the scale."""
    low, high = code_limits(bits)
    by_weight, by_scale = np.zeros_like(values), 0.0
    for place, value in np.ndenumerate(values):
        x = value / scale
        inside = low < x < high
        code = np.clip(np.round(x), low, high)
        by_weight[place] = grad[place] * inside
        by_scale += grad[place] * (code - x * inside)
    return by_weight, by_scale


def lookup(kind, sparse, bits=4):
    """A module, the ids that it looks up [N, tables], and its output [N, tables, dim] for them."""
    torch.manual_seed(0)
    options = {"bits": bits, "quantizer": "learned", "sparse": sparse}
    if kind == "collection":
        module = QuantEmbeddingBagCollection(ROWS, DIM, _weight=torch.randn(sum(ROWS), DIM), **options)
        ids = torch.stack([torch.randperm(rows)[:5].repeat(5)[:5] for rows in ROWS], 1)
        return module, ids, module(ids)
    if kind == "embedding":
        module = QuantEmbedding(20, DIM, **options)
    else:
        module = QuantEmbeddingBag(20, DIM, mode="sum", **options)
    ids = torch.randperm(20)[:5].view(-1, 1)
    return module, ids, module(ids).view(5, 1, DIM)


@PATHS
@pytest.mark.parametrize("kind", ["collection", "embedding", "bag"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_the_scale_of_a_table_gets_its_gradient(path, kind, sparse):
    with on(path):
        module, ids, first = lookup(kind, sparse)
        scale = module.weight_fake_quantizer.scale
        assert isinstance(scale, nn.Parameter)
        assert [name for name, _ in module.named_parameters()] == ["weight", "weight_fake_quantizer.scale"]
        with torch.no_grad():
            scale.mul_(0.6)  # so that some weights are clamped
        out = module(ids).view(first.shape)
        grad = torch.randn(out.shape)
        (out * grad).sum().backward()
    assert module.weight.grad.is_sparse == sparse
    found = ref.array(module.weight.grad.to_dense())
    starts = np.cumsum([0, *module.weight_fake_quantizer.groups.table_rows])
    expected = np.zeros_like(found)
    for table in range(len(scale)):
        rows = ids[:, table].numpy() + starts[table]
        values = ref.array(module.weight)[rows]
        by_weight, by_scale = gradients(values, scale[table].item(), ref.array(grad)[:, table], 4)
        np.add.at(expected, rows, by_weight)
        assert float(scale.grad[table]) == pytest.approx(by_scale, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (scale.grad != 0).all()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_scale_of_a_linear_layer_gets_its_gradient(granularity):
    torch.manual_seed(0)
    layer = QuantLinear(6, 5, bits=4, quantizer="learned", granularity=granularity, bias=False)
    layer(torch.eye(6))
    scale = layer.weight_fake_quantizer.scale
    assert scale.shape == ((5,) if granularity == "channel" else (1,))
    with torch.no_grad():
        scale.mul_(0.6)
    grad = torch.randn(5, 6)
    (layer(torch.eye(6)).t() * grad).sum().backward()
    weight, each = ref.array(layer.weight), [slice(row, row + 1) for row in range(5)]
    for number, part in enumerate(each if granularity == "channel" else [slice(None)]):
        by_weight, by_scale = gradients(weight[part], scale[number].item(), ref.array(grad)[part], 4)
        np.testing.assert_allclose(ref.array(layer.weight.grad)[part], by_weight, rtol=1e-6)
        assert float(scale.grad[number]) == pytest.approx(by_scale, rel=1e-4)


def test_layers_with_it_run_one_by_one_and_others_in_one_step():
    torch.manual_seed(0)
    parts = [QuantLinear(4, 3, quantizer=name) for name in ("max", "learned")]
    parts[1].load_state_dict(parts[0].state_dict())
    x = torch.randn(7, 4)
    outs = [QuantMLP(part, nn.ReLU())(x) for part in parts]
    assert [type(out.grad_fn).__name__ for out in outs] == ["_LayersBackward", "ReluBackward0"]
    torch.testing.assert_close(*outs)  # it starts from the scales of the largest magnitudes


def learned_config(**training):
    config = replace(tiny(max_steps=12, **training), quantization=dqrm.QATConfig(quantizer="learned"))
    return replace(config, optimizer=replace(config.optimizer, learning_rate=0.01))


@pytest.mark.parametrize("ranks", [0, 2])
def test_it_trains_resumes_and_exports_with_its_scales(generated, tmp_path, ranks):
    config = replace(learned_config(checkpoint_every=4), exchange=dqrm.ExchangeConfig(simulate_ranks=ranks))
    assert_resumes(generated, tmp_path, config, 7)
    model, _ = dqrm.Run.open(tmp_path / "cut").load_model()
    scale = model.tables.scale.detach()
    start = dqrm.Run.open(tmp_path / "cut").new_model().tables.current_scale()
    assert (scale > 0).all()
    assert (scale != start).all()  # all of them have learned
    found = dqrm.export_run(tmp_path / "cut", tmp_path / "model.dqrm")
    assert found["largest_difference"] == 0
    served = dqrm.load(tmp_path / "model.dqrm")
    assert torch.equal(served.tables.scale, scale)
    assert torch.equal(served.top[0].scale, model.top[0].weight_fake_quantizer.scale)
    batch = next(iter(generated.split("test").batches(200)))
    with torch.inference_mode():
        expected = model(batch.dense, batch.ids, batch.bags)
        assert torch.equal(served(batch.dense, batch.ids, batch.bags), expected)
        sizes = stored_bytes(model)
        assert torch.equal(dqrm.convert(model)(batch.dense, batch.ids, batch.bags), expected)
    assert sizes == stored_bytes(dqrm.Run.open(tmp_path / "cut").new_model())


def test_prepare_copies_moves_and_states_keep_a_learned_scale():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(9, 4), nn.EmbeddingBag(7, 4), nn.Linear(4, 3)])
    plain = copy.deepcopy(model.state_dict())
    dqrm.prepare_qat(model, dqrm.QATConfig(quantizer="learned"))
    assert all(isinstance(part.weight_fake_quantizer, Learned) for part in model)

    def run(model):
        outs = model[0](torch.arange(4)), model[1](torch.arange(4)[:, None]), model[2](torch.eye(4)).t()
        return torch.cat(outs)

    first = run(model)
    with torch.no_grad():
        for part in model:
            part.weight_fake_quantizer.scale.mul_(0.7)
    expected = run(model)
    assert not torch.equal(first, expected)
    fresh = dqrm.prepare_qat(
        nn.ModuleList([nn.Embedding(9, 4), nn.EmbeddingBag(7, 4), nn.Linear(4, 3)]), dqrm.QATConfig(quantizer="learned")
    )
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), model.to("cpu"), fresh):
        assert torch.equal(run(other), expected)
        assert torch.equal(run(other.eval()), expected)
    fresh.load_state_dict(plain)  # of the unquantized model: scales start anew
    assert torch.equal(run(fresh), first)
    half = copy.deepcopy(model).bfloat16()
    assert half[0].scale.dtype == torch.float32
    assert torch.equal(half[0].scale, model[0].scale)


def test_an_unknown_quantizer_is_refused_with_those_there_are():
    assert {"max", "learned"} <= set(QUANTIZERS)
    with pytest.raises(ValueError, match=f"quantizer is 'lsqq', expected {' or '.join(map(repr, QUANTIZERS))}"):
        dqrm.QATConfig(quantizer="lsqq")


def test_a_configuration_object_or_its_fields_but_not_both():
    config = dqrm.QATConfig(bits=8, mlp_bits=2, scale_period=5)
    for module in (QuantEmbedding(5, 2, qat=config), QuantEmbeddingBagCollection([5], 2, qat=config)):
        assert (module.bits, module.qat) == (8, config)
    assert QuantLinear(5, 2, qat=config).bits == 2
    with pytest.raises(ValueError, match="got qat and also bits: expected one or the other"):
        QuantEmbedding(5, 2, qat=config, bits=4)
    with pytest.raises(TypeError, match="'bitz'"):
        QuantEmbeddingBagCollection([5], 2, bitz=4)


class Clipped(WeightFakeQuantizer):
    """Half of the largest magnitude, set once: compiled code may look tables up on it, but it is not a layer's own."""

    def __init__(self, qat, bits, groups):
        super().__init__(qat, bits, groups)
        self.register_buffer("scale", torch.zeros(groups.count))
        self.fusible = groups.table_rows is not None

    @torch.no_grad()
    def refresh(self, weight, everything=False):
        super().refresh(weight, everything)
        self.scale.mul_(0.5)


@NATIVE
def test_a_fixed_scale_of_ones_own_goes_through_the_compiled_lookup(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "clipped", Clipped)
    ids, outs, grads = torch.tensor([[3, 0, 5], [29, 0, 5]]), [], []
    for path in ("native", "plain"):
        with on(path):
            torch.manual_seed(0)
            module = QuantEmbeddingBagCollection(ROWS, DIM, _weight=torch.randn(sum(ROWS), DIM), quantizer="clipped")
            outs.append(module(ids))
            outs[-1].square().sum().backward()
            grads.append(module.weight.grad.to_dense())
    assert torch.equal(*outs)
    assert torch.equal(*grads)
    tables = module.weight_fake_quantizer.groups.tables(module.weight)
    for number, table in enumerate(tables):
        scale = ref.scale_from_max(np.abs(ref.array(table)).max(), 4) / 2
        expected = ref.fake_quantize(ref.array(table[ids[:, number]]), scale, 4)
        np.testing.assert_allclose(ref.array(outs[0])[:, number], expected, rtol=1e-6)
    layer = QuantLinear(6, 5, quantizer="clipped", bias=False)
    stack = QuantMLP(layer, nn.ReLU())
    torch.testing.assert_close(stack(torch.eye(6)), layer(torch.eye(6)).relu())
    wanted = ref.scale_from_max(np.abs(ref.array(layer.weight)).max(1), 4) / 2
    np.testing.assert_allclose(layer.current_scale(), wanted, rtol=1e-6)


# ---- what was written before the scales were a child module's


def old_names(state):
    """The state dict of a model as it was then."""
    return {name.replace("weight_fake_quantizer.", ""): value for name, value in state.items()}


@pytest.mark.parametrize("period", ["scale_period", "rescan_period"])
def test_old_state_dicts_load_and_go_on_with_their_clock(period):
    model = nn.Sequential(nn.Embedding(30, 4, sparse=True))
    options = dqrm.QATConfig(**{period: 3})
    dqrm.prepare_qat(model, options)
    for _ in range(2):
        model(torch.arange(5))
    state = old_names(model.state_dict())
    assert set(state) == {"0.weight", "0.scale", "0.scale_ticks"}
    other = dqrm.prepare_qat(nn.Sequential(nn.Embedding(30, 4, sparse=True)), options)
    other.load_state_dict(state, strict=True)
    assert other[0].scale_ticks == 2
    for _ in range(3):
        for each in (model, other):
            with torch.no_grad():
                each[0].weight.mul_(1.5)
            each(torch.arange(5))
        assert torch.equal(model[0].scale, other[0].scale)


def test_an_old_checkpoint_loads(generated, tmp_path):
    dqrm.train(generated, tmp_path / "run", tiny(max_steps=5))
    run = dqrm.Run.open(tmp_path / "run")
    model, _ = run.load_model("last")
    checkpoint = run.checkpoints / "step-000000005"
    state = old_names(load_file(checkpoint / "weights.safetensors"))
    assert {"tables.scale", "tables.scale_ticks"} <= set(state)
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "weights.safetensors")
    other = run.new_model()
    load_weights(tmp_path / "old", other)
    wanted, found = model.state_dict(), other.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert float(found[NAME].min()) > 0
    assert pickle.loads(pickle.dumps(other)).tables.scale_ticks == 5
