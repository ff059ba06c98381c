"""Numerics of tables stored as INT8 rows: encoding, and updates with stochastic rounding, against slow float64."""

import numpy as np
import pytest
import torch
from torch import nn

import reference as ref
from dqrm import kernels
from dqrm.kernels import TableRanges
from dqrm.quant.int8_rows import Int8Rows, row_width
from dqrm.quant.storage import INT8
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import NATIVE, on, threads

SHAPES = [(0, 4), (1, 1), (1, 16), (40, 1), (40, 2), (40, 3), (40, 16), (40, 17), (300, 64)]
NAN, INF = float("nan"), float("inf")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def magnitudes(rows, dim, seed=0):
    """Rows of magnitudes from 1e-38 to 1e38, in random order."""
    powers = torch.linspace(-38, 37.4, max(rows, 1), dtype=torch.float64)[:rows, None]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 1))
    return (normal(rows, dim, seed=seed).double().clamp(-3, 3) * 10.0**powers).float()[order]


# ---- the reference


def scales(values):
    """max|row| / 127, of at least 1e-8 / 127, rounded up to the 8 binary places of bf16: [rows, 1]."""
    largest = np.maximum(np.abs(values).max(1, keepdims=True, initial=0), np.float32(1e-8))
    mantissa, exponent = np.frexp((largest / 127).astype(np.float32).astype(np.float64))
    return np.ldexp(np.ceil(mantissa * 2.0**8), exponent - 8)


def uniform(rows, dim, seed):
    """murmur3's finalizer of (row * dim + column, seed): its upper 16 bits, in the middle of 2**16 intervals."""
    mask = 0xFFFFFFFF
    found = np.empty((len(rows), dim))
    for i, row in enumerate(rows):
        for column in range(dim):
            h = ((int(row) * dim + column) * 0x9E3779B1 & mask) ^ seed
            h = (h ^ h >> 16) * 0x85EBCA6B & mask
            h = (h ^ h >> 13) * 0xC2B2AE35 & mask
            found[i, column] = ((h ^ h >> 16) >> 16) + 0.5
    return found / 2**16


def parts(weight):
    """Codes and scales of the stored rows as float64 [rows, dim] and [rows, 1]; the padding must be 0."""
    stored, dim = weight.stored, weight.shape[1]
    assert stored.shape[1] == row_width(dim)
    assert not stored[:, dim:-2].any()
    return ref.array(stored[:, :dim]).astype(np.float64), ref.array(stored[:, -2:].contiguous().view(torch.bfloat16))


def added(weight, rows, values, factor=1.0, seed=0, ranges=None):
    """A copy with these rows updated."""
    weight = weight.detach().clone()
    INT8.add(weight, rows, values, factor, seed, ranges)
    return weight


# ---- encoding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("numbers", [normal, magnitudes])
def test_rows_are_encoded_to_the_nearest_code_of_their_own_scale(path, shape, numbers):
    values = numbers(*shape)
    weight, exact = Int8Rows.encode(values), ref.array(values)
    codes, scale = parts(weight)
    expected = scales(exact)
    np.testing.assert_array_equal(scale, expected)
    nearest = np.clip(np.rint(exact / expected), -127, 127)
    assert (np.abs(codes - nearest) <= ref.near_tie(exact, expected, 8)).all()
    np.testing.assert_array_equal(ref.array(weight.dequantize()), codes * scale)
    assert (np.abs(codes * scale - exact) <= scale * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 17])
def test_a_scale_is_the_smallest_that_bf16_has_for_its_row(path, dim):
    """So that 126 or 127 of the codes on either side are in use, and none is beyond."""
    codes, scale = parts(Int8Rows.encode(magnitudes(500, dim).double().clamp(-1e38, 1e38).float()))
    used = np.abs(codes).max(1)
    large = scale[:, 0] > 1.01e-8 / 127
    assert set(used[large]) == {126, 127}
    assert large.sum() > 200


@pytest.mark.parametrize("dim", [1, 3, 16, 17])
def test_rows_of_zeros_are_zeros(path, dim):
    values = normal(9, dim)
    values[::2] = 0
    values[2] = -0.0
    weight = Int8Rows.encode(values)
    assert torch.equal(weight.dequantize()[::2], torch.zeros(5, dim))
    again = added(weight, torch.arange(9), torch.zeros(9, dim), seed=3)
    assert torch.equal(again.stored[::2], weight.stored[::2])
    weight.zero_()
    assert not weight.dequantize().any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_a_row_that_is_not_finite_shows_and_the_others_stay(path, bad, dim):
    values = normal(5, dim)
    values[2, dim // 2] = bad
    weight = Int8Rows.encode(values)
    assert weight[torch.tensor([2])].isnan().all()
    assert not weight.dequantize()[[0, 1, 3, 4]].isnan().any()
    assert not INT8.largest(weight).isfinite()
    finite = Int8Rows.encode(values.nan_to_num(0, 0, 0))
    update = torch.zeros(1, dim)
    update[0, -1] = bad
    updated = added(finite, torch.tensor([2]), update)
    assert updated[torch.tensor([2])].isnan().all()
    assert torch.equal(updated.stored[[0, 1, 3, 4]], finite.stored[[0, 1, 3, 4]])
    assert added(updated, torch.tensor([2]), torch.ones(1, dim))[torch.tensor([2])].isnan().all()


def test_values_of_other_dtypes_and_strides_are_encoded(path):
    values = normal(7, 3).bfloat16()
    expected = Int8Rows.encode(values.float())
    for given in (values, values.double(), values.half().bfloat16(), values.t().contiguous().t()):
        assert torch.equal(Int8Rows.encode(given).stored, expected.stored)
    integers = torch.arange(12).view(4, 3)
    assert torch.equal(Int8Rows.empty(4, 3).copy_(integers), Int8Rows.encode(integers.float()))


def test_the_largest_magnitude_is_that_of_the_values(path):
    for shape in SHAPES:
        weight = Int8Rows.encode(magnitudes(*shape))
        expected = weight.dequantize().abs().max() if shape[0] else torch.tensor(0.0)
        assert INT8.largest(weight) == expected
    many = Int8Rows.encode(normal(2500, 3))  # in blocks of 1024
    assert INT8.largest(many) == many.dequantize().abs().max()


# ---- updates


@pytest.mark.parametrize("shape", [(1, 1), (30, 3), (30, 16), (30, 17)])
@pytest.mark.parametrize("numbers", [normal, magnitudes])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_an_update_is_that_of_the_reference(path, shape, numbers, factor):
    """Codes differ only where a quotient and its noise end within float32's precision of an integer."""
    weight = Int8Rows.encode(numbers(*shape))
    rows = torch.randperm(shape[0], generator=torch.Generator().manual_seed(4))[: -(-shape[0] * 2 // 3)]
    values = weight.dequantize()[rows] * normal(len(rows), shape[1], seed=2) * 0.3
    updated, seed = added(weight, rows, values, factor, 77), 77
    new = weight.dequantize()[rows] + values * torch.tensor(factor)
    exact = ref.array(new)
    codes, scale = (part[rows.numpy()] for part in parts(updated))
    np.testing.assert_array_equal(scale, scales(exact))
    noisy = exact / scale + uniform(rows.tolist(), shape[1], seed)
    near = np.abs(noisy - np.rint(noisy)) < 2.0**-16
    assert near.mean() < 0.01
    assert (np.abs(codes - np.floor(noisy)) <= near).all()
    others = [row for row in range(shape[0]) if row not in rows.tolist()]
    assert torch.equal(updated.stored[others], weight.stored[others])


@pytest.mark.parametrize("size", [1e-10, 1e-3, 1.0, 1e36])
@pytest.mark.parametrize("dim", [2, 16, 17])
def test_the_mean_of_many_updates_is_exact(path, size, dim):
    """Over seeds: each value is a neighbour of the exact sum, the upper one with its distance to the lower one."""
    seeds, weight = 500, Int8Rows.encode(normal(25, dim) * size)
    rows, update = torch.arange(25), normal(25, dim, seed=1) * 0.02 * size
    exact = ref.array(weight.dequantize() + update)
    scale = scales(exact)
    low = np.floor(exact / scale)
    share = exact / scale - low
    above = np.zeros_like(exact)
    for number in range(seeds):
        codes, found = parts(added(weight, rows, update, 1.0, number * 0x85EBCA77 % 2**32))
        np.testing.assert_array_equal(found, scale)
        assert ((codes == low) | (codes == low + 1) | (np.minimum(share, 1 - share) < 1e-4)).all()
        above += codes - low
    deviation = np.sqrt(share * (1 - share) / seeds)
    assert (np.abs(above / seeds - share) < 5 * deviation + 3 / seeds).all()
    pooled = np.sqrt((deviation**2).sum())
    assert abs((above / seeds - share).sum()) < 4 * pooled + 2.0**-16 * share.size
    assert pooled > 0.01


def test_updates_far_below_a_step_arrive_on_average(path):
    """0.01 of a step, 1500 times, beside a weight that keeps the scale: to the nearest, nothing would move."""
    step, rows = 2.0**-7, torch.arange(20)
    start = torch.zeros(20, 17)
    start[:, 0] = 127 * step
    weight = nn.Parameter(Int8Rows.encode(start))
    optimizer, update = SparseSGD([weight], 1.0, seed=1), torch.full((20, 17), -0.01 * step)
    update[:, 0] = 0
    for _ in range(1500):
        weight.grad = torch.sparse_coo_tensor(rows[None], update, weight.shape, check_invariants=True)
        optimizer.step()
    moved = weight.detach().dequantize() / step
    assert torch.equal(moved[:, 0], torch.full((20,), 127.0))
    moved = moved[:, 1:]
    assert abs(moved.mean() - 15) < 5 * (15 / moved.numel()) ** 0.5
    assert 7.5 < moved.var() < 30


def test_an_update_of_nothing_is_unbiased_and_soon_leaves_a_row_alone(path):
    """A row whose largest code is 126 may get another scale; one whose largest is 127 keeps every bit."""
    weight, rows, nothing = Int8Rows.encode(normal(4000, 4)), torch.arange(4000), torch.zeros(4000, 4)
    start = weight.dequantize()
    once = added(weight, rows, nothing, seed=5)
    full = (np.abs(parts(weight)[0]).max(1) == 127).nonzero()[0]
    assert 1000 < len(full) < 3000
    assert torch.equal(once.stored[full], weight.stored[full])
    for seed in range(6, 40):
        once = added(once, rows, nothing, seed=seed)
    assert torch.equal(added(once, rows, nothing, seed=99).stored, once.stored)
    difference = (once.dequantize() - start) / parts(weight)[1].max()
    assert abs(difference.mean()) < 4 * difference.std() / difference.numel() ** 0.5
    assert difference.std() < 0.6


def test_a_scale_follows_its_row_down_and_up(path):
    weight = Int8Rows.encode(torch.tensor([[1.0, 0.01, 0.0], [0.01, 0.0, -0.01]]))
    rows = torch.tensor([0, 1])
    moved = added(weight, rows, torch.tensor([[-0.9, 0.0, 0.0], [500.0, 0.0, 0.0]]))
    _, scale = parts(moved)
    assert 0.098 / 127 < scale[0, 0] < 0.103 / 127
    assert 499 / 127 < scale[1, 0] < 505 / 127


def test_duplicates_of_a_row_are_summed_first(path):
    """To the same bits as one gradient of the row, whose rounding is drawn once."""
    rows, values = torch.tensor([3, 1, 3, 3, 0]), normal(5, 5, seed=1)
    total = torch.stack([values[4], values[1], (values[0] + values[2]) + values[3]])
    start = Int8Rows.encode(normal(6, 5))
    for kind in (SparseSGD, SparseAdagrad):
        one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        kind([one], 0.1, seed=2).step_rows(rows, values)
        kind([two], 0.1, seed=2).step_rows(torch.tensor([0, 1, 3]), total)
        assert torch.equal(one.stored, two.stored)
        assert not torch.equal(one.stored[[0, 1, 3]], start.stored[[0, 1, 3]])
        assert torch.equal(one.stored[[2, 4, 5]], start.stored[[2, 4, 5]])


@pytest.mark.parametrize("dim", [1, 16, 17])
def test_neither_order_nor_company_nor_threads_change_a_bit(path, dim):
    weight, rows, values = Int8Rows.encode(normal(3000, dim)), torch.arange(0, 3000, 2), normal(1500, dim, seed=1)
    expected = added(weight, rows, values, -0.1, 9)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(added(weight, rows[order], values[order], -0.1, 9).stored, expected.stored)
    halves = added(added(weight, rows[:700], values[:700], -0.1, 9), rows[700:], values[700:], -0.1, 9)
    assert torch.equal(halves.stored, expected.stored)
    with threads(3):
        assert torch.equal(added(weight, rows, values, -0.1, 9).stored, expected.stored)
        assert torch.equal(Int8Rows.encode(values).stored[::7], Int8Rows.encode(values[::7]).stored)
    assert not torch.equal(added(weight, rows, values, -0.1, 10).stored, expected.stored)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_give_the_same_bytes(shape):
    found = []
    for path in ("native", "plain"):
        with on(path):
            weight = Int8Rows.encode(magnitudes(*shape))
            found.append(added(weight, torch.arange(shape[0]), magnitudes(*shape, seed=5), 0.5, 3).stored)
    assert torch.equal(*found)


@pytest.mark.parametrize("dim", [3, 16])
def test_an_update_raises_the_scales_of_its_tables(path, dim):
    weight = Int8Rows.encode(normal(10, dim))
    ranges = TableRanges(torch.tensor([0, 4]), torch.full((2,), 0.05), 7)
    updated = added(weight, torch.tensor([1, 2, 3]), torch.full((3, dim), 5.0), 1.0, 0, ranges)
    assert ranges.scale[0] == updated.dequantize()[1:4].abs().max() / 7
    assert ranges.scale[1] == torch.tensor(0.05)
    INT8.raise_scales(updated, torch.tensor([9]), ranges)
    assert ranges.scale[1] == updated.dequantize()[9].abs().max() / 7


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_an_empty_update_changes_nothing(path, dim):
    weight = Int8Rows.encode(normal(3, dim))
    none = added(weight, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim))
    assert torch.equal(none.stored, weight.stored)
    empty = Int8Rows.encode(torch.zeros(0, dim))
    assert added(empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim)).shape == (0, dim)


@pytest.mark.parametrize("dim", [15, 16])
@pytest.mark.parametrize("width", [1, 14, 15, 16, 17])
def test_values_of_another_width_are_refused(path, dim, width):
    """A row of 15 and one of 16 values take the same number of bytes."""
    weight = Int8Rows.encode(normal(4, dim))
    before = weight.stored.clone()
    if width == dim:
        INT8.add(weight, torch.tensor([1]), torch.ones(1, width), 1.0, 0, None)
        return
    with pytest.raises(ValueError, match=rf"values are \[1, {width}\], expected \[1, {dim}\]"):
        INT8.add(weight, torch.tensor([1]), torch.ones(1, width), 1.0, 0, None)
    assert torch.equal(weight.stored, before)


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_out_of_range_are_refused(path, row):
    weight = Int8Rows.encode(normal(4, 3))
    before = weight.stored.clone()
    with pytest.raises((IndexError, RuntimeError)):
        INT8.add(weight, torch.tensor([1, row]), torch.ones(2, 3), 1.0, 0, None)
    assert torch.equal(weight.stored, before)


def test_a_lookup_reads_the_codes_in_place(path):
    """Both forms of ids, the last row, an odd dim."""
    weight = Int8Rows.encode(normal(7, 5))
    for dtype in (torch.int32, torch.int64):
        ids, out = torch.tensor([[6], [0], [6]], dtype=dtype), torch.zeros(3, 5)
        start, count, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([7]), torch.zeros(3, dtype=torch.int64)
        assert kernels.lookup(ids, start, count, weight.stored, None, (0, 0), out, rows) == -1
        assert torch.equal(out, weight.dequantize()[[6, 0, 6]])
