"""The exchange of the MLP's gradients: blocks and owners, and sums against float32 arithmetic written out in numpy."""

import numpy as np
import pytest
import torch

import reference as ref
from distributed.test_codecs import BITS_OF, EVERY_CODEC, NAMES, ROUNDING
from dqrm.distributed.codecs import Codec, mix
from dqrm.distributed.dense import Bucket, MLPLayout
from kernel_helpers import NATIVE, PATHS, both, on
from kernels.test_blocks import nearest_bf16, noise, numbers

SHAPES = [torch.Size(shape) for shape in [(5, 7), (5,), (1, 5), (1,), (13, 1), (), (3, 2, 2), (31, 9), (31,), (2, 40)]]
TOTAL = 35 + 5 + 5 + 1 + 13 + 1 + 12 + 279 + 31 + 80
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
CPU = torch.device("cpu")


def blocks_of(bucket, shapes=SHAPES):
    """All blocks as (start in the flat order, length), by the docstring of MLPLayout, one after the other."""
    found, at = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        length = bucket or (size // shape[0] if len(shape) > 1 else size)
        found += [(at + begin, min(length, size - begin)) for begin in range(0, size, length)]
        at += size
    return found


def whole(layout, owners, name, stochastic=False):
    return Bucket(layout, owners, Codec(name, stochastic), CPU)


def random_gradients(ranks, step=0):
    return torch.stack([numbers(100 * step + rank, TOTAL, spread=1) for rank in range(ranks)])


def exchange(bucket, gradients, owners, residuals, owner_residual, step, shared=False):
    """What every rank gets; as `simulated` calls a bucket, with several owners."""
    rests = [None] * len(gradients) if residuals is None else residuals
    scales = None
    if shared:
        scales = torch.stack([bucket.scales(*one) for one in zip(gradients, rests)]).amax(0)
    sent = [
        bucket.encode(gradient, rest, mix(step, rank), scales)
        for rank, (gradient, rest) in enumerate(zip(gradients, rests))
    ]
    assert {len(message) for message in sent} == {sum(bucket.sizes)}
    received = zip(*(message.split(bucket.sizes) for message in sent))
    totals = [bucket.reduce(owner, parts, owner_residual, mix(step, 99)) for owner, parts in enumerate(received)]
    assert [len(total) for total in totals] == bucket.sizes
    assert len(totals) == owners
    out = torch.full_like(gradients[0], 77)
    bucket.decode(totals, out)
    return out


# ---- a slow reference: one block of one rank at a time, float32 rounding by float32 rounding


def arrives(name, z, start, seed, scale=None):
    """The values of one block after encoding, float32."""
    if name == "fp32":
        return z
    u = None if seed is None else noise(start + np.arange(len(z)), seed)
    if name == "bf16":
        if seed is None:
            return nearest_bf16(z)
        inner, outer = ref.bf16_neighbours(z)
        return np.where(z.view(np.uint32).astype(np.int64) % 2**16 + u >= 2**16, outer, inner)
    n = ref.levels(BITS_OF[name])
    scale = ref.scale_from_max(np.abs(z).max(), BITS_OF[name]) if scale is None else scale
    codes = np.rint(z / scale) if seed is None else np.floor(z / scale + u.astype(np.float32) / 2**16)
    return np.clip(codes, -n - 1, n).astype(np.float32) * scale


def slow_exchange(name, stochastic, blocks, gradients, residuals, owner_residual, step, shared=False):
    """Per block: the sum over the ranks of what their codes stand for, encoded once more. Residuals (numpy) change."""
    out = np.zeros(len(gradients[0]), np.float32)
    for start, length in blocks:
        part, total = slice(start, start + length), np.zeros(length, np.float32)
        zs = [gradient[part] if residuals is None else gradient[part] + residuals[rank, part]
              for rank, gradient in enumerate(gradients)]  # fmt: skip
        scale = ref.scale_from_max(max(np.abs(z).max() for z in zs), BITS_OF[name]) if shared else None
        for rank, z in enumerate(zs):
            value = arrives(name, z, start, mix(step, rank) if stochastic else None, scale)
            total = total + value
            if residuals is not None:
                residuals[rank, part] = z - value
        if owner_residual is not None:
            total = total + owner_residual[part]
        out[part] = arrives(name, total, start, mix(step, 99) if stochastic else None)
        if owner_residual is not None:
            owner_residual[part] = total - out[part]
    return out


# ---- layout


@pytest.mark.parametrize("bucket", [0, 1, 10, 279, 10_000])
@pytest.mark.parametrize("owners", [1, 2, 3, 4, 5, 6, 7, 70])
def test_every_value_is_in_one_block_of_one_owner(bucket, owners):
    layout, expected = MLPLayout(SHAPES, bucket), blocks_of(bucket)
    assert layout.total == TOTAL
    found, shares = [], np.zeros(owners)
    for number, start in enumerate(layout.starts):
        counts = []
        for owner, (begins, lengths) in enumerate(layout.owned(number, owners)):
            found += [(start + begin, length) for begin, length in zip(begins.tolist(), lengths.tolist())]
            counts.append(len(begins))
            shares[owner] += len(begins)
        assert len(counts) == owners
        assert max(counts) - min(counts) <= 1  # equal shares
    assert sorted(found) == expected
    assert sum(length for _, length in expected) == TOTAL


def test_blocks_are_channels_and_whole_biases_or_buckets_with_a_short_last_one():
    (channels,), (bias,), (one,) = (MLPLayout(SHAPES).owned(number, 1) for number in (0, 1, 5))
    assert (channels[0].tolist(), channels[1].tolist()) == ([0, 7, 14, 21, 28], [7] * 5)
    assert (bias[0].tolist(), bias[1].tolist()) == ([0], [5])
    assert (one[0].tolist(), one[1].tolist()) == ([0], [1])
    (starts, lengths), (_, small) = (MLPLayout(SHAPES, 10).owned(number, 1)[0] for number in (0, 1))
    assert (starts.tolist(), lengths.tolist(), small.tolist()) == ([0, 10, 20, 30], [10, 10, 10, 5], [5])


def test_biases_do_not_all_fall_to_the_first_ranks():
    layout = MLPLayout([torch.Size((4,))] * 8)
    shares = [sum(len(layout.owned(number, 4)[owner][0]) for number in range(8)) for owner in range(4)]
    assert shares == [2] * 4


# ---- sums


@PATHS
@RANKS
@EVERY_CODEC
@ROUNDING
def test_what_every_rank_gets_is_the_reference(path, ranks, name, stochastic):
    for bucket, rest in [(0, True), (0, False), (10, True)] if ranks == 3 else [(0, True)]:
        layout, blocks = MLPLayout(SHAPES, bucket), blocks_of(bucket)
        made = whole(layout, ranks, name, stochastic)
        residuals, owned = (torch.zeros(ranks, TOTAL), torch.zeros(TOTAL)) if rest else (None, None)
        slow, slow_owned = (np.zeros((ranks, TOTAL), "f4"), np.zeros(TOTAL, "f4")) if rest else (None, None)
        for step in range(3 if ranks < 4 else 2):
            gradients = random_gradients(ranks, step)
            with on(path):
                out = exchange(made, gradients, ranks, residuals, owned, step)
            expected = slow_exchange(name, stochastic, blocks, gradients.numpy(), slow, slow_owned, step)
            np.testing.assert_array_equal(out.numpy(), expected)
            if rest:
                np.testing.assert_array_equal(residuals.numpy(), slow)
                np.testing.assert_array_equal(owned.numpy(), slow_owned)


@PATHS
@RANKS
@pytest.mark.parametrize("name", ["int8", "int4"])
@ROUNDING
def test_shared_scales_are_the_largest_of_the_ranks(path, ranks, name, stochastic):
    gradients, made = random_gradients(ranks), whole(MLPLayout(SHAPES), ranks, name, stochastic)
    residuals, owned = torch.zeros(ranks, TOTAL), torch.zeros(TOTAL)
    slow, slow_owned = residuals.numpy().copy(), owned.numpy().copy()
    for step in range(2):
        with on(path):
            out = exchange(made, gradients, ranks, residuals, owned, step, shared=True)
        expected = slow_exchange(name, stochastic, blocks_of(0), gradients.numpy(), slow, slow_owned, step, shared=True)
        np.testing.assert_array_equal(out.numpy(), expected)
        np.testing.assert_array_equal(residuals.numpy(), slow)


@PATHS
@RANKS
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_sum_is_off_by_no_more_than_all_roundings(path, ranks, name):
    """Half a scale of each rank and half of the owner's, against the sum in float64."""
    gradients, bits = random_gradients(ranks, 5), BITS_OF[name]
    with on(path):
        out = exchange(whole(MLPLayout(SHAPES), ranks, name), gradients, ranks, None, None, 0)
    exact = ref.array(gradients).sum(0)
    for start, length in blocks_of(0):
        part = slice(start, start + length)
        largest = np.abs(ref.array(gradients)[:, part]).max(1)
        halves = largest.sum() / ref.levels(bits) / 2
        halves += (np.abs(exact[part]).max() + halves) / ref.levels(bits) / 2
        assert np.abs(ref.array(out)[part] - exact[part]).max() <= halves * 1.0001


@PATHS
@RANKS
def test_fp32_is_the_sum_in_the_order_of_the_ranks(path, ranks):
    gradients = torch.stack([numbers(rank, TOTAL, spread=4) for rank in range(ranks)])
    with on(path):
        out = exchange(whole(MLPLayout(SHAPES), ranks, "fp32"), gradients, ranks, None, None, 0)
    expected = gradients[0].numpy().copy()
    for gradient in gradients.numpy()[1:]:
        expected += gradient
    np.testing.assert_array_equal(out.numpy(), expected)


@PATHS
@EVERY_CODEC
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ranks", [7, 100])
def test_sums_of_largest_codes_do_not_wrap(path, name, sign, ranks):
    gradients = torch.full((ranks, TOTAL), 0.3 * sign)
    with on(path):
        out = exchange(whole(MLPLayout(SHAPES), 2, name), gradients, 2, None, None, 0)
    relative = 2.0**-8 + ranks * 2.0**-9 if name == "bf16" else ranks * 2e-7
    np.testing.assert_allclose(out, 0.3 * sign * ranks, rtol=relative)


@PATHS
@EVERY_CODEC
@ROUNDING
def test_owners_change_no_bit(path, name, stochastic):
    layout, ranks = MLPLayout(SHAPES), 3
    expected = None
    for owners in (1, 2, 3, 70):
        residuals, owned = torch.zeros(ranks, TOTAL), torch.zeros(TOTAL)
        bucket = whole(layout, owners, name, stochastic)
        with on(path):
            sums = [exchange(bucket, random_gradients(ranks, step), owners, residuals, owned, step) for step in (0, 1)]
        everything = [*sums, residuals, owned]
        expected = expected or everything
        for number, (one, two) in enumerate(zip(expected, everything)):
            assert torch.equal(one, two), f"{owners} owners, output {number}"


@PATHS
@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
def test_error_compensation_brings_the_mean_to_the_truth(path, name):
    """Of 200 steps with the same gradients; what is still missing are the residuals of the last step."""
    ranks, steps = 2, 200
    gradients = random_gradients(ranks, 9)
    exact, made = ref.array(gradients).sum(0), whole(MLPLayout(SHAPES), ranks, name)
    residuals, owned = torch.zeros(ranks, TOTAL), torch.zeros(TOTAL)
    total, rounding = np.zeros(TOTAL), 3e-7 * ref.array(gradients.abs().sum(0))
    with on(path):
        plain = ref.array(exchange(made, gradients, ranks, None, None, 0))
        for step in range(steps):
            total += ref.array(exchange(made, gradients, ranks, residuals, owned, step))
    missing = ref.array(residuals).sum(0) + ref.array(owned)
    largest = np.zeros(TOTAL)
    for start, length in blocks_of(0):
        largest[start : start + length] = np.abs(ref.array(gradients)[:, start : start + length]).max()
    # In float32 each step rounds z, the sum and the residuals, which are no larger than the block's largest numbers.
    ref.assert_within(total + missing, steps * exact, steps * (rounding + 2**-22 * ranks * largest))
    error, without = np.abs(total / steps - exact), np.abs(plain - exact)
    assert np.sqrt((error**2).mean()) < np.sqrt((without**2).mean()) / 50
    assert error.max() < without.max() / 25


# ---- bytes


@pytest.mark.parametrize("bucket", [0, 10])
@pytest.mark.parametrize("owners", [1, 2, 7])
def test_the_payload_is_what_the_formulas_say(bucket, owners):
    for name in NAMES:
        made, bits = whole(MLPLayout(SHAPES, bucket), owners, name), BITS_OF[name]
        blocks = blocks_of(bucket)
        assert made.scale_bytes == (4 * len(blocks) if bits <= 8 else 0)
        assert made.value_bytes == TOTAL * bits / 8
        assert len(made.sizes) == owners
        assert 0 <= sum(made.sizes) - made.scale_bytes - made.value_bytes < 4 * owners
        assert all(size % 4 == 0 for size in made.sizes)


@NATIVE
@EVERY_CODEC
@ROUNDING
@pytest.mark.parametrize("bucket", [0, 10])
def test_both_paths_give_the_same_messages_and_sums(name, stochastic, bucket):
    gradients, made = random_gradients(3), whole(MLPLayout(SHAPES, bucket), 3, name, stochastic)

    def run():
        residuals, owned = random_gradients(3, 2) / 100, numbers(3, TOTAL, spread=0) / 100
        out = exchange(made, gradients, 3, residuals, owned, 1)
        return made.encode(gradients[0], None, 8), out, residuals, owned

    both(run)
