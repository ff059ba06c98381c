"""The exchange of the tables' gradients: messages byte by byte, sums of ranks, and residuals of rows."""

import numpy as np
import pytest
import torch

import reference as ref
from distributed.test_codecs import BITS_OF, EVERY_CODEC, ROUNDING, decoded, up_to_four
from dqrm.distributed.codecs import Codec, mix
from dqrm.distributed.sparse import RowCodec, add_up, join, reduce, split
from kernel_helpers import NATIVE, PATHS, both, on

TABLES = (1, 2, 255, 256, 257, 65_536, 65_537, 2**24 + 1, 2**31, 3)
WIDTHS = (1, 1, 1, 1, 2, 2, 3, 4, 4, 1)
STARTS = np.cumsum([0, *TABLES])
SCALES = pytest.mark.parametrize("per_row", [False, True], ids=["table", "row"])
CODED = pytest.mark.parametrize("name", ["int8", "int4"])


def codec_of(name, dim=3, per_row=False, stochastic=False, tables=TABLES):
    return RowCodec(tables, dim, Codec(name, stochastic), per_row)


def gradient(seed, dim=3, tables=TABLES, per_table=9):
    """Rising rows of random tables, the first and last of each likely, and values whose sizes differ by table."""
    random, starts, rows = np.random.default_rng(seed), np.cumsum([0, *tables]), []
    for table, size in enumerate(tables):
        count = int(random.integers(0, per_table + 1))
        ids = [*random.integers(0, size, count), *random.choice([0, size - 1], count and 2)]
        rows += sorted({int(starts[table] + id) for id in ids})
    values = random.normal(size=(len(rows), dim)) * 10.0 ** (np.array(rows) % 4 - 2)[:, None]
    return torch.tensor(rows, dtype=torch.int64), torch.from_numpy(values.astype("f4"))


def parse(message, name, dim, per_row, tables=TABLES):
    """(rows of each table, ids, scales, values as codes or floats, bytes of ids) by the docstring's layout."""
    raw, bits = message.numpy().tobytes(), BITS_OF[name]
    count = int.from_bytes(raw[:4], "little")
    if count == 0:
        return [], [], [], [], len(raw)
    width = 2 if count < 65_536 else 4
    at = 4 + width * len(tables)
    counts = [int.from_bytes(raw[4 + width * t : 4 + width * (t + 1)], "little") for t in range(len(tables))]
    ids = []
    for size, here in zip(tables, counts):
        bytes_ = 1
        while size - 1 >= 256**bytes_:
            bytes_ += 1
        ids.append([int.from_bytes(raw[at + bytes_ * i : at + bytes_ * (i + 1)], "little") for i in range(here)])
        at += bytes_ * here
    head = up_to_four(at)
    assert not any(raw[at:head])
    blocks = (count if per_row else sum(here > 0 for here in counts)) if bits <= 8 else 0
    scales, body = np.frombuffer(raw[head : head + 4 * blocks], "<f4"), raw[head + 4 * blocks :]
    if bits == 4:
        half = -(-count * dim // 2)
        values = np.array([byte % 16 - 8 for byte in body[:half]] + [byte // 16 - 8 for byte in body[:half]])
        values = values[: count * dim]
    elif bits == 16:
        values = (np.frombuffer(body[: 2 * count * dim], "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(body[: bits // 8 * count * dim], "<f4" if bits == 32 else "i1")
    assert len(body) == up_to_four(-(-count * dim * bits // 8))
    return counts, ids, scales, values.reshape(count, dim), head


def groups(rows, per_row, tables=TABLES):
    """Positions of the rows that share a scale."""
    if per_row:
        return [[position] for position in range(len(rows))]
    table = np.searchsorted(np.cumsum([0, *tables]), rows, side="right") - 1
    return [np.flatnonzero(table == number) for number in np.unique(table)]


def expected_values(rows, values, name, per_row):
    """What arrives, in float64, and how far off is allowed."""
    found, allowed = np.zeros(values.shape), np.zeros(values.shape)
    for together in groups(rows.numpy(), per_row):
        value, slack = decoded(name, values.numpy()[together].reshape(-1))
        found[together], allowed[together] = value.reshape(-1, values.shape[1]), slack.reshape(-1, values.shape[1])
    return found, allowed


def summed(gradients, dim=3):
    """Row -> float64 sum over the ranks."""
    found = {}
    for rows, values in gradients:
        for row, value in zip(rows.tolist(), ref.array(values)):
            found[row] = found.get(row, np.zeros(dim)) + value
    return found


def as_dict(rows, values):
    assert len(set(rows.tolist())) == len(rows)
    return {row: value.tolist() for row, value in zip(rows.tolist(), values)}


# ---- messages


@PATHS
@EVERY_CODEC
@SCALES
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_a_message_is_what_the_docstring_says_and_comes_back(path, name, per_row, dim):
    codec = codec_of(name, dim, per_row)
    for seed in range(4):
        rows, values = gradient(seed, dim)
        with on(path):
            message, sizes = codec.encode(rows, values)
            back_rows, back = codec.decode(message)
        assert torch.equal(back_rows, rows)
        ref.assert_within(ref.array(back), *expected_values(rows, values, name, per_row))
        counts, ids, scales, sent, head = parse(message, name, dim, per_row)
        assert counts == np.histogram(rows.numpy(), STARTS)[0].tolist()
        assert [STARTS[table] + id for table, here in enumerate(ids) for id in here] == rows.tolist()
        # Parts.
        assert head == up_to_four(4 + 2 * len(TABLES) + sum(width * count for width, count in zip(WIDTHS, counts)))
        assert sizes == {"ids": head, "scales": 4 * len(scales), "values": len(message) - head - 4 * len(scales)}
        assert sum(sizes.values()) == len(message)
        # Values.
        if BITS_OF[name] > 8:
            np.testing.assert_array_equal(sent, back)
            continue
        for together, scale in zip(groups(rows.numpy(), per_row), scales, strict=True):
            ref.assert_scale(scale, np.abs(values.numpy()[together]).max(), BITS_OF[name])
            np.testing.assert_array_equal(back.numpy()[together], sent[together].astype("f4") * scale)


@PATHS
@EVERY_CODEC
@SCALES
def test_no_rows_are_four_bytes(path, name, per_row):
    codec = codec_of(name, per_row=per_row)
    with on(path):
        message, sizes = codec.encode(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))
        rows, values = codec.decode(message)
    assert message.tolist() == [0, 0, 0, 0]
    assert sizes == {"ids": 4, "scales": 0, "values": 0}
    assert (rows.dtype, rows.shape, values.shape) == (torch.int64, (0,), (0, 3))


@PATHS
@EVERY_CODEC
@SCALES
@pytest.mark.parametrize("row", [0, 1, 2, *(STARTS[3:] - 1).tolist()])
def test_one_row(path, name, per_row, row):
    codec, rows, values = codec_of(name, 1, per_row), torch.tensor([row]), torch.tensor([[-3.0]])
    with on(path):
        message, sizes = codec.encode(rows, values)
        back = codec.decode(message)
    assert back[0].tolist() == [row]
    np.testing.assert_allclose(back[1], values, rtol=1e-6)
    assert sum(sizes.values()) == len(message)


@PATHS
@SCALES
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("int8", (1,)), ("int4", (301,)), ("bf16", (65_535,)), ("int4", (65_536,)), ("int8", (2, 70_000, 5))],
)
def test_all_rows_of_all_tables(path, name, per_row, sizes):
    """From 65,536 rows on their numbers are int32."""
    codec, count = codec_of(name, 1, per_row, tables=sizes), sum(sizes)
    rows, values = torch.arange(count), torch.linspace(-1, 1, count)[:, None]
    with on(path):
        message, parts = codec.encode(rows, values)
        back_rows, back = codec.decode(message)
    assert torch.equal(back_rows, rows)
    assert (back - values).abs().max() <= {"fp32": 0, "bf16": 2**-9, "int8": 0.5 / 127, "int4": 0.5 / 7}[name] * 1.001
    counts, ids, *_, head = parse(message, name, 1, per_row, sizes)
    assert counts == list(sizes)
    assert all(here == list(range(size)) for here, size in zip(ids, sizes))
    assert (parts["ids"], sum(parts.values())) == (head, len(message))


@PATHS
def test_ids_of_the_largest_tables_are_not_negative(path):
    codec, rows = codec_of("fp32", 1, tables=(5, 2**32, 3)), torch.tensor([0, 5 + 2**31 - 1, 5 + 2**31, 4 + 2**32])
    with on(path):
        assert codec.decode(codec.encode(rows, torch.ones(4, 1))[0])[0].tolist() == rows.tolist()


@PATHS
@CODED
@ROUNDING
def test_shared_scales_are_used_as_they_are_given(path, name, stochastic):
    codec, gradients = codec_of(name, stochastic=stochastic), [gradient(seed) for seed in (4, 5, 6)]
    with on(path):
        each = [codec.scales(rows, values) for rows, values in gradients]
        shared = torch.stack(each).amax(0)
        messages = [codec.encode(rows, values, 3, shared)[0] for rows, values in gradients]
        back = [codec.decode(message)[1] for message in messages]
        own = codec.encode(*gradients[0], 3)[0]
        assert torch.equal(codec.encode(*gradients[0], 3, each[0])[0], own)
        assert codec.scales(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)).tolist() == [0.0] * len(TABLES)
    for (rows, values), scales, message, found in zip(gradients, each, messages, back):
        counts, _, sent, codes, _ = parse(message, name, 3, False)
        there = np.array(counts) > 0
        maxima = [np.abs(values.numpy()[together]).max() for together in groups(rows.numpy(), False)]
        ref.assert_scale(scales[there], maxima, BITS_OF[name])
        assert not scales[~there].any()
        np.testing.assert_array_equal(sent, shared[there])
        spread = shared.numpy()[np.repeat(np.arange(len(TABLES)), counts)][:, None]
        np.testing.assert_array_equal(found, codes.astype("f4") * spread)
        assert (np.abs(found.numpy() - values.numpy()) <= spread * (1 if stochastic else 0.5) * 1.0001).all()
    with on(path):
        assert codec_of("fp32").scales(*gradients[0]) is None
        assert codec_of("bf16").scales(*gradients[0]) is None


# ---- sums


def ranks_of(kind):
    """Gradients of several ranks."""
    if kind == "random":
        return [gradient(seed) for seed in range(4)]
    if kind == "the same rows":
        rows, values = gradient(1)
        return [(rows, values * factor) for factor in (1, -0.3, 1e-3)]
    if kind == "no common row":
        parts = split(*gradient(2, per_table=30), 3)
        assert all(len(rows) for rows, _ in parts)
        return parts
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)
    if kind == "all empty":
        return [none] * 3
    return [none, gradient(3, per_table=40), (torch.tensor([1]), torch.ones(1, 3)), none]


KINDS = pytest.mark.parametrize("kind", ["random", "the same rows", "no common row", "uneven, some empty", "all empty"])


def all_gather(codec, gradients, seed=1):
    return add_up(codec, [codec.encode(*one, seed=mix(seed, rank))[0] for rank, one in enumerate(gradients)])


def all_to_all(codec, gradients, owners, seed=1):
    sent = [[codec.encode(*share, seed=mix(seed, rank, owner))[0] for owner, share in enumerate(split(*one, owners))]
            for rank, one in enumerate(gradients)]  # fmt: skip
    totals = []
    for received in zip(*sent):
        total, sizes = reduce(codec, received, seed)
        assert sum(sizes.values()) == len(total)
        totals.append(total)
    return join(codec, totals)


@KINDS
@pytest.mark.parametrize("owners", [1, 2, 3, 5])
def test_split_gives_each_row_to_its_owner_in_rising_order(kind, owners):
    for rows, values in ranks_of(kind):
        parts = split(rows, values, owners)
        assert len(parts) == owners
        for owner, (found, _) in enumerate(parts):
            assert found.tolist() == [row for row in rows.tolist() if row % owners == owner]
        known = as_dict(rows, values)
        assert {row: value for part in parts for row, value in as_dict(*part).items()} == known


@PATHS
@KINDS
@EVERY_CODEC
@SCALES
def test_all_gather_is_the_sum_of_what_the_ranks_sent(path, kind, name, per_row):
    codec, gradients = codec_of(name, per_row=per_row), ranks_of(kind)
    with on(path):
        rows, values = all_gather(codec, gradients)
    assert rows.tolist() == sorted(summed(gradients))
    arrived = [(own, *expected_values(own, found, name, per_row)) for own, found in gradients]
    expected = summed([(own, torch.from_numpy(found)) for own, found, _ in arrived])
    allowed = summed([(own, torch.from_numpy(slack + 1e-6 * np.abs(found))) for own, found, slack in arrived])
    for row, value in zip(rows.tolist(), ref.array(values)):
        ref.assert_within(value, expected[row], allowed[row])


@PATHS
@KINDS
@SCALES
def test_owners_sum_to_what_all_gather_sums_to(path, kind, per_row):
    """With fp32 to the bit: both add in the order of the ranks."""
    codec, gradients = codec_of("fp32", per_row=per_row), ranks_of(kind)
    with on(path):
        expected = as_dict(*all_gather(codec, gradients))
        for owners in (1, 2, 3, 5):
            assert as_dict(*all_to_all(codec, gradients, owners)) == expected


@PATHS
@KINDS
@CODED
@SCALES
@ROUNDING
def test_owners_are_off_by_no_more_than_two_roundings(path, kind, name, per_row, stochastic):
    for owners in (1, 3):
        codec, gradients = codec_of(name, per_row=per_row, stochastic=stochastic), ranks_of(kind)
        with on(path):
            found = as_dict(*all_to_all(codec, gradients, owners))
        exact, bound, step = summed(gradients), {}, (1 if stochastic else 0.5) / ref.levels(BITS_OF[name])
        assert found.keys() == exact.keys()
        for rows, values in gradients:  # the ranks' roundings: a part has no larger scale than the whole
            for together in groups(rows.numpy(), per_row):
                largest = np.abs(values.numpy()[together]).max()
                for row in rows[together].tolist():
                    bound[row] = bound.get(row, 0) + step * largest
        rows = np.array(sorted(exact), np.int64)
        for together in groups(rows, per_row):  # the owners'
            largest = max(np.abs(exact[row]).max() + bound[row] for row in rows[together])
            for row in rows[together]:
                assert np.abs(found[row] - exact[row]).max() <= (bound[row] + step * largest) * 1.001


@NATIVE
@KINDS
@EVERY_CODEC
@SCALES
@ROUNDING
def test_both_paths_give_the_same_messages_and_sums(kind, name, per_row, stochastic):
    codec, gradients = codec_of(name, per_row=per_row, stochastic=stochastic), ranks_of(kind)
    both(lambda: (codec.encode(*gradients[0])[0], *all_gather(codec, gradients), *all_to_all(codec, gradients, 3)))
