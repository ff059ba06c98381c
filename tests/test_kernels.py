"""The compiled kernels against slow references in numpy, against plain torch, and for any number of threads."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch

import reference as ref
from dqrm import kernels
from dqrm.models.interaction import dot_interaction, pairs
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear, quantized_weight
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.ranges import max_abs
from dqrm.quant.uniform import code_limits, fake_quantize, scale_from_max
from dqrm.training.optimizers import SparseAdagrad, SparseSGD, add_rows, add_rows_stochastic, sum_duplicates

NATIVE = pytest.mark.skipif(not kernels.native(), reason="the kernels cannot be built here")
PATHS = pytest.mark.parametrize("path", [pytest.param("native", marks=NATIVE), "plain"])
ODD = [0.0, -0.0, 1e-45, 1e-30, -1e-8, 1.0, -1e30, 3.4e38, float("inf"), -float("inf"), float("nan")]


@contextmanager
def on(path):
    """Run in compiled code, or as on a machine without a compiler."""
    if path == "native":
        assert kernels.native()
        yield
    else:
        with patch("dqrm.kernels.library", lambda: None):
            yield


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(one, two):
    """The same numbers, NaN for NaN."""
    assert (one is None) == (two is None)
    if one is None:
        return
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    assert torch.equal(torch.isnan(one), torch.isnan(two))
    assert torch.equal(torch.where(torch.isnan(one), 0, one), torch.where(torch.isnan(two), 0, two))


def both(function):
    """What `function` gives natively, after it gave the same in plain torch."""
    with on("plain"):
        plain = function()
    with on("native"):
        native = function()
    for one, two in zip(plain, native, strict=True):
        same(one, two)
    return native


def random_rows(rows, dim, seed=0, dtype=torch.float32):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def collection(table_rows, dim, *, odd=False, dtype=torch.float32, **options):
    weight = random_rows(sum(table_rows), dim, seed=dim)
    if odd:
        choice = torch.randint(len(ODD), weight.shape, generator=torch.Generator().manual_seed(1))
        weight = torch.tensor(ODD)[choice]
    return QuantEmbeddingBagCollection(table_rows, dim, _weight=weight.to(dtype), **options)


def random_ids(table_rows, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(rows, (batch,), generator=generator) for rows in table_rows]
    return torch.stack(columns, 1).to(dtype)


# ---- lookup


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("table_rows", "batch", "dims"),
    [((1,), 5, (3, 16)), ((7,), 129, (1, 64)), ((3, 1, 50, 2), 129, (16, 17)), ((9, 4), 0, (3,)), ((5, 6), 1, (17,))],
)
def test_lookup_is_exact_and_the_same_in_plain_torch(table_rows, batch, dims, dtype, bits):
    for dim, ids_dtype in zip(dims, (torch.int32, torch.int64)):
        tables = collection(table_rows, dim, dtype=dtype, bits=bits)
        ids = random_ids(table_rows, batch, ids_dtype)

        def run(tables=tables, ids=ids):
            tables.weight.grad = None
            out = tables(ids)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            return out.detach(), tables.weight.grad.to_dense(), tables.scale.clone()

        found, grad, scale = both(run)
        assert found.dtype == torch.float32
        assert grad.dtype == dtype
        for number in range(len(table_rows)):
            table = ref.array(tables.table(number))
            if bits != 32:
                ref.assert_scale(scale[number], np.abs(table).max(), bits)
            flat = ids[:, number].numpy().reshape(-1, 1)
            ref.assert_pooled(
                ref.array(found[:, number]), table, scale=float(scale[number]), bits=bits, ids=flat,
                bags=ref.bag_positions(flat),
            )  # fmt: skip


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_odd_weights_and_scales_give_what_plain_torch_gives(bits, dtype):
    tables = collection((13, 1), 17, odd=True, dtype=dtype, bits=bits)
    tables.eval()
    ids = random_ids((13, 1), 29, torch.int64)

    def run(scale):
        if scale is not None:
            tables.load_state_dict({**tables.state_dict(), "scale": torch.full((2,), scale)})
        return tables(ids).detach(), tables.scale.clone()

    for scale in (None, 0.25, 1e-30, 1e30, 1e-45, float("inf"), float("nan")):
        both(lambda scale=scale: run(scale))


@PATHS
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    ("id", "dtype"),
    [(-1, torch.int32), (5, torch.int32), (2**31 - 1, torch.int32), (-(2**31), torch.int32), (-1, torch.int64),
     (5, torch.int64), (2**40, torch.int64), (-(2**63), torch.int64), (2**63 - 1, torch.int64), (2**32, torch.int64)],
)  # fmt: skip
def test_an_id_outside_its_table_is_refused_by_name(path, bits, id, dtype):
    tables = QuantEmbeddingBagCollection([9, 5, 9], 3, multi=[False, False, True], bits=bits)
    ids, bag = torch.zeros(4, 2, dtype=dtype), (torch.zeros(6, dtype=dtype), torch.arange(4))
    ids[2, 1] = id
    with on(path), pytest.raises(IndexError, match=re.escape(f"id {id} is outside table 1, which has 5 rows")):
        tables(ids, [bag])
    ids[2, 1], bag[0][5] = 4, id if id != 5 else 9
    with on(path), pytest.raises(IndexError, match=re.escape(f"id {bag[0][5]} is outside table 2, which has 9 rows")):
        tables(ids, [bag])
    with on(path):
        bag[0][5] = 8
        tables(ids, [bag])


@PATHS
def test_the_first_of_several_wrong_ids_is_named(path):
    tables = QuantEmbeddingBagCollection([4] * 26, 16)
    ids = torch.zeros(2048, 26, dtype=torch.int32)
    ids[1999, 3], ids[400, 25], ids[401, 0] = 7, 8, 9
    with on(path), threads(3), pytest.raises(IndexError, match="id 8 is outside table 25"):
        tables(ids)


@PATHS
def test_ids_may_lie_in_any_memory_layout(path):
    tables = collection((6, 7, 8), 3)
    ids = random_ids((6, 7, 8), 9, torch.int64)
    with on(path):
        expected = tables(ids)
        for other in (ids.t().contiguous().t(), torch.stack([ids, ids * 0], -1)[..., 0], ids.repeat(2, 1)[9:]):
            assert torch.equal(tables(other), expected)


@PATHS
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_narrow_ids_mean_what_they_say(path, dtype):
    """Not the bytes of some int32."""
    tables, ids = collection((6, 7, 8), 3), random_ids((6, 7, 8), 9, torch.int64)
    with on(path):
        assert torch.equal(tables(ids.to(dtype)), tables(ids))


@PATHS
@pytest.mark.parametrize("module", ["collection", "embedding"])
def test_ids_that_are_no_integers_are_refused(path, module):
    made = QuantEmbedding(6, 3, sparse=True) if module == "embedding" else QuantEmbeddingBagCollection([6], 3)
    ids = torch.zeros((4,) if module == "embedding" else (4, 1))
    with on(path), pytest.raises((RuntimeError, TypeError, ValueError)):
        made(ids)


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@NATIVE
def test_what_the_kernels_cannot_take_is_refused_and_never_crashes():
    """As plain torch refuses it; in a process of its own, since a wrong write ends it."""
    code = """
import torch
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.training.optimizers import add_rows
collection = QuantEmbeddingBagCollection([6], 3, bits=32)
calls = {
    "bf16 values": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bfloat16)),
    "other width": lambda: add_rows(torch.zeros(4, 99999), torch.zeros(9, dtype=torch.int64), torch.ones(9, 1)),
    "row outside": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1 << 40]), torch.ones(2, 2)),
    "other device": lambda: collection(torch.zeros(4, 1, dtype=torch.int64, device="meta")),
}
narrow = add_rows(torch.zeros(50, 4), torch.arange(9, 49, dtype=torch.int32), torch.ones(40, 4))
assert narrow[9:49].eq(1).all() and narrow.sum() == 160
for name, call in calls.items():
    try:
        call()
        print("taken:", name, flush=True)
    except Exception:
        print("refused:", name, flush=True)
"""
    status, out, _ = run_python(code)
    assert "taken" not in out, out
    assert status == 0, out


@NATIVE
def test_a_traced_model_computes_and_does_not_replay_memory():
    """torch.jit.trace (torch's older ONNX exporter uses it) cannot see into a kernel."""
    code = """
import torch
from dqrm.config import ModelConfig
from dqrm.models.dlrm import DLRM
model = DLRM(3, [7, 9], config=ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))).eval()
model(torch.randn(5, 3), torch.randint(7, (5, 2)))
traced = torch.jit.trace(model, (torch.randn(5, 3), torch.randint(7, (5, 2))), check_trace=False)
dense, ids = torch.randn(5, 3), torch.randint(7, (5, 2))
torch.testing.assert_close(traced(dense, ids), model(dense, ids))
"""
    status, _, error = run_python(code)
    assert status == 0, error[-500:]


# ---- sums and updates of rows

GRADIENTS = {
    "none": (torch.zeros(0, dtype=torch.int64), 3),
    "one": (torch.tensor([4]), 16),
    "all the same": (torch.full((129,), 7), 17),
    "hot row": (torch.where(torch.arange(700) % 3 > 0, 5, torch.arange(700)), 3),
    "random": (torch.randint(40, (500,), generator=torch.Generator().manual_seed(3)), 16),
    "wide": (torch.randint(900, (600,), generator=torch.Generator().manual_seed(4)), 64),
    "falling": (torch.arange(300).flip(0), 1),
}


@PATHS
@pytest.mark.parametrize("name", GRADIENTS)
def test_duplicates_are_summed_in_input_order(path, name):
    rows, dim = GRADIENTS[name]
    values = random_rows(len(rows), dim, seed=1) * 10.0 ** torch.linspace(-4, 4, len(rows))[:, None]
    with on(path):
        found_rows, found = sum_duplicates(rows, values)
    expected_rows, expected = ref.sequential_sums(rows.numpy(), values.numpy())
    assert found_rows.tolist() == expected_rows.tolist()
    np.testing.assert_array_equal(found.numpy(), expected)


@PATHS
@pytest.mark.parametrize("largest", [2**11 - 1, 2**11, 2**22, 2**33, 2**36 - 1, 2**36, 2**62])
def test_rows_of_any_size_are_sorted(path, largest):
    rows = torch.tensor([largest, 3, largest - 1, 0, 3, largest, largest // 2, 1])
    values = torch.arange(8.0)[:, None].expand(-1, 2).contiguous()
    with on(path):
        found_rows, found = sum_duplicates(rows, values)
    expected_rows, expected = ref.sequential_sums(rows.numpy(), values.numpy())
    assert found_rows.tolist() == expected_rows.tolist()
    np.testing.assert_array_equal(found.numpy(), expected)


def test_odd_values_are_summed_too():
    values = torch.tensor(ODD)[torch.randint(len(ODD), (60, 5), generator=torch.Generator().manual_seed(0))]
    if kernels.native():
        rows = torch.arange(60) % 7
        found = both(lambda: sum_duplicates(rows, values))[1]
        with np.errstate(all="ignore"):
            expected = ref.sequential_sums(rows.numpy(), values.numpy())[1]
        np.testing.assert_array_equal(found.numpy(), expected)


@PATHS
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("factor", [1.0, -0.1])
def test_rows_are_added_in_input_order(path, name, factor):
    rows, dim = GRADIENTS[name]
    values, target = random_rows(len(rows), dim, seed=1), random_rows(901, dim, seed=2)
    expected = target.numpy().copy()
    for row, value in zip(rows.tolist(), values.numpy()):
        expected[row] += value * np.float32(factor)
    with on(path):
        add_rows(target, rows, values, factor)
    np.testing.assert_array_equal(target.numpy(), expected)


@NATIVE
@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "none"])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_stochastic_rounding_has_the_bits_of_plain_torch(name, seed):
    rows, dim = GRADIENTS[name]
    rows = rows.unique()
    values = random_rows(len(rows), dim, seed=1)
    start = random_rows(901, dim, seed=2, dtype=torch.bfloat16)
    (found,) = both(lambda: (add_rows_stochastic(start.clone(), rows, values, -0.01, seed),))
    with np.errstate(all="ignore"):
        exact = start[rows].float().numpy() + values.numpy() * np.float32(-0.01)
    inner, outer = ref.bf16_neighbours(exact)
    new = found[rows].float().numpy()
    assert ((new == inner) | (new == outer)).all()
    untouched = torch.ones(901, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(found[untouched], start[untouched])


@NATIVE
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_optimizers_give_the_bits_of_plain_torch(rule, l2, dtype):
    rows, dim = GRADIENTS["hot row"]

    def run():
        weight = torch.nn.Parameter(random_rows(701, dim, seed=5, dtype=dtype))
        kind = SparseSGD if rule == "sgd" else SparseAdagrad
        options = {} if rule == "sgd" else {"rowwise": rule == "rowwise"}
        optimizer = kind([weight], 0.1, l2, seed=3, **options)
        for step in range(5):
            values = random_rows(len(rows), dim, seed=step, dtype=dtype)
            weight.grad = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=True)
            optimizer.step()
        return [weight.detach(), *(value for value in optimizer.state[weight].values())]

    both(run)


# ---- maxima


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (15, 3), (16, 16), (17, 17), (1000, 3)])
def test_the_exact_scale_is_of_the_largest_magnitude(path, rows, dim, dtype):
    tables = collection((rows, 2), dim, dtype=dtype, scale_period=1)
    with torch.no_grad():
        tables.weight[rows - 1, dim - 1] = -50
    with on(path):
        tables.only_looked_up_rows_change()
        tables(torch.zeros(1, 2, dtype=torch.int64))
    ref.assert_scale(tables.scale[0], 50, 4)
    ref.assert_scale(tables.scale[1], np.abs(ref.array(tables.table(1))).max(), 4)


@NATIVE
@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_maxima_of_odd_numbers(value, dtype):
    table = torch.full((33, 3), 1e-9).to(dtype)
    table[20, 1] = value
    maxima, dirty = torch.zeros(3), torch.ones(3, dtype=torch.uint8)
    found = torch.tensor(kernels.blocks_max(table, 16, dirty, maxima))
    same(found, max_abs(table))
    same(maxima, torch.stack([max_abs(part) for part in table.split(16)]))
    assert not dirty.any()
    per_table = scale_from_max(torch.zeros(2), 4)
    ranges = kernels.TableRanges(torch.tensor([0, 20]), per_table, 7)
    kernels.raise_scales(torch.tensor([1, 20, 2, 32]), table, ranges)
    same(per_table, scale_from_max(torch.stack([max_abs(table[:20]), max_abs(table)]), 4))
    kept = torch.tensor([2.0, 1e30])
    kernels.raise_scales(torch.tensor([1, 21]), table, kernels.TableRanges(torch.tensor([0, 20]), kept, 7))
    assert kept.tolist() == [2.0, torch.tensor(1e30).item()]


# ---- linear layers


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 3), (64, 300), (512, 64)])
def test_linear_weights_have_the_codes_of_plain_torch(bits, per_channel, shape):
    weight = random_rows(*shape) * 10.0 ** torch.linspace(-9, 3, shape[0])[:, None]
    weight[0, :] = 0
    for codes in [False] if bits == 16 else [False, True]:
        found, scale = both(lambda codes=codes: quantized_weight(weight, bits, per_channel, codes))
        maxima = np.abs(ref.array(weight)).max(1 if per_channel else None)
        ref.assert_scale(scale, np.atleast_1d(maxima), bits)
        if codes:
            assert found.dtype == torch.bfloat16
            ref.assert_codes(ref.array(found), ref.array(weight), ref.array(scale)[:, None], bits)
            low, high = code_limits(bits)
            assert (found.min() >= low) & (found.max() <= high)
        else:
            assert torch.equal(found, fake_quantize(weight, scale[:, None], bits))


@NATIVE
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
def test_linear_weights_that_are_no_numbers_show(per_channel):
    weight = torch.tensor(ODD)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    found, _ = both(lambda: quantized_weight(weight, 4, per_channel, False))
    assert found[-1].isnan().all()


@NATIVE
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("batch", "outputs"), [(0, 3), (1, 1), (5, 17), (129, 64), (65, 513)])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
def test_the_end_of_a_bf16_layer(batch, outputs, per_channel, relu):
    y = random_rows(batch, outputs, dtype=torch.bfloat16)
    scale = random_rows(outputs if per_channel else 1, 1, seed=2).abs()[:, 0]
    bias = random_rows(outputs, 1, seed=3)[:, 0]
    expected = (y.float() * scale + bias).bfloat16()
    kernels.finish_linear(y, scale, bias, relu)
    same(y, expected.relu() if relu else expected)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "outputs"), [(0, 3), (1, 1), (5, 17), (129, 64), (65, 513)])
@pytest.mark.parametrize("scales", ["none", "tensor", "channel"])
@pytest.mark.parametrize("relu", [True, False])
def test_the_start_of_a_layers_backward(batch, outputs, dtype, scales, relu):
    grad, y = random_rows(batch, outputs, dtype=dtype), random_rows(batch, outputs, seed=1, dtype=dtype).relu()
    count = {"none": 0, "tensor": 1, "channel": outputs}[scales]
    scale = random_rows(count, 1, seed=2)[:, 0] if count else None
    masked, scaled, bias_grad = kernels.start_linear(grad, y if relu else None, scale)
    expected = torch.where(y > 0, grad, 0) if relu else grad
    same(masked, expected)
    same(scaled, expected if scale is None else (expected.float() * scale).to(dtype))
    assert bias_grad.dtype == torch.float32
    exact = ref.array(expected).sum(0)
    np.testing.assert_allclose(
        bias_grad, exact, rtol=0, atol=2.0**-22 * (1 + np.abs(ref.array(expected)).sum(0).max(initial=0))
    )


@NATIVE
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(("inputs", "outputs", "batch"), [(1, 1, 1), (17, 3, 5), (64, 300, 129), (5, 7, 0)])
@pytest.mark.parametrize("relu", [True, False])
def test_a_layer_with_its_relu_equals_the_layer_and_then_relu(bits, inputs, outputs, batch, relu):
    layer = QuantLinear(inputs, outputs, bits=bits)
    results = []
    for fused in (True, False):
        x = random_rows(batch, inputs, seed=4).requires_grad_()
        y = (QuantMLP(layer, torch.nn.ReLU()) if relu else QuantMLP(layer))(x) if fused else layer(x)
        y = y.relu() if relu else y
        grads = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), [x, *layer.parameters()]
        )
        results.append([y, *grads])
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


# ---- interaction


@PATHS
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("with_dense", [True, False], ids=["dense", "no dense"])
@pytest.mark.parametrize("tables", [1, 2, 5, 26])
def test_interaction_and_its_gradients(path, half, self_interaction, with_dense, tables):
    if half and not with_dense:
        pytest.skip("without dense columns it is float32")
    for batch, dim in [(0, 3), (1, 1), (5, 3), (3, 16), (5, 17), (2, 64)]:
        vectors = random_rows(batch * tables, dim, seed=1).view(batch, tables, dim).requires_grad_()
        dtype = torch.bfloat16 if half else torch.float32
        dense = random_rows(batch, dim, seed=2, dtype=dtype).requires_grad_() if with_dense else None
        with on(path):
            chosen = pairs(tables + with_dense, self_interaction)
            out = dot_interaction(dense, vectors, chosen, self_interaction)
            weights = random_rows(batch, out.shape[1], seed=3, dtype=out.dtype)
            out.backward(weights)
        d, t, g = (None if x is None else ref.array(x) for x in (dense, vectors, weights))
        assert out.dtype == dtype
        # float32 sums of `dim` (forward) or `tables` (backward) products; bf16: each factor and the result rounded,
        # 2**-9 each, in the plain path products too.
        unit = 2.0**-6 if half else 2.0**-21
        bound = ref.interact(None if d is None else np.abs(d), np.abs(t), self_interaction)
        ref.assert_within(ref.array(out), ref.interact(d, t, self_interaction), unit * bound)
        expected = ref.interact_gradients(g, d, t, self_interaction)
        bound = ref.interact_gradients(np.abs(g), None if d is None else np.abs(d), np.abs(t), self_interaction)
        assert vectors.grad.dtype == torch.float32
        ref.assert_within(ref.array(vectors.grad), expected[:, int(with_dense) :], unit * bound[:, int(with_dense) :])
        if dense is not None:
            ref.assert_within(ref.array(dense.grad), expected[:, 0], unit * bound[:, 0])


@NATIVE
def test_interaction_of_numbers_that_overflow_shows_them():
    vectors = torch.full((2, 3, 4), 1e30)
    vectors[1, 0, 0] = float("nan")
    out = dot_interaction(None, vectors, pairs(3, False), False)
    assert out[0].isinf().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2].isinf()


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_at_the_middle_between_two_are_those_of_a_division(bits):
    """Which rules out a product with 1 / scale, that may round to the other code."""
    high = 2 ** (bits - 1) - 1
    middles = torch.arange(-high, high).float() + 0.5
    for largest in (1.0, 0.37, 1e-7, 3e-39, 2.9e38):
        scale = scale_from_max(torch.tensor(largest), bits)
        weight = [torch.tensor([largest])]
        for ulps in range(-3, 4):
            line = middles * scale
            for _ in range(abs(ulps)):
                line = torch.nextafter(line, torch.full_like(line, float("inf") if ulps > 0 else float("-inf")))
            weight.append(line.clamp(-largest, largest))
        weight = torch.cat(weight)[None]
        for codes in (False, True):
            found, _ = both(lambda weight=weight, codes=codes: quantized_weight(weight, bits, True, codes))
            same(found, (weight / scale).round().bfloat16() if codes else (weight / scale).round() * scale)


# ---- threads


def everything(seed=0):
    """One call of each kernel on more than they ask for before they use threads; all that comes out."""
    rows = torch.randint(3000, (2000,), generator=torch.Generator().manual_seed(seed))
    values, table = random_rows(2000, 17, seed), random_rows(3000, 17, seed + 1)
    out = [*sum_duplicates(rows, values), add_rows(table.clone(), rows, values, -0.3)]
    unique = rows.unique()
    out.append(add_rows_stochastic(table.bfloat16(), unique, values[: len(unique)], 0.1, 7))
    maxima = torch.full((5,), 1e-3)
    ranges = kernels.TableRanges(torch.tensor([0, 1, 700, 701, 2500]), maxima, 7)
    kernels.raise_scales(rows, table, ranges)
    out.append(maxima.clone())
    kernels.add_rows(table.clone(), rows, values, -0.3, ranges)
    out.append(maxima.clone())
    kernels.add_rows_stochastic(table.bfloat16(), unique, values[: len(unique)], 0.5, 7, ranges)
    blocks, dirty = torch.zeros(188), torch.ones(188, dtype=torch.uint8)
    out += [maxima, torch.tensor(kernels.blocks_max(table, 16, dirty, blocks)), blocks]
    for per_channel in (True, False):
        out += quantized_weight(table, 4, per_channel, True)
    y = table.bfloat16()
    scale = scale_from_max(table.abs().amax(0), 4)
    kernels.finish_linear(y, scale, scale, True)
    wide, mask = random_rows(101, 333, seed), random_rows(101, 333, seed + 3)
    out += [y, *kernels.start_linear(wide, mask.relu(), random_rows(333, 1)[:, 0])]
    vectors, dense = values[:1989].reshape(153, 13, 17), random_rows(153, 17, seed + 2)
    crossed = kernels.interact(dense, vectors, True, 17 + 105)
    out += [crossed, *kernels.interact_backward(crossed, dense, vectors, True)]
    module = collection((1000, 3000), 17)
    ids = torch.stack([rows % 1000, rows], 1)
    found = module(ids)
    found.sum().backward()
    return [*out, found.detach(), module.weight.grad.coalesce().values()]


@NATIVE
def test_any_number_of_threads_gives_the_same_bits():
    with threads(1):
        expected = everything()
    for count in (1, 2, 3, 2):
        with threads(count):
            for number, (one, two) in enumerate(zip(expected, everything(), strict=True)):
                assert torch.equal(one, two), f"output {number} with {count} threads"
