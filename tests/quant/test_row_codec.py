"""Rows as messages: bytes and values against the formulas in float64, whatever numbers a row holds."""

import math

import numpy as np
import pytest
import torch

import reference as ref
from dqrm import QATConfig, QuantEmbeddingBagCollection
from dqrm.quant.packing import unpack
from dqrm.quant.row_codec import CODECS, RowCodec
from kernel_helpers import PATHS, on

DIMS = (1, 2, 3, 5, 7, 16, 17, 64)
EXTREME = [
    [0.0, -0.0, 0.0], [1e-8, 0.0, 0.0], [1e-30, -1e-38, 1e-45], [3.4e38, -3.4e38, 1.0], [-1.0, 1e-7, 0.5],
    [0.07, 0.07, 0.07], [-1e-9, 2e-9, 3e-9],
]  # fmt: skip


def rows(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * 10 ** (torch.rand(count, 1, generator=generator) * 8 - 6)


def fp16_up(scale):
    """The smallest float16 that is not below, at most the largest one."""
    nearest = np.minimum(scale, 65504).astype(np.float16)
    up = np.nextafter(nearest, np.float16(np.inf))
    return np.where((nearest.astype(np.float64) < scale) & (nearest < 65504), up, nearest).astype(np.float64)


def expected(values, bits, scale):
    """Scales [N] and values [N, dim] in float64, and by how much a value may miss next to a tie."""
    values = ref.array(values)
    scales = ref.scale_from_max(np.abs(values).max(1, initial=0.0), bits).astype(np.float64)
    scales = fp16_up(scales) if scale == "fp16" else scales
    return scales, ref.fake_quantize(values, scales[:, None], bits), ref.slack(values, scales[:, None], bits)


def compare(codec, values):
    scales, wanted, slack = expected(values, codec.bits, codec.scale)
    message = codec.encode(values)
    assert message.dtype == torch.uint8
    assert message.shape == (len(values), codec.row_bytes)
    found = codec.decode(message)
    np.testing.assert_array_equal(ref.array(codec.scales(values)), scales)
    assert (np.abs(ref.array(found) - wanted) <= slack + np.abs(wanted) * 1e-6).all()
    assert torch.equal(codec.fake_quantize(values), found)
    return message


@PATHS
@pytest.mark.parametrize("scale", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CODECS)
def test_every_dim_against_float64(name, scale, path):
    with on(path):
        for dim in DIMS:
            for count in (0, 1, 33):
                compare(RowCodec(dim, name, scale), rows(count, dim))


@PATHS
@pytest.mark.parametrize("name", CODECS)
def test_extreme_rows(name, path):
    with on(path):
        compare(RowCodec(3, name), torch.tensor(EXTREME))
        compare(RowCodec(3, name, "fp16"), torch.tensor([row for row in EXTREME if max(map(abs, row)) < 1e30]))


@PATHS
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scale", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_and_what_is_no_number_stays_none(name, scale, stochastic, path):
    """A run that diverges must not look as if it did not; the other rows of the message are not affected."""
    values = torch.tensor([[0.0, 0.0, -0.0], [math.nan, 1, 2], [1, math.inf, 2], [-math.inf, 0, 0], [1, -1, 1]])
    with on(path):
        codec = RowCodec(3, name, scale, stochastic)
        found = codec.decode(codec.encode(values, seed=5))
    assert torch.equal(found[0], torch.zeros(3))
    assert found[1:4].isnan().all()
    torch.testing.assert_close(found[4], values[4], rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", CODECS)
def test_an_fp16_scale_clamps_only_beyond_its_largest_number(name):
    codec = RowCodec(2, name, "fp16")
    highest = 2 ** (codec.bits - 1) - 1
    found = codec.decode(codec.encode(torch.tensor([[1e9, -1e9], [60000.0 * highest, 0.0]])))
    assert found[0].tolist() == [65504.0 * highest, -65504.0 * (highest + 1)]
    assert found[1, 0].item() == pytest.approx(60000.0 * highest, rel=1e-3)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dim", [5, 16])
def test_a_row_is_its_packed_codes_and_then_its_scale(name, dim):
    codec, values = RowCodec(dim, name), rows(9, dim)
    message = compare(codec, values)
    codes, scale = message[:, :-4].contiguous(), message[:, -4:].contiguous().view(torch.float32)
    assert torch.equal(unpack(codes, codec.bits, dim) * scale, codec.decode(message))
    # So a message can be cut between any rows, and put together again in any order.
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(codec.encode(values[order]), message[order])
    assert torch.equal(codec.decode(message[order]), codec.decode(message)[order])


def test_bytes_of_a_row():
    sizes = {(dim, name, scale): RowCodec(dim, name, scale).row_bytes
             for dim in (16, 64, 7) for name in CODECS for scale in ("fp32", "fp16")}  # fmt: skip
    assert sizes[16, "int4", "fp32"] * 5.3 < 4 * 16
    assert sizes[64, "int4", "fp32"] * 7 < 4 * 64
    assert sizes[16, "int8", "fp32"] * 3.2 == 4 * 16
    assert sizes[64, "int8", "fp32"] * 3.7 < 4 * 64
    assert sizes[7, "int2", "fp16"] == 2 + 2
    assert sizes[7, "int4", "fp32"] == 4 + 4


@PATHS
@pytest.mark.parametrize("scale", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CODECS)
def test_stochastic_rounding_has_no_bias(name, scale, path):
    values, draws = rows(6, 5, seed=2), 3000
    codec = RowCodec(5, name, scale, stochastic=True)
    with on(path):
        found = codec.decode(codec.encode(values.repeat(draws, 1), seed=3)).view(draws, 6, 5).double()
        assert torch.equal(codec.encode(values, 7), codec.encode(values, 7))
        assert not torch.equal(codec.encode(values, 7), codec.encode(values, 8))
    step = codec.scales(values)[:, None].double()
    assert ((found - values).abs() <= step * 1.0001).all()
    # The mean of so many draws has a standard error of at most half a step / sqrt(draws); 2**-17 is the grain of u.
    assert ((found.mean(0) - values).abs() <= step * (5 * 0.5 / draws**0.5 + 2**-16)).all()


def test_the_gradient_passes_unchanged():
    values, gradient = rows(4, 6).requires_grad_(), rows(4, 6, seed=3)
    codec = RowCodec(6, stochastic=True)
    codec.fake_quantize(values).backward(gradient)
    assert torch.equal(values.grad, gradient)


@PATHS
@pytest.mark.parametrize("name", CODECS)
def test_rows_of_a_quantized_table_with_a_scale_per_row(name, path):
    """What a receiver decodes is what a table on one machine gives in training and in evaluation."""
    table, ids = rows(50, 8), torch.tensor([[3], [49], [3], [0]])
    codec = RowCodec(8, name)
    qat = QATConfig(bits=codec.bits, table_granularity="row")
    with on(path):
        tables = QuantEmbeddingBagCollection([50], 8, _weight=table.clone(), qat=qat)
        for mode in (True, False):
            assert torch.equal(tables.train(mode)(ids)[:, 0], codec.decode(codec.encode(table[ids[:, 0]])))
        assert torch.equal(tables.scale, codec.scales(table))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0,), "dim is 0, expected a whole number, 1 or more"),
        ((4, "int3"), "name is 'int3', expected 'int2' or 'int4' or 'int8'"),
        ((4, "int4", "bf16"), "scale is 'bf16', expected 'fp32' or 'fp16'"),
    ],
)
def test_what_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        RowCodec(*arguments)


def test_tensors_that_are_refused():
    codec = RowCodec(4)
    for method, given, sentence in (
        (codec.encode, torch.zeros(2, 5), r"values are \[2, 5\], expected \[N, 4\]"),
        (codec.encode, torch.zeros(4), r"values are \[4\], expected \[N, 4\]"),
        (codec.scales, torch.zeros(2, 4).double(), "values is torch.float64, expected torch.float32"),
        (codec.decode, torch.zeros(2, 5, dtype=torch.uint8), r"message is \[2, 5\], expected \[N, 6\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            method(given)
