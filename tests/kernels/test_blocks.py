"""Blocks: scales, codes, residuals and casts against slow numpy references, natively and in plain torch."""

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.distributed.codecs import mix
from dqrm.kernels import (
    Blocks,
    block_scales,
    cast_blocks,
    decode_blocks,
    pack_nibbles,
    quantize_blocks,
    unpack_nibbles,
)
from dqrm.quant.packing import pack
from dqrm.quant.uniform import code_limits
from kernel_helpers import PATHS, on, same

SIZE = 700
SEEDS = [None, 0, 1, 2**31, 2**32 - 1]


def ragged(count, longest, seed, own_keys):
    """So many blocks of 0 to `longest` values, with gaps, in random order; keys as the starts, or elsewhere."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest + 1, count)
    order = random.permutation(count)
    starts = np.cumsum(lengths + 2) - lengths - 2
    keys = np.cumsum(lengths[order] + 3) - lengths[order]
    lengths, starts = lengths[order], starts[order]
    return starts, lengths, keys if own_keys else starts


CASES = {
    "none": ([], [], []),
    "one value": ([3], [1], [3]),
    "one empty": ([3], [0], [3]),
    "empty and single": ([0, 5, 5, 9, 2], [1, 0, 1, 0, 1], [8, 0, 1, 1, 30]),
    "one long": ([17], [617], [60]),
    "ragged": ragged(31, 17, 1, own_keys=False),
    "ragged, keys elsewhere": ragged(31, 17, 2, own_keys=True),
    "pairs": ragged(90, 2, 3, own_keys=True),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
BITS = pytest.mark.parametrize("bits", [4, 8])
STOCHASTIC = pytest.mark.parametrize("seed", [None, 7], ids=["nearest", "stochastic"])


def blocks_of(case):
    return Blocks(*(torch.tensor(np.asarray(part), dtype=torch.int64) for part in CASES[case]))


def numbers(seed, count=SIZE, spread=3):
    """Normal numbers of very different magnitudes."""
    random = np.random.default_rng(seed)
    return torch.from_numpy((random.normal(size=count) * 10 ** random.uniform(-spread, spread, count)).astype("f4"))


def cut(x, blocks, residual=None):
    """What is encoded: the float32 sums x + residual of each block, one array for each."""
    x, found = x.numpy(), []
    for start, length, key in zip(blocks.starts.tolist(), blocks.lengths.tolist(), blocks.keys.tolist()):
        z = np.zeros(length, np.float32)
        for j in range(length):
            z[j] = x[start + j] if residual is None else x[start + j] + residual.numpy()[key + j]
        found.append(z)
    return found


def noise(key, seed):
    """16 bits of murmur3's finalizer of a key and a seed."""
    hashed = (key * 0x9E3779B1 ^ seed) % 2**32
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B % 2**32
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 % 2**32
    return (hashed ^ hashed >> 16) >> 16


def noise_of(blocks, seed):
    return [np.array([noise(key + j, seed) for j in range(length)], np.int64)
            for key, length in zip(blocks.keys.tolist(), blocks.lengths.tolist())]  # fmt: skip


def parts(flat, blocks):
    """What is stored for each block."""
    ends = np.cumsum(blocks.lengths.numpy())
    return np.split(flat.numpy() if flat.dtype != torch.bfloat16 else flat.float().numpy(), ends)[: len(blocks)]


def nearest_bf16(x):
    """Finite float32 numbers at the nearer of their bf16 neighbours, at the even one half-way."""
    inner, outer = ref.bf16_neighbours(x)
    below, above = np.abs(x - inner).astype(np.float64), np.abs(outer.astype(np.float64) - x)
    even = np.asarray(inner, np.float32).view(np.uint32) >> 16 & 1 == 0
    return np.where((below < above) | ((below == above) & even), inner, outer)


# ---- where blocks lie


@EVERY_CASE
def test_blocks_know_where_each_value_lies(case):
    blocks, (starts, lengths, keys) = blocks_of(case), CASES[case]
    expected = [(b, starts[b] + j, keys[b] + j) for b in range(len(starts)) for j in range(lengths[b])]
    assert (len(blocks), blocks.total) == (len(starts), len(expected))
    found = torch.stack([blocks.block, blocks.position, blocks.key], 1)
    assert found.tolist() == [list(map(int, row)) for row in expected]
    assert blocks.offsets.tolist() == [sum(lengths[:b]) for b in range(len(starts))]
    packed = blocks.packed()
    assert packed.position.tolist() == list(range(blocks.total))
    assert packed.key.tolist() == blocks.key.tolist()


def test_keys_are_the_starts_unless_given():
    strided = torch.tensor([[4, 2], [0, 3]])
    blocks = Blocks(strided[:, 0], strided[:, 1])
    assert blocks.key.tolist() == blocks.packed().key.tolist() == blocks.position.tolist() == [4, 5, 0, 1, 2]


# ---- scales and codes


@PATHS
@BITS
@EVERY_CASE
@STOCHASTIC
def test_codes_and_what_they_leave_behind(path, bits, case, seed):
    """Nearest: the reference's codes. Stochastic: floor(z / scale + u). The residual is z - code * scale in float32."""
    x, residual, blocks = numbers(3), numbers(4), blocks_of(case)
    before, z = residual.clone(), cut(x, blocks, residual)
    with on(path):
        alone = block_scales(x, blocks, bits)
        scale = block_scales(x, blocks, bits, residual)
        codes = quantize_blocks(x, blocks, scale, bits, residual, seed)
    ref.assert_scale(alone, [np.abs(part).max(initial=0) for part in cut(x, blocks)], bits)
    ref.assert_scale(scale, [np.abs(part).max(initial=0) for part in z], bits)
    assert (codes.dtype, len(codes)) == (torch.int8, blocks.total)
    low, high = code_limits(bits)
    assert not len(codes) or (codes.min() >= low and codes.max() <= high)
    noises = noise_of(blocks, seed or 0)
    for b, (found, s) in enumerate(zip(parts(codes, blocks), scale.numpy())):
        key, length = int(blocks.keys[b]), int(blocks.lengths[b])
        if seed is None:
            ref.assert_codes(found, z[b], s, bits)
        else:
            u = noises[b].astype(np.float32) / 2**16
            np.testing.assert_array_equal(found, np.clip(np.floor(z[b] / s + u), low, high))
        lost = z[b] - found.astype(np.float32) * s
        np.testing.assert_array_equal(residual.numpy()[key : key + length], lost)
        assert (np.abs(lost) <= s * (0.5 if seed is None else 1) * 1.00001).all()
        before[key : key + length] = residual[key : key + length]
    assert torch.equal(residual, before)  # nothing else was touched


@PATHS
@BITS
def test_halves_go_to_the_even_code(path, bits):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 100, -100, 1000, -1000])
    low, high = code_limits(bits)
    with on(path):
        codes = quantize_blocks(x, Blocks(torch.tensor([0]), torch.tensor([12])), torch.ones(1), bits)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4, 4, min(100, high), max(-100, low), high, low]


@PATHS
@pytest.mark.parametrize("fraction", [0.0625, 0.3, 0.5, 0.98])
@pytest.mark.parametrize("whole", [-5, 0, 3])
def test_stochastic_rounding_is_right_on_average(path, whole, fraction):
    count = 40_000
    x, blocks = torch.full((count,), whole + fraction), Blocks(torch.tensor([0]), torch.tensor([count]))
    with on(path):
        codes = quantize_blocks(x, blocks, torch.ones(1), 8, None, 5)
        few = Blocks(torch.tensor([0]), torch.tensor([60]))
        by_seed = torch.stack([quantize_blocks(x, few, torch.ones(1), 8, None, mix(seed)) for seed in range(600)])
    assert set(codes.tolist()) == {whole, whole + 1}
    # Five standard deviations, and the 16 bits of the noise.
    deviation = (fraction * (1 - fraction)) ** 0.5
    assert abs(codes.double().mean() - x[0]) < 5 * deviation / count**0.5 + 2**-16
    assert (by_seed.double().mean(0) - x[0]).abs().max() < 5 * deviation / 600**0.5 + 2**-16
    assert abs(by_seed.double().mean() - x[0]) < 5 * deviation / 36_000**0.5 + 2**-16


@PATHS
@BITS
def test_noise_goes_by_seed_and_key_and_not_by_the_order_of_blocks(path, bits):
    x, blocks = numbers(5), blocks_of("ragged, keys elsewhere")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(blocks)))
    other = Blocks(blocks.starts[order], blocks.lengths[order], blocks.keys[order])
    with on(path):
        scale = block_scales(x, blocks, bits)
        one, two, three = (quantize_blocks(x, blocks, scale, bits, None, seed) for seed in (8, 8, 9))
        shuffled = quantize_blocks(x, other, scale[order], bits, None, 8)
        casts = [cast_blocks(x, blocks, torch.bfloat16, None, seed) for seed in (8, 8, 9)]
    assert torch.equal(one, two)
    assert (one != three).any()
    for at, b in enumerate(order.tolist()):
        np.testing.assert_array_equal(parts(shuffled, other)[at], parts(one, blocks)[b])
    assert torch.equal(casts[0], casts[1])
    assert (casts[0] != casts[2]).any()


@PATHS
@BITS
@STOCHASTIC
def test_no_code_is_outside_the_limits_on_a_scale_that_is_too_small(path, bits, seed):
    x, blocks = numbers(6, spread=0), blocks_of("ragged")
    with on(path):
        codes = quantize_blocks(x, blocks, block_scales(x, blocks, bits) / 100, bits, None, seed)
    assert (int(codes.min()), int(codes.max())) == code_limits(bits)


@PATHS
@BITS
@STOCHASTIC
def test_tiny_blocks_become_zeros_and_a_residual_keeps_them(path, bits, seed):
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-42, 0, 0]).abs()  # a negative one may become code -1
    blocks, residual = Blocks(torch.tensor([0, 2, 4, 6]), torch.tensor([2, 2, 2, 2])), torch.zeros(8)
    with on(path):
        scale = block_scales(x, blocks, bits)
        codes = quantize_blocks(x, blocks, scale, bits, residual, seed)
    ref.assert_scale(scale, [1e-8] * 4, bits)
    assert not codes.any()
    assert torch.equal(residual, x)


@PATHS
@BITS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_shows_in_its_block_and_in_no_other(path, bits, value):
    x, out = torch.tensor([1.0, value, 1e30, -1e30, 3.4e38, 2.0]), torch.zeros(6)
    blocks = Blocks(torch.tensor([0, 2, 4]), torch.tensor([2, 2, 2]))
    with on(path):
        scale = block_scales(x, blocks, bits)
        decode_blocks(quantize_blocks(x, blocks, scale, bits), blocks, out, scale)
    assert out[:2].isnan().all()
    same(scale[:1], torch.tensor([abs(value)]))
    np.testing.assert_allclose(out[2:], [1e30, -1e30, 3.4e38, 0], rtol=1e-6)


# ---- casts


@PATHS
@EVERY_CASE
@STOCHASTIC
def test_casts_to_bf16_and_what_they_leave_behind(path, case, seed):
    x, residual, blocks = numbers(7), numbers(8), blocks_of(case)
    x[::3] = (x[::3].view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)  # half-way between two
    residual[::2] = 0
    z = cut(x, blocks, residual)
    with on(path):
        out = cast_blocks(x, blocks, torch.bfloat16, residual, seed)
    assert (out.dtype, len(out)) == (torch.bfloat16, blocks.total)
    for b, found in enumerate(parts(out, blocks)):
        key, (inner, outer) = int(blocks.keys[b]), ref.bf16_neighbours(z[b])
        if seed is None:
            np.testing.assert_array_equal(found, nearest_bf16(z[b]))
        else:
            away = z[b].view(np.uint32).astype(np.int64) % 2**16 + noise_of(blocks, seed)[b] >= 2**16
            np.testing.assert_array_equal(found, np.where(away, outer, inner))
        np.testing.assert_array_equal(residual.numpy()[key : key + len(found)], z[b] - found)


@PATHS
def test_stochastic_casts_are_right_on_average(path):
    for value in (1.001, -3.3e-5, 7e20, 1.00390625, 1e-39):
        x, blocks = torch.full((40_000,), value), Blocks(torch.tensor([0]), torch.tensor([40_000]))
        with on(path):
            found = cast_blocks(x, blocks, torch.bfloat16, None, 3).double()
        inner, outer = (float(side) for side in ref.bf16_neighbours(x[0].numpy()))
        assert set(found.tolist()) == {inner, outer}
        fraction = (float(x[0]) - inner) / (outer - inner)
        bound = 5 * (fraction * (1 - fraction) / 40_000) ** 0.5
        assert abs(float(found.mean()) - float(x[0])) < bound * abs(outer - inner)


@PATHS
@EVERY_CASE
def test_fp32_loses_nothing(path, case):
    x, residual, blocks = numbers(9), numbers(10), blocks_of(case)
    z = cut(x, blocks, residual)
    with on(path):
        out = cast_blocks(x, blocks, torch.float32, residual, 7)
        assert torch.equal(cast_blocks(x, blocks, torch.float32, None, 7), x[blocks.position])
    np.testing.assert_array_equal(out.numpy(), np.concatenate([*z, np.zeros(0, "f4")]))
    assert not residual[blocks.key].any()


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@STOCHASTIC
def test_infinities_and_nan_stay_what_they_are(path, dtype, seed):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0])
    blocks, residual = Blocks(torch.tensor([0, 3]), torch.tensor([3, 3])), torch.zeros(6)
    with on(path):
        same(cast_blocks(x, blocks, dtype, None, seed).float(), x)
        same(cast_blocks(x, blocks, dtype, residual, seed).float(), x)
    assert not residual[3:].any()
    if dtype == torch.float32:
        assert not residual.any()


# ---- decoding, packing


@PATHS
@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_decoding_writes_where_the_blocks_lie_and_nowhere_else(path, case, dtype):
    for add in (False, True):
        blocks, out = blocks_of(case), numbers(11)
        stored = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, blocks.total)).to(dtype)
        scale = numbers(12, len(blocks)).abs() if dtype == torch.int8 else None
        expected = out.numpy().copy()
        for b, found in enumerate(parts(stored, blocks)):
            for j, value in enumerate(found.astype(np.float32)):
                decoded = value if scale is None else value * scale.numpy()[b]
                at = int(blocks.starts[b]) + j
                expected[at] = expected[at] + decoded if add else decoded
        with on(path):
            decode_blocks(stored, blocks, out, scale, add)
        np.testing.assert_array_equal(out.numpy(), expected)


@PATHS
@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17, 255, 1000])
def test_packed_codes_are_one_row_and_come_back(path, count):
    codes = torch.from_numpy(np.random.default_rng(count).integers(-8, 8, count)).to(torch.int8)
    with on(path):
        stored = pack_nibbles(codes)
        back = unpack_nibbles(stored, count)
    assert (stored.dtype, len(stored)) == (torch.uint8, -(-count // 2))
    assert torch.equal(back, codes)
    assert torch.equal(stored, pack(codes[None], 4)[0])
    width, shifted = len(stored), [code + 8 for code in codes.tolist()] + [8] * (count % 2)
    assert stored.tolist() == [shifted[j] + 16 * shifted[j + width] for j in range(width)]
