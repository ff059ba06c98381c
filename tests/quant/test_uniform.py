"""dqrm.quant.uniform against the float64 reference: scales, codes, values, gradients."""

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.uniform import dequantize, fake_quantize, quantize, scale_from_max

WRONG_BITS = [0, 1, 3, 5, 7, 12, 64, -4]
MAGNITUDES = [0.0, 1e-45, 1e-38, 1e-30, 1e-9, 1e-8, 1.0000001e-8, 3e-4, 1.0, 7.0, 12345.678, 1e30, 3.4e38]


def random(*shape, seed=0, factor=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * factor


# --- scales


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("max_abs", MAGNITUDES)
def test_scale_is_the_maximum_over_n(max_abs, bits):
    scale = scale_from_max(torch.tensor(max_abs), bits)
    assert scale.dtype == torch.float32
    assert scale.item() > 0
    ref.assert_scale(ref.array(scale), max_abs, bits)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1), (2, 3, 1)])
def test_scale_keeps_the_shape_of_the_maximum(shape):
    max_abs = random(*shape).abs()
    scale = scale_from_max(max_abs, 4)
    assert scale.shape == shape
    ref.assert_scale(ref.array(scale), max_abs.numpy(), 4)


@pytest.mark.parametrize("bits", ref.BITS)
def test_the_largest_weight_gets_the_largest_code(bits):
    x = torch.tensor([-3.7, 3.7, 0.0])
    codes = quantize(x, scale_from_max(x.abs().max(), bits), bits)
    n = ref.levels(bits)
    assert codes.tolist() == [-n, n, 0]


# --- codes


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (7,), (13, 5), (3, 1, 17), (1009, 3)])
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 1e30])
def test_codes_equal_the_reference(shape, bits, factor):
    x = random(*shape, seed=bits, factor=factor)
    scale = scale_from_max(x.abs().amax(), bits)
    ref.assert_codes(quantize(x, scale, bits).numpy(), x.numpy(), scale.numpy(), bits)


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.int8), (4, torch.int8), (8, torch.int8), (16, torch.int16)])
def test_codes_fit_their_integer_type(bits, dtype):
    codes = quantize(random(9, 2), torch.tensor(0.1), bits)
    assert codes.dtype == dtype
    assert codes.shape == (9, 2)


@pytest.mark.parametrize("bits", ref.BITS)
def test_exact_ties_round_to_the_even_code(bits):
    n = ref.levels(bits)
    halves = torch.arange(-n - 1, n).float() + 0.5
    scale = torch.tensor(0.5)
    codes = quantize(halves * scale, scale, bits)
    assert np.array_equal(codes.numpy(), np.rint(halves.numpy()).astype(np.int64))
    assert (codes % 2 == 0).all()


def test_ties_written_out():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, -0.25, -0.75, -1.25, -1.75, 3.25])
    assert quantize(x, torch.tensor(0.5), 4).tolist() == [0, 2, 2, 4, 0, -2, -2, -4, 6]


@pytest.mark.parametrize("bits", ref.BITS)
def test_every_code_survives_a_round_trip(bits):
    n = ref.levels(bits)
    codes = torch.arange(-n - 1, n + 1).to(torch.int16 if bits == 16 else torch.int8)
    for scale in (torch.tensor(0.5), torch.tensor(0.0123), torch.tensor(7e20), torch.tensor(1e-8 / n)):
        assert torch.equal(quantize(dequantize(codes, scale), scale, bits), codes)


@pytest.mark.parametrize("bits", ref.BITS)
def test_a_stale_scale_clamps_to_minus_n_minus_1_and_n(bits):
    n = ref.levels(bits)
    scale = torch.tensor(0.5)
    beyond = torch.tensor([-n - 3.0, -n - 1.4, -n - 1.0, -n - 0.75, n + 0.75, n + 1.0, n + 3.0]) * scale
    assert quantize(beyond, scale, bits).tolist() == [-n - 1] * 4 + [n] * 3


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("x", [1e30, 3.4e38])
def test_a_quotient_beyond_float32_clamps(bits, x):
    n = ref.levels(bits)
    scale = scale_from_max(torch.tensor(0.0), bits)
    assert quantize(torch.tensor([-x, x]), scale, bits).tolist() == [-n - 1, n]
    assert torch.isfinite(fake_quantize(torch.tensor([-x, x]), scale, bits)).all()


@pytest.mark.parametrize("bits", ref.BITS)
def test_one_huge_outlier_rounds_the_rest_to_zero(bits):
    x = torch.cat([random(50), torch.tensor([-1e30])])
    scale = scale_from_max(x.abs().max(), bits)
    codes = quantize(x, scale, bits)
    assert codes[:-1].count_nonzero() == 0
    assert codes[-1] == -ref.levels(bits)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, 1e-30])
def test_next_to_nothing_becomes_zero_and_never_nan(bits, value):
    x = torch.full((3, 2), value)
    scale = scale_from_max(x.abs().max(), bits)
    assert quantize(x, scale, bits).count_nonzero() == 0
    assert torch.equal(fake_quantize(x, scale, bits), torch.zeros(3, 2))


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("scale_shape", [(1,), (6, 1), (1, 5), (6, 5)])
def test_scales_broadcast(bits, scale_shape):
    x = random(6, 5)
    scale = scale_from_max(random(*scale_shape, seed=1).abs() * 2, bits)
    codes = quantize(x, scale, bits)
    ref.assert_codes(codes.numpy(), x.numpy(), scale.numpy(), bits)
    assert torch.equal(dequantize(codes, scale), codes.float() * scale)


@pytest.mark.parametrize("bits", ref.BITS)
def test_strided_input(bits):
    x = random(8, 6).t()[1::2]
    scale = torch.tensor(0.3)
    assert torch.equal(quantize(x, scale, bits), quantize(x.contiguous(), scale, bits))


# --- values


@pytest.mark.parametrize("bits", ref.BITS)
def test_value_is_code_times_scale(bits):
    x, scale = random(31, 3), torch.tensor(0.0371)
    codes = quantize(x, scale, bits)
    values = dequantize(codes, scale)
    assert values.dtype == torch.float32
    exact = codes.numpy().astype(np.float64) * np.float64(scale.item())
    assert np.array_equal(values.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_fake_quantize_is_quantize_then_dequantize(bits, factor):
    x, scale = random(101, 3), torch.tensor([0.21 * factor])
    values = fake_quantize(x, scale, bits)
    assert values.dtype == torch.float32
    assert torch.equal(values, dequantize(quantize(x, scale, bits), scale))


@pytest.mark.parametrize("bits", ref.BITS)
def test_both_agree_on_the_last_bit_next_to_a_tie(bits):
    """Where the last bit of the quotient decides the code, training must see the code that is stored."""
    n = ref.levels(bits)
    scale = torch.tensor(0.0371)
    ties = (torch.arange(-n - 1, n).float() + 0.5) * scale
    infinity = torch.tensor(float("inf"))
    x = torch.cat([ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    codes = quantize(x, scale, bits)
    ref.assert_codes(codes.numpy(), x.numpy(), scale.numpy(), bits)
    assert torch.equal(fake_quantize(x, scale, bits), dequantize(codes, scale))


@pytest.mark.parametrize("bits", ref.BITS)
def test_the_error_is_at_most_half_a_step(bits):
    x = random(1000)
    scale = scale_from_max(x.abs().max(), bits)
    error = (ref.array(fake_quantize(x, scale, bits)) - ref.array(x)) / ref.array(scale)
    assert np.abs(error).max() <= 0.5 + max(1e-5, 2.0**-24 * 2**bits)


@pytest.mark.parametrize("bits", ref.BITS)
def test_fake_quantize_changes_nothing_the_second_time(bits):
    x, scale = random(200), torch.tensor(0.0917)
    once = fake_quantize(x, scale, bits)
    assert not torch.equal(once, x)
    assert torch.equal(fake_quantize(once, scale, bits), once)


@pytest.mark.parametrize("bits", [*ref.BITS, 32])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_in_nothing_out(bits, shape):
    x = torch.zeros(shape, requires_grad=True)
    out = fake_quantize(x, torch.tensor(1.0), bits)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


# --- gradients


@pytest.mark.parametrize("bits", [*ref.BITS, 32])
def test_the_gradient_passes_unchanged_also_beyond_the_clamp(bits):
    n = ref.levels(min(bits, 16))
    x = (torch.tensor([-5.0, -1.5, -1.0, -0.3, 0.0, 0.4, 1.0, 1.5, 5.0, 1e20]) * n).requires_grad_()
    grad = random(10, seed=3)
    fake_quantize(x, torch.tensor(1.0), bits).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_the_scale_gets_no_gradient(bits, shape):
    x = random(4, 3).requires_grad_()
    scale = torch.full(shape, 0.1, requires_grad=True)
    fake_quantize(x, scale, bits).sum().backward()
    assert scale.grad is None
    assert torch.equal(x.grad, torch.ones(4, 3))


@pytest.mark.parametrize("bits", ref.BITS)
def test_the_gradient_is_that_of_the_next_layer_at_the_quantized_point(bits):
    x, scale = random(50).requires_grad_(), torch.tensor(0.11)
    values = fake_quantize(x, scale, bits)
    (values**3).sum().backward()
    torch.testing.assert_close(x.grad, 3 * values.detach() ** 2)


# --- widths


def test_32_bits_leave_the_input_as_it_is():
    x = torch.tensor([0.1234567, -1e30, 1e-42, 0.0])
    assert torch.equal(fake_quantize(x, torch.tensor(1.0), 32), x)


def test_32_bits_have_no_codes():
    with pytest.raises(ValueError, match="32"):
        quantize(random(3), torch.tensor(1.0), 32)


@pytest.mark.parametrize("bits", WRONG_BITS)
@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_other_widths_are_refused(function, bits):
    with pytest.raises(ValueError, match=rf"(?<!\d){bits}(?!\d)"):
        function(random(3), torch.tensor(1.0), bits)


@pytest.mark.parametrize("bits", WRONG_BITS)
def test_scales_of_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=rf"(?<!\d){bits}(?!\d)"):
        scale_from_max(torch.tensor(1.0), bits)
