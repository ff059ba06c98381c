"""Blocks of rows that share a scale: compiled code beside plain torch, and both beside the formulas in float64."""

from itertools import accumulate, product

import numpy as np
import pytest
import torch

import reference as ref
from dqrm import kernels
from dqrm.kernels import GroupMap, TableRanges, plain
from kernel_helpers import NATIVE, PATHS, ROW_GRADIENTS, both, collection, on, random_ids, random_rows, threads

TABLES = [(1,), (7,), (5, 6), (3, 1, 50, 2), (300, 129)]
FP32, BF16 = torch.float32, torch.bfloat16


def grouped(table_rows, shift, scale=0.05):
    """The map of blocks of 1 << shift rows, and that many scales."""
    counts = [-(-rows // (1 << shift)) for rows in table_rows]
    starts, first = ([0, *accumulate(each)] for each in (table_rows, counts))
    groups = GroupMap(torch.tensor(starts[:-1]), torch.tensor(first[:-1]), shift)
    return groups, torch.full((first[-1],), scale)


def group_numbers(table_rows, shift):
    """The group of each row, one row after the other."""
    numbers, first = [], 0
    for rows in table_rows:
        numbers += [first + row // 2**shift for row in range(rows)]
        first = numbers[-1] + 1
    return np.array(numbers)


def raised(weight, rows, scale, numbers, shift, bits=4):
    """Of groups of one row: the scale of the row; of others, at least that of each of the rows. float64."""
    scale = ref.array(scale)
    for row in rows:
        needed = ref.scale_from_max(np.abs(weight[row]).max(initial=0), bits)
        scale[numbers[row]] = needed if shift == 0 else max(scale[numbers[row]], needed)
    return scale


@pytest.mark.parametrize("shift", [0, 1, 3, 8])
@pytest.mark.parametrize("table_rows", TABLES)
def test_the_map_counts_blocks_within_each_table(table_rows, shift):
    groups, scale = grouped(table_rows, shift)
    numbers = group_numbers(table_rows, shift)
    assert groups.of(torch.arange(sum(table_rows))).tolist() == numbers.tolist()
    assert len(scale) == numbers[-1] + 1
    assert groups.of(torch.empty(0, dtype=torch.int64)).shape == (0,)


@PATHS
@pytest.mark.parametrize(("table_rows", "shift"), [*product(TABLES, [0, 1, 4])])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("raising", [False, True])
def test_a_lookup_quantizes_each_row_on_the_scale_of_its_block(path, table_rows, shift, dtype, raising):
    groups, scale = grouped(table_rows, shift)
    starts, rows, dim = groups.starts, torch.tensor(table_rows), 5
    weight = random_rows(sum(table_rows), dim, dtype=dtype)
    for batch in (0, 1, 40):
        ids, own = random_ids(table_rows, batch, torch.int32), scale.clone()
        out, read, clamped = torch.zeros(ids.numel(), dim), torch.zeros(ids.numel(), dtype=torch.int64), torch.zeros(1)
        with on(path):
            wrong = kernels.lookup(
                ids, starts, rows, weight, own, (-8, 7), out, read, clamped.long(), raising, groups=groups
            )
        assert wrong == -1
        numbers = group_numbers(table_rows, shift)
        expected = raised(ref.array(weight), read.tolist() if raising else [], scale, numbers, shift)
        np.testing.assert_allclose(ref.array(own), expected, rtol=1e-7)
        for value, row in zip(ref.array(out), read.tolist()):
            each = float(own[numbers[row]])
            slack = ref.slack(ref.array(weight)[row], each, 4) + 1e-6
            assert (np.abs(value - ref.fake_quantize(ref.array(weight)[row], each, 4)) <= slack).all()


@NATIVE
@pytest.mark.parametrize(("table_rows", "shift"), [*product([*TABLES, (3000, 5)], [0, 2, 6])])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("odd", [False, True])
def test_compiled_lookups_are_those_of_plain_torch(table_rows, shift, bits, odd):
    groups, scale = grouped(table_rows, shift)
    starts, rows, ids = groups.starts, torch.tensor(table_rows), random_ids(table_rows, 700, torch.int64)
    for dtype, raising in product((FP32, BF16), (False, True)):
        weight = collection(table_rows, 17, odd=odd, dtype=dtype).weight.detach()

        def run(weight=weight, raising=raising):
            own, out, read = scale.clone(), torch.zeros(ids.numel(), 17), torch.zeros(ids.numel(), dtype=torch.int64)
            clamped, limits = torch.zeros(1, dtype=torch.int64), plain.limits(bits)
            dirty = torch.zeros(sum(table_rows), dtype=torch.uint8)
            kernels.lookup(
                ids, starts, rows, weight, own, limits, out, read, clamped, raising, dirty, starts, 1, groups
            )
            return out, own, read, dirty, clamped if not (raising and odd) else own

        with threads(3):
            both(run)


def updated(name, shift, stochastic, scale=0.05):
    rows, dim = ROW_GRADIENTS[name]
    groups, own = grouped((1, 4, 1, 294, 601), shift, scale)
    ranges = TableRanges(groups.starts, own, 7, groups)
    weight = random_rows(901, dim, seed=2, dtype=BF16 if stochastic else FP32)
    if stochastic:
        rows = rows.unique()
        kernels.add_rows_stochastic(weight, rows, random_rows(len(rows), dim), -0.3, 5, ranges)
    else:
        kernels.add_rows(weight, rows, random_rows(len(rows), dim), -0.3, ranges)
    return weight, own, rows


@pytest.mark.parametrize(("name", "shift"), [*product(ROW_GRADIENTS, [0, 1, 5])])
@pytest.mark.parametrize("stochastic", [False, True])
@PATHS
def test_an_update_raises_the_scales_of_the_blocks_that_it_changes(path, name, shift, stochastic):
    with on(path), threads(2):
        weight, own, rows = updated(name, shift, stochastic)
    numbers = group_numbers((1, 4, 1, 294, 601), shift)
    expected = raised(ref.array(weight), rows.tolist(), torch.full_like(own, 0.05), numbers, shift)
    np.testing.assert_allclose(ref.array(own), expected, rtol=1e-7)


@NATIVE
@pytest.mark.parametrize(("name", "shift"), [*product(ROW_GRADIENTS, [0, 1, 5])])
@pytest.mark.parametrize("scale", [0.0, 0.05, float("nan")])
def test_compiled_updates_are_those_of_plain_torch(name, shift, scale):
    both(lambda: updated(name, shift, False, scale)[:2])
    both(lambda: updated(name, shift, True, scale)[:2])


@NATIVE
@pytest.mark.parametrize(("shift", "count"), [*product([0, 1, 5], [0, 1, 300, 6000])])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("odd", [False, True])
def test_compiled_raises_are_those_of_plain_torch(shift, count, dtype, odd):
    table_rows = (20, 1, 9, 70)
    weight, rows = collection(table_rows, 3, odd=odd, dtype=dtype).weight.detach(), torch.arange(count) * 7 % 100

    def run():
        groups, own = grouped(table_rows, shift, 0.01)
        kernels.raise_scales(rows, weight, TableRanges(groups.starts, own, 7, groups))
        return (own,)

    with threads(3):
        both(run)


@NATIVE
@pytest.mark.parametrize(("table_rows", "shift"), [*product(TABLES, [0, 1, 4, None])])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [1, 16, 17])
def test_packed_rows_are_decoded_on_scale_and_zero_point_of_their_block(table_rows, shift, zero, bits, dim):
    groups, scale = grouped(table_rows, 0 if shift is None else shift)
    starts, rows = groups.starts, torch.tensor(table_rows)
    if shift is None:
        groups, scale = None, scale[: len(table_rows)]
    scale = random_rows(len(scale), 1)[:, 0].abs() + 0.1
    low, high = plain.limits(bits)
    zero_point = (torch.arange(len(scale)) % (high - low + 1) + low).int() if zero else None
    codes = (torch.arange(sum(table_rows) * dim).view(-1, dim) * 7 % (high - low + 1) + low).to(torch.int8)
    ids = random_ids(table_rows, 70, torch.int32)

    def run():
        return kernels.lookup_packed(ids, starts, rows, plain.pack(codes, bits), bits, scale, dim, zero_point, groups)[
            :1
        ]

    (found,) = both(run)
    read = (ids + starts).view(-1).numpy()
    each = np.arange(len(read)) % len(table_rows) if shift is None else group_numbers(table_rows, shift)[read]
    shifted = ref.array(codes)[read] - (0 if zero_point is None else ref.array(zero_point)[each][:, None])
    np.testing.assert_allclose(ref.array(found), shifted * ref.array(scale)[each][:, None], rtol=1e-6)
