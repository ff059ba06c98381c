"""Arithmetic in bf16, and tables whose master weights are bf16 with stochastic rounding."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import reference as ref
from conftest import tiny
from dqrm.config import ModelConfig
from dqrm.data.batches import Batch
from dqrm.kernels import add_rows_stochastic
from dqrm.models.dlrm import DLRM
from dqrm.quant.config import QATConfig
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from dqrm.training.optimizers import OPTIMIZERS, SparseAdagrad, SparseSGD, build_optimizers
from dqrm.training.run import Run
from dqrm.training.step import TrainStep
from kernel_helpers import NATIVE, on
from run_helpers import assert_resumes, last

UNIT = 2.0**-8  # the largest relative error of one rounding to bf16, which keeps 8 binary places
ROWS = (50, 3, 1, 70)

MODELS = {
    "dot": {},
    "cat": {"interaction": "cat"},
    "self interaction": {"self_interaction": True},
    "no dense": {"dense": 0},
    "no dense, cat": {"dense": 0, "interaction": "cat"},
    "bags": {"multi": (False, False, True, True), "pooling": "mean"},
    "activations": {"activation_bits": 8},
    "biases": {"bias_bits": 4},
    "per tensor": {"linear_granularity": "tensor"},
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8},
    "16 bits": {"bits": 16},
    "32 bits": {"bits": 32},
    "one layer": {"top_mlp": (1,)},
}


@pytest.fixture(autouse=True)
def every_layer_in_bf16(monkeypatch):
    """Small ones too, which otherwise stay in FP32 because that is faster."""
    monkeypatch.setattr("dqrm.quant.mlp._WORTH_BF16", 0)


def build(name, precision="bf16", **options):
    chosen = dict(MODELS[name])
    dense, multi = chosen.pop("dense", 13), chosen.pop("multi", None)
    qat = {key: chosen.pop(key) for key in [*chosen] if key in QATConfig.__dataclass_fields__}
    architecture = {"embedding_dim": 16, "bottom_mlp": (64, 32, 16), "top_mlp": (64, 32, 1), **chosen}
    return DLRM(
        dense, ROWS, multi=multi, config=ModelConfig(**architecture), qat=QATConfig(**qat), precision=precision,
        **options,
    )  # fmt: skip


def make_batch(model, size=64, seed=0):
    random = torch.Generator().manual_seed(seed)
    single = model.tables.num_single
    ids = torch.stack([torch.randint(rows, (size,), generator=random) for rows in ROWS[:single]], 1).int()
    bags = []
    for rows in ROWS[single:]:
        lengths = torch.randint(4, (size,), generator=random)
        bags.append((torch.randint(rows, (int(lengths.sum()),), generator=random).int(), lengths.cumsum(0) - lengths))
    dense = torch.randn(size, model.num_dense, generator=random)
    return Batch(dense, ids, tuple(bags), torch.randint(2, (size,), generator=random).float())


def error(found, exact):
    """Relative, in the Euclidean norm."""
    found, exact = found.to_dense().double() if found.is_sparse else found.double(), exact.double()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


# ---- arithmetic


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_bf16_is_close_to_float64(path, name):
    """Logits: up to 7 layers, each with two roundings to bf16 (of the products and of the scaled result) that rarely
    all point one way. Gradients: with random signs, some ReLUs close to 0 end on the other side, and the gradient of a
    share p of wrong ones is off by sqrt(p) (a quarter: 6 %). The sharp bound is in the next test.
    """
    model, step = build(name), make_batch(build(name))
    logits = model(step.dense, step.ids, step.bags)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, step.labels)
    loss.backward()
    exact, exact_loss, gradients = ref.dlrm(model, step.dense, step.ids, step.bags, step.labels)
    assert logits.dtype == torch.float32
    assert error(logits.detach(), exact) < {"activations": 14, "self interaction": 8}.get(name, 4) * UNIT
    assert float(loss.detach()) == pytest.approx(float(exact_loss), rel=4 * UNIT)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, parameter_name
        assert error(parameter.grad, gradients[parameter_name]) < (0.4 if name == "activations" else 0.25), (
            parameter_name
        )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "activations"])
def test_without_sign_changes_the_gradients_are_sharp(path, name):
    """All numbers positive: no ReLU near 0, nothing cancels. At most 7 layers, two roundings forward and two backward
    in each, would give 28 units if all pointed one way.
    """
    model, batch = build(name), make_batch(build(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        [*model.top][-1].weight.mul_(1e-3)
    dense = batch.dense.abs()
    logits = model(dense, batch.ids, batch.bags)
    nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
    exact, _, gradients = ref.dlrm(model, dense, batch.ids, batch.bags, batch.labels)
    assert error(logits.detach(), exact) < 4 * UNIT
    for parameter_name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[parameter_name]) < 8 * UNIT, parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_that_of_fp32_bit_for_bit(path, name):
    model, other = build(name), build(name, precision="fp32")
    batch = make_batch(model)
    for part in (model, other):
        part.train()
    model(batch.dense, batch.ids, batch.bags)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.inference_mode():
        found = model.eval()(batch.dense, batch.ids, batch.bags)
        assert torch.equal(found, other.eval()(batch.dense, batch.ids, batch.bags))
    trained = model.train()(batch.dense, batch.ids, batch.bags)
    if name not in ("no dense, cat", "one layer"):
        assert not torch.equal(trained, found)


def test_logits_are_not_rounded_to_bf16(path):
    model = build("dot")
    batch = make_batch(model)
    logits = model(batch.dense, batch.ids)
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert len(logits.unique()) > 60


def in_bf16(layer, x):
    """ReLU of the layer, as a model in bf16 computes it."""
    stack = QuantMLP(layer, nn.ReLU())
    stack.bf16 = True
    found = stack(x)
    assert found.dtype == torch.bfloat16
    return found.detach()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_quantized_weights_lose_nothing_in_bf16(path, bits, granularity):
    """The identity shows the weights: code * scale, rounded once."""
    layer = QuantLinear(40, 30, bits=bits, granularity=granularity)
    nn.init.zeros_(layer.bias)
    found = in_bf16(layer, torch.eye(40)) - in_bf16(layer, -torch.eye(40))
    scale = layer.current_scale()
    codes = torch.from_numpy(ref.codes(ref.array(layer.weight), ref.array(scale)[:, None], bits))
    assert torch.equal(found, (codes.float() * scale[:, None]).t().bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_sums_in_fp32(path, bits):
    """Two roundings of the result, however many products: 4096 bf16 additions would be off by far more."""
    layer = QuantLinear(4096, 5, bits=bits)
    x = torch.rand(7, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = ref.fake_quantize(ref.array(layer.weight), ref.array(layer.current_scale())[:, None], bits)
    product, bias = ref.array(x) @ values.T, ref.array(layer.bias)
    exact = product + bias
    bound = UNIT * np.abs(product) + UNIT * np.abs(exact) + 2.0**-20 * (ref.array(x) @ np.abs(values).T) + UNIT**2
    ref.assert_within(ref.array(in_bf16(layer, x)), np.maximum(exact, 0), bound)


@pytest.mark.parametrize("name", ["dot", "cat", "no dense", "bags", "activations", "32 bits"])
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_one(path, name, size):
    model = build(name)
    batch = make_batch(model, size)
    out = model(batch.dense, batch.ids, batch.bags)
    assert out.shape == (size,)
    out.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.to_dense().isfinite().all()


def test_bf16_training_follows_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        model = build("dot", precision=precision)
        step = TrainStep(model, tiny())
        losses[precision] = [float(step(make_batch(model, 128, seed % 4), 0.1)) for seed in range(30)]
    assert losses["bf16"][-1] < losses["bf16"][0]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.01)


# ---- tables


def test_bf16_tables_start_as_the_rounded_fp32_ones():
    half = build("dot", table_dtype=torch.bfloat16).tables.weight
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, build("dot").tables.weight.bfloat16())


@pytest.mark.parametrize("start", [1.0, -3.0, 1e-30, 100.0])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.97])
def test_stochastic_rounding_is_unbiased(path, start, share):
    """A sum `share` of the way to the next number goes there in that share of all draws, in each column alike."""
    start = torch.tensor(start).bfloat16()
    step = (start.view(torch.int16) + 1).view(torch.bfloat16).float() - start.float()
    seeds, shape = 400, (30, 16)
    rows, up = torch.arange(30), torch.zeros(shape)
    for seed in range(seeds):
        weight = start.expand(shape).clone()
        add_rows_stochastic(weight, rows, (share * step).expand(shape).contiguous(), 1.0, seed * 0x85EBCA77 % 2**32)
        moved = weight.float() - start.float()
        assert ((moved == 0) | (moved == step)).all()
        up += moved != 0
    deviation = (share * (1 - share) / seeds) ** 0.5
    assert abs(up.mean() / seeds - share) < 4 * deviation / up.numel() ** 0.5 + 2.0**-16
    assert ((up / seeds - share).abs() < 5 * deviation + 2 / seeds).all()


def test_updates_below_the_precision_arrive_on_average(path):
    """0.01 of a rounding step, 1500 times: rounded to nearest, the weight would never move."""
    weight = nn.Parameter(torch.ones(20, 16, dtype=torch.bfloat16))
    optimizer, rows = SparseSGD([weight], 1.0, seed=1), torch.arange(20)
    update = torch.full((20, 16), -0.01 * 2.0**-7).bfloat16()
    for _ in range(1500):
        weight.grad = torch.sparse_coo_tensor(rows[None], update, weight.shape, check_invariants=True)
        optimizer.step()
    moved = (weight.detach().float() - 1) * 2.0**7
    exact = -1500 * float(update[0, 0]) * 2.0**7
    assert abs(moved.mean() - exact) < 5 * (exact / moved.numel()) ** 0.5
    assert 0.5 * exact < moved.var() < 2 * exact


def test_numbers_that_bf16_has_stay_exact(path):
    start = torch.tensor([[0.0, -0.0, 1.0, -2.5, 1e30, -1e-30, 2.0**-126, 2.0**-133]]).bfloat16()
    for seed in (0, 1, 2**32 - 1, 77):
        weight = start.clone()
        add_rows_stochastic(weight, torch.tensor([0]), torch.ones(1, 8), 0.0, seed)
        assert torch.equal(weight, start)
        add_rows_stochastic(weight, torch.tensor([0]), start.float(), 1.0, seed)
        assert torch.equal(weight.float(), 2 * start.float())


def test_infinity_and_nan_show(path):
    inf, nan = float("inf"), float("nan")
    weight = torch.tensor([[1.0, 1.0, 1.0, inf, -inf, nan, inf]]).bfloat16()
    add_rows_stochastic(weight, torch.tensor([0]), torch.tensor([[inf, -inf, nan, 1.0, 1.0, 1.0, -inf]]), 1.0, 5)
    expected = torch.tensor([[inf, -inf, nan, inf, -inf, nan, nan]])
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(weight[~expected.isnan()].float(), expected[~expected.isnan()])


@pytest.mark.parametrize("rule", list(OPTIMIZERS))
def test_a_restored_optimizer_continues_with_the_same_bits(rule):
    """After more steps than bf16 can count one by one (256)."""
    config = replace(tiny(optimizer=rule).optimizer, learning_rate=0.01)

    def steps(weight, optimizer, numbers):
        for number in numbers:
            values = torch.randn(3, 4, generator=torch.Generator().manual_seed(number)).bfloat16()
            weight.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2, 1]]), values, (5, 4), check_invariants=True)
            optimizer.step()

    whole = nn.Parameter(torch.ones(5, 4, dtype=torch.bfloat16))
    optimizer = build_optimizers([whole], [nn.Parameter(torch.zeros(1))], config)[0]
    steps(whole, optimizer, range(300))
    cut, saved = nn.Parameter(whole.detach().clone()), copy.deepcopy(optimizer.state_dict())
    restored = build_optimizers([cut], [nn.Parameter(torch.zeros(1))], config)[0]
    restored.load_state_dict(saved)
    for name, value in optimizer.state[whole].items():
        assert restored.state[cut][name].dtype == value.dtype, name
        assert torch.equal(restored.state[cut][name], value), name
    steps(whole, optimizer, range(300, 320))
    steps(cut, restored, range(300, 320))
    assert torch.equal(whole, cut)


@pytest.mark.parametrize(
    ("rule", "precision"), [("sgd", "bf16"), ("adagrad", "fp32"), ("rowwise_adam", "bf16"), ("dense_adam", "fp32")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(generated, tmp_path, rule, precision):
    config = tiny(
        optimizer=rule, table_dtype="bf16", precision=precision, checkpoint_every=4, max_steps=11, table_l2=1e-3
    )
    config = replace(config, quantization=QATConfig(bits=4, rescan_period=5))
    assert_resumes(generated, tmp_path, config, 7)
    one = last(tmp_path / "cut")
    assert one["weights.safetensors/tables.weight"].dtype == torch.bfloat16
    assert one["weights.safetensors/tables.weight_fake_quantizer.scale"].dtype == torch.float32
    assert one["weights.safetensors/top.0.weight"].dtype == torch.float32
    model, _ = Run.open(tmp_path / "cut").load_model("last")
    assert model.tables.weight.dtype == torch.bfloat16


@NATIVE
@pytest.mark.parametrize("kind", [SparseSGD, SparseAdagrad])
def test_training_bf16_tables_is_the_same_on_both_paths(kind):
    losses, weights = {}, {}
    for path in ("native", "plain"):
        with on(path):
            model = build("bags", precision="fp32", table_dtype=torch.bfloat16)
            step = TrainStep(model, tiny(optimizer="sgd" if kind is SparseSGD else "adagrad"))
            losses[path] = [float(step(make_batch(model, 64, seed), 0.05)) for seed in range(8)]
            weights[path] = model.tables.weight.detach().float()
    np.testing.assert_allclose(losses["native"], losses["plain"], rtol=1e-3)
    # Sums in another order: a draw may fall to the other neighbour (2**-7 apart) now and then.
    assert (weights["native"] != weights["plain"]).float().mean() < 0.02
