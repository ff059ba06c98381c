"""The ends of a linear layer and the interaction in compiled code, against plain torch and numpy."""

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.kernels import quantize_weights
from dqrm.models.interaction import dot_interaction, pairs
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.uniform import code_limits, fake_quantize, scale_from_max
from kernel_helpers import NATIVE, ODD, PATHS, both, on, random_rows, same

# ---- linear layers


def quantized_weight(weight, bits, per_channel, codes):
    return quantize_weights([weight], [(per_channel, code_limits(bits)[1], codes)])[0]


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
