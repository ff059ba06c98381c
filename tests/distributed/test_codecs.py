"""Codecs: bytes on the wire, their number, and what they decode to, against a slow reference in numpy."""

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.distributed.codecs import Codec, mix, padded
from dqrm.kernels import Blocks
from dqrm.quant.packing import unpack
from kernel_helpers import NATIVE, ODD, PATHS, both, on
from kernels.test_blocks import CASES, EVERY_CASE, SIZE, blocks_of, cut, nearest_bf16, numbers, ragged

NAMES = ("fp32", "bf16", "int8", "int4")
EVERY_CODEC = pytest.mark.parametrize("name", NAMES)
CODED = pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
ROUNDING = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
UNTOUCHED = 12345.678
BITS_OF = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


def up_to_four(count):
    while count % 4:
        count += 1
    return count


def decoded(name, z, scale=None):
    """What the values z (float32) of one block are once encoded to nearest, in float64; how far off is allowed."""
    if name == "fp32":
        return z.astype(np.float64), np.zeros(len(z))
    if name == "bf16":
        return nearest_bf16(z).astype(np.float64), np.zeros(len(z))
    bits = BITS_OF[name]
    scale = ref.scale_from_max(np.abs(z).max(initial=0), bits) if scale is None else scale
    value = ref.fake_quantize(z, scale, bits)
    return value, ref.slack(z, scale, bits) + 3e-7 * np.abs(value)


def split_message(codec, message, blocks):
    """Scales, values as they are stored (codes as signed numbers), and the padding, by the docstring's layout."""
    raw, bits = message.numpy().tobytes(), BITS_OF[codec.name]
    scale_bytes = 4 * len(blocks) if bits <= 8 else 0
    end = scale_bytes + -(-blocks.total * bits // 8)
    scales, body, rest = np.frombuffer(raw[:scale_bytes], "<f4"), raw[scale_bytes:end], raw[end:]
    if bits == 32:
        return scales, np.frombuffer(body, "<f4"), rest
    if bits == 16:
        return scales, (np.frombuffer(body, "<u2").astype("<u4") << 16).view("<f4"), rest
    if bits == 8:
        return scales, np.frombuffer(body, "i1"), rest
    return scales, unpack(torch.frombuffer(bytearray(body or b"\0"), dtype=torch.uint8), 4, blocks.total).numpy(), rest


# ---- sizes


@EVERY_CODEC
def test_what_a_codec_says_of_itself(name):
    codec, bits = Codec(name), BITS_OF[name]
    assert codec.bits == (bits if bits <= 8 else 0)
    assert codec.value_bits == bits
    assert codec.lossless == (name == "fp32")
    assert not codec.stochastic


def test_bytes_are_padded_to_four():
    assert [padded(count) for count in range(10)] == [up_to_four(count) for count in range(10)]


@PATHS
@EVERY_CODEC
@EVERY_CASE
def test_the_bytes_are_as_many_as_sizes_says(path, name, case):
    codec, blocks, bits = Codec(name), blocks_of(case), BITS_OF[name]
    with on(path):
        message = codec.encode(numbers(1), blocks, seed=3)
    expected = 4 * len(CASES[case][0]) if bits <= 8 else 0, up_to_four(-(-int(sum(CASES[case][1])) * bits // 8))
    assert codec.sizes(len(blocks), blocks.total) == expected
    assert (message.dtype, message.shape) == (torch.uint8, (sum(expected),))
    assert not any(split_message(codec, message, blocks)[2])  # padding


@pytest.mark.parametrize("values", range(9))
def test_sizes_of_few_values(values):
    sizes = {name: Codec(name).sizes(3, values) for name in NAMES}
    assert sizes["fp32"] == (0, 4 * values)
    assert sizes["bf16"] == (0, [0, 4, 4, 8, 8, 12, 12, 16, 16][values])
    assert sizes["int8"] == (12, [0, 4, 4, 4, 4, 8, 8, 8, 8][values])
    assert sizes["int4"] == (12, [0, 4, 4, 4, 4, 4, 4, 4, 4][values])


# ---- values


@PATHS
@EVERY_CODEC
@EVERY_CASE
def test_what_arrives_is_the_reference(path, name, case):
    for rest in (False, True):
        codec, blocks, x = Codec(name), blocks_of(case), numbers(2)
        residual = numbers(3) if rest else None
        z = cut(x, blocks, residual)
        with on(path):
            message = codec.encode(x, blocks, residual)
            out, added = torch.full((SIZE,), UNTOUCHED), torch.full((SIZE,), 0.5)
            codec.decode(message, blocks, out)
            codec.decode(message, blocks, added, add=True)
        found, expected = ref.array(out), np.full(SIZE, np.float32(UNTOUCHED))
        np.testing.assert_array_equal(added, np.where(out == UNTOUCHED, 0.5, out.numpy() + np.float32(0.5)))
        for b, start in enumerate(blocks.starts.tolist()):
            part, key = slice(start, start + len(z[b])), int(blocks.keys[b])
            value, allowed = decoded(name, z[b])
            ref.assert_within(found[part], value, allowed)
            expected[part] = found[part]
            if rest:
                np.testing.assert_array_equal(residual.numpy()[key : key + len(z[b])], z[b] - out.numpy()[part])
        np.testing.assert_array_equal(found, expected)  # nothing was written beside the blocks


@PATHS
@CODED
@EVERY_CASE
@ROUNDING
def test_errors_stay_within_the_scale(path, name, bits, case, stochastic):
    """Half of it to nearest; all of it, stochastically. The same on scales that are larger than the values need."""
    for shared in (1.0, 1.7, 40.0):
        codec, blocks, x, out = Codec(name, stochastic), blocks_of(case), numbers(4), torch.zeros(SIZE)
        with on(path):
            scales = codec.scales(x, blocks) * shared
            message = codec.encode(x, blocks, seed=9, scales=scales)
            codec.decode(message, blocks, out)
            assert torch.equal(
                codec.encode(x, blocks, seed=9, scales=codec.scales(x, blocks)), codec.encode(x, blocks, seed=9)
            )
        ref.assert_scale(scales / shared, [np.abs(z).max(initial=0) for z in cut(x, blocks)], bits)
        sent, codes, _ = split_message(codec, message, blocks)
        np.testing.assert_array_equal(sent, scales.numpy())
        spread = scales.numpy().astype(np.float64)[blocks.block]
        np.testing.assert_array_equal(out.numpy()[blocks.position], codes.astype("f4") * scales.numpy()[blocks.block])
        error = np.abs(ref.array(x)[blocks.position] - codes * spread)
        assert (error <= spread * (1 if stochastic else 0.5) * (1 + 2e-5)).all()  # quotients of 127 in float32


@PATHS
def test_codecs_without_scales_have_none(path):
    with on(path):
        assert Codec("fp32").scales(numbers(1), blocks_of("ragged")) is None
        assert Codec("bf16").scales(numbers(1), blocks_of("ragged")) is None


@PATHS
@EVERY_CODEC
def test_the_seed_matters_to_stochastic_rounding_only(path, name):
    x, blocks = numbers(5), blocks_of("ragged")
    with on(path):
        for stochastic in (False, True):
            codec = Codec(name, stochastic)
            one, two, three = (codec.encode(x, blocks, seed=seed) for seed in (4, 4, 5))
            assert torch.equal(one, two)
            assert torch.equal(one, three) == (not stochastic or codec.lossless)


@PATHS
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_what_arrives_is_right_on_average(path, name):
    codec, blocks, x = Codec(name, True), blocks_of("ragged"), numbers(6, spread=0)
    total, rounds = torch.zeros(SIZE, dtype=torch.float64), 800
    with on(path):
        for seed in range(rounds):
            out = x.clone()
            codec.decode(codec.encode(x, blocks, seed=mix(seed, 1)), blocks, out)
            total += out
    if name == "bf16":
        unit = 2.0 ** (np.floor(np.log2(np.abs(ref.array(x)))) - 7)
    else:
        unit = np.zeros(SIZE)
        unit[blocks.position] = ref.array(codec.scales(x, blocks))[blocks.block]
    # Five standard deviations of at most half a unit, and the 16 bits of the noise.
    assert (np.abs(total.numpy() / rounds - ref.array(x)) <= unit * (5 * 0.5 / rounds**0.5 + 2**-16)).all()


@PATHS
@EVERY_CODEC
def test_a_message_may_be_written_into_a_larger_one(path, name):
    codec, blocks, x = Codec(name), blocks_of("ragged"), numbers(7)
    with on(path):
        message = codec.encode(x, blocks)
        buffer = torch.full((8 + len(message) + 8,), 99, dtype=torch.uint8)
        buffer[8:-8] = 0
        codec.write(buffer[8:-8], *codec.quantize(x, blocks, None, 0, None))
        assert torch.equal(buffer[8:-8], message)
        assert buffer[:8].eq(99).all()
        assert buffer[-8:].eq(99).all()
        one, two = torch.zeros(SIZE), torch.zeros(SIZE)
        codec.decode(message, blocks, one)
        codec.decode(buffer[8:-8], blocks, two)
        assert torch.equal(one, two)


@PATHS
@EVERY_CODEC
@ROUNDING
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_arrives_as_none(path, name, stochastic, value):
    x, out = torch.tensor([0.0, value, 1e30, -1e30, 1e-38, 1e-45]), torch.zeros(6)
    codec, blocks = Codec(name, stochastic), Blocks(torch.tensor([0, 2, 4]), torch.tensor([2, 2, 2]))
    with on(path):
        codec.decode(codec.encode(x, blocks, torch.zeros(6), seed=1), blocks, out)
    assert not out[1].isfinite()
    np.testing.assert_allclose(out[2:4], x[2:4], rtol=2**-7)
    assert out[4:].abs().max() <= 1e-38 * (1 + 2**-7)


@PATHS
@EVERY_CODEC
@ROUNDING
def test_what_was_sent_and_the_residual_are_the_sum_of_the_gradients(path, name, stochastic):
    codec, blocks = Codec(name, stochastic), blocks_of("ragged, keys elsewhere")
    residual, sent, total, size = torch.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE), 0.0
    for step in range(60):
        x, out = numbers(step, spread=1), torch.zeros(SIZE)
        with on(path):
            codec.decode(codec.encode(x, blocks, residual, mix(step)), blocks, out)
        sent, total, size = sent + ref.array(out), total + ref.array(x), max(size, float(x.abs().max()))
    difference = (sent - total)[blocks.position] + ref.array(residual)[blocks.key]
    assert np.abs(difference).max() <= 60 * 2**-23 * size  # a float32 rounding of z and of the residual in each step
    # Half a scale, or a whole one; of n levels on the largest gradient, which the residual itself makes larger.
    levels = {"fp32": np.inf, "bf16": 256, "int8": 127, "int4": 7}[name]
    assert residual.abs().max() <= size * (1 if stochastic else 0.5) / (levels - 1) * (1 + 1e-5)


# ---- two paths


@NATIVE
@EVERY_CODEC
@EVERY_CASE
@ROUNDING
@pytest.mark.parametrize("odd", [False, True], ids=["numbers", "odd numbers"])
def test_both_paths_give_the_same_bytes(name, case, stochastic, odd):
    codec, blocks, x = Codec(name, stochastic), blocks_of(case), numbers(8)
    if odd:  # but for NaN, which is one of many bit patterns
        x = torch.tensor([*ODD[:-3], 1e-38, -1e-42, 1e30])[
            torch.from_numpy(np.random.default_rng(1).integers(0, 11, SIZE))
        ]

    def run():
        residual, out = numbers(9), torch.zeros(SIZE)
        message = codec.encode(x, blocks, residual, 2**32 - 1)
        codec.decode(message, blocks, out)
        return message, residual, out

    both(run)


@NATIVE
def test_large_messages_are_the_same_in_both_paths_and_for_two_threads():
    blocks = Blocks(*(torch.from_numpy(part) for part in ragged(3000, 33, 4, own_keys=True)))
    x, residual = numbers(10, 70_000), numbers(11, 70_000)
    for name in NAMES:
        codec = Codec(name, True)

        def run(codec=codec):
            rest, out = residual.clone(), torch.zeros(70_000)
            message = codec.encode(x, blocks, rest, 5)
            codec.decode(message, blocks, out)
            return message, rest, out

        one = both(run)
        torch.set_num_threads(2)
        try:
            two = run()
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(one, two))


# ---- seeds


def test_mix_gives_32_bits_that_tell_its_parts_apart():
    seeds = [mix(1, step, part, rank) for step in range(30) for part in range(4) for rank in range(30)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) == len(seeds)  # of 3600 random ones two agree once in 660 times
    assert mix(1, 2) != mix(2, 1)
    assert mix(3, 4) == mix(3, 4)
    assert 0 <= mix(2**63 - 1, 2**40) < 2**32
    assert len({mix(9, number) for number in range(50_000)}) == 50_000  # a permutation of its last part


def test_mix_spreads_over_all_bits():
    found = np.array([mix(step, 5) for step in range(4096)])
    for bit in range(32):
        assert abs((found >> bit & 1).mean() - 0.5) < 5 * 0.5 / 4096**0.5, bit
