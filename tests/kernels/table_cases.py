"""Cases of the operations on tables."""

from itertools import product

import torch

from dqrm import kernels
from dqrm.kernels import GroupMap, IdleCourse, TableRanges, plain
from dqrm.kernels.layout import idle_fades, idle_powers
from kernel_helpers import ODD, ROW_GRADIENTS, here, random_ids, random_rows, same
from kernels.cases import BF16, FP32, INT8, case, odd

# The last of each list is more than the kernels ask for before they use threads.
TABLES = [((1,), 5, 3), ((7,), 129, 16), ((9, 4), 0, 3), ((5, 6), 1, 64), ((3, 1, 50, 2), 300, 17)]


# Scales of int8 rows: the smallest that encoding gives, one whose values are subnormal, one at which 127 is infinite.
SCALES = [1e-8 / 127, 1e-40, 2.0**-7, 2.6e36, 3e36, float("inf"), float("nan")]


def weights(numbers, rows, dim, dtype, seed=0):
    """A weight [rows, dim] of this dtype, or int8 rows; odd ones of any codes on odd scales."""
    if dtype != INT8:
        return numbers(rows, dim, seed=seed, dtype=dtype)
    stored = torch.zeros(rows, dim + dim % 2 + 2, dtype=INT8)
    plain.encode_int8_rows(random_rows(rows, dim, seed=seed), stored)
    if numbers is odd:
        scale = torch.tensor(SCALES, dtype=BF16)[torch.arange(rows) * 5 % 11 % len(SCALES)]
        stored[:, -2:] = scale[:, None].view(INT8)
        stored[::4, :dim] = 0
    return stored


def starts_of(table_rows):
    rows = torch.tensor(table_rows)
    return rows.cumsum(0) - rows, rows


@case(
    *product(TABLES, [FP32, BF16, INT8], [2, 4, 16, 32], [torch.int32, torch.int64], [random_rows, odd], [False, True])
)
def lookup(tables, dtype, bits, ids_dtype, numbers, raising):
    table_rows, batch, dim = tables
    starts, rows = starts_of(table_rows)
    weight, ids = weights(numbers, sum(table_rows), dim, dtype), random_ids(table_rows, batch, ids_dtype)
    scale = None if bits == 32 else torch.full((len(table_rows),), 0.01)
    out, rows_out = torch.zeros(ids.numel(), dim), torch.zeros(ids.numel(), dtype=torch.int64)
    clamped = torch.zeros(1, dtype=torch.int64)
    dirty, dirty_starts = torch.zeros(40, dtype=torch.uint8), torch.arange(len(table_rows)) * 9
    limits = (0, 0) if bits == 32 else plain.limits(bits)
    wrong = kernels.lookup(
        ids, starts, rows, weight, scale, limits, out, rows_out, clamped, raising and bits != 32, dirty, dirty_starts, 8
    )
    assert wrong == -1
    return out, rows_out, scale, clamped, dirty


@case(*product([(3, 1, 50, 2), (300, 20, 1, 7)], [0, 5, 300], [FP32, BF16, INT8], [random_rows, odd], [False, True]))
def lookup__(table_rows, batch, dtype, numbers, raising):  # tables of several bit widths
    starts, rows = starts_of(table_rows)
    weight, ids = weights(numbers, sum(table_rows), 3, dtype), random_ids(table_rows, batch, torch.int32)
    scale, highest = torch.full((4,), 0.01), torch.tensor([7, 0, 1, 127], dtype=torch.int32)
    out, rows_out = torch.zeros(ids.numel(), 3), torch.zeros(ids.numel(), dtype=torch.int64)
    clamped = torch.zeros(1, dtype=torch.int64)
    assert kernels.lookup(ids, starts, rows, weight, scale, highest, out, rows_out, clamped, raising) == -1
    for table, high in enumerate(highest.tolist()):  # what its own lookup gives
        one, (first, end) = slice(table, table + 1), (int(starts[table]), int(starts[table] + rows[table]))
        own, found = torch.full((1,), 0.01), torch.zeros(batch, 3)
        kernels.lookup(
            ids[:, one].contiguous(), starts[one] * 0, rows[one], weight[first:end], own if high else None,
            (-high - 1, high), found, torch.zeros(batch, dtype=torch.int64), None, raising and high > 0,
        )  # fmt: skip
        same(out.view(batch, 4, 3)[:, table], found)
        assert high or scale[table] == torch.tensor(0.01)
    return out, rows_out, scale, clamped


@case(*product([-1, 4], [3, 40]))
def lookup_(id, position):  # out of range
    ids = torch.zeros(21, 2, dtype=torch.int32)
    ids.view(-1)[[position, 41]] = id
    starts, rows = starts_of((4, 4))
    out, rows_out = torch.zeros(42, 3), torch.zeros(42, dtype=torch.int64)
    found = kernels.lookup(ids, starts, rows, random_rows(8, 3), None, (0, 0), out, rows_out)
    packed = kernels.lookup_packed(ids, starts, rows, torch.zeros(8, 3, dtype=torch.uint8), 8, torch.ones(2), 3)[1]
    assert (found, packed) == (position, position)


@case(*product(TABLES, [2, 4, 8, 16, 32], [torch.int32, torch.int64], [False, True]))
def lookup_packed(tables, bits, ids_dtype, per_row):
    table_rows, batch, dim = tables
    total, (starts, rows) = sum(table_rows), starts_of(table_rows)
    scale = random_rows(total if per_row else len(table_rows), 1, seed=2)[:, 0]
    if bits > 8:
        codes = random_rows(total, dim, seed=3).mul(100).to(torch.int16 if bits == 16 else FP32)
    else:
        generator = torch.Generator().manual_seed(3)
        codes = torch.randint(256, (total, -(-dim * bits // 8)), generator=generator, device="cpu")
        codes = here(codes.to(torch.uint8))
    groups, ids = GroupMap(starts, starts, 0) if per_row else None, random_ids(table_rows, batch, ids_dtype)
    return kernels.lookup_packed(ids, starts, rows, codes, bits, scale, dim, None, groups)[:1]


def ranges(first, scale=0.05):
    return TableRanges(torch.tensor(first), torch.full((len(first),), scale), 7)


SEVERAL = torch.tensor([7, 0, 127, 1, 32767], dtype=torch.int32)


def gradient(name):
    rows, dim = ROW_GRADIENTS[name]
    return here(rows), dim


UPDATES = [*product(ROW_GRADIENTS, [1.0, -0.3], [False, True, "several"], [random_rows, odd])]


@case(*UPDATES)
def add_rows(name, factor, raising, numbers):
    rows, dim = gradient(name)
    raised = ranges([0, 1, 5, 6, 300]) if raising else None
    raised = raised._replace(highest=here(SEVERAL)) if raising == "several" else raised
    weight = random_rows(901, dim, seed=2)
    assert kernels.add_rows(weight, rows, numbers(len(rows), dim), factor, raised) is weight
    return weight, None if raised is None else raised.scale


@case(*((*update, dtype) for update in UPDATES for dtype in (BF16, INT8)))
def add_rows_stochastic(name, factor, raising, numbers, dtype):
    rows, dim = gradient(name)
    rows, weight, found = rows.unique(), weights(random_rows, 901, dim, dtype, seed=2), []
    for seed in (0, 1, 2**31, 2**32 - 1):
        raised = ranges([0, 1, 5, 6, 300]) if raising else None
        raised = raised._replace(highest=here(SEVERAL)) if raising == "several" else raised
        found.append(kernels.add_rows_stochastic(weight.clone(), rows, numbers(len(rows), dim), factor, seed, raised))
        found.append(None if raised is None else raised.scale)
    return found


@case(*product([16, 17], [-1.0, 1e-3]))
def add_rows_stochastic_(dim, factor):  # rows of odd scales
    weight, rows = weights(odd, 901, dim, INT8), torch.arange(0, 901, 3)
    return kernels.add_rows_stochastic(weight, rows, random_rows(len(rows), dim), factor, 5), None


def sizes(*shape, seed=0):
    """Rows of magnitudes from the least to the largest that float32 has."""
    return random_rows(*shape, seed=seed) * 10.0 ** torch.linspace(-45, 38, shape[0])[:, None]


@case(*product([(0, 3), (1, 1), (3, 0), (7, 2), (300, 16), (200, 17), (1100, 64)], [random_rows, odd, sizes]))
def encode_int8_rows(shape, numbers):
    rows, dim = shape
    out = torch.full((rows, dim + dim % 2 + 2), 99, dtype=INT8)
    kernels.encode_int8_rows(numbers(rows, dim), out)
    return (out,)


@case(*product(ROW_GRADIENTS, [random_rows, odd]))
def sum_duplicates(name, numbers):
    rows, dim = gradient(name)
    return kernels.sum_duplicates(rows, numbers(len(rows), dim))


@case(*product([2**11, 2**36 - 1, 2**36, 2**62]))
def sum_duplicates_(largest):
    rows = torch.tensor([largest, 3, largest - 1, 0, 3, largest, largest // 2, 1])
    return kernels.sum_duplicates(rows, random_rows(8, 2))


# torch's root is not always rounded to nearest, the compiled one's is.
@case(*product([0, 1, 300], [1, 3, 16, 17], [0.0, 1e-5, 1e-3], [1, 4], [0, 40]), rtol=1e-4, atol=1e-7)
def idle_adam(count, dim, l2, stride, earliest):
    table = max(count, 1)
    first = random_rows(table, dim, seed=1) * 1e-4
    weight, second, now = random_rows(table, dim) * 0.05, first.square(), 2000
    last = (torch.arange(table) * 61 % (now - earliest) + earliest + 1).int()
    steps = torch.arange(1, now + 1, stride, dtype=torch.float64)
    alpha, root = 1e-3 / (1 - 0.9**steps), (1 - 0.999**steps).rsqrt()
    powers, fades = idle_powers(0.999, l2), idle_fades(0.9, 0.999, l2)
    course = IdleCourse(alpha.float(), root.float(), powers, fades, stride, 0.9, 0.999, 1e-8, l2)
    rows = torch.arange(count) * 7 % max(count * 2 // 3, 1)  # some twice, others not at all
    changed = kernels.idle_adam(weight, first, second, last, rows, now, course)
    return weight, first * 1e3, second * 1e6, last, changed.sort().values


@case(*product([0, 1, 300], [1, 3, 16, 17], [1.0, 31.6]), rtol=1e-5, atol=1e-7)
def adam_moments(count, dim, root):
    first, second = random_rows(400, dim, seed=1), random_rows(400, dim, seed=2).square()
    rows, values = torch.arange(count) * 3 % 400, random_rows(count, dim)
    values = kernels.adam_moments(first, second, rows, values, 0.9, 0.999, root, 1e-8)
    return first, second, values


@case(*product([FP32, BF16, INT8], [0.0, 1e30, float("nan"), 0.05], [odd, random_rows], [0, 1, 300, 6000]))
def raise_scales(dtype, scale, numbers, count):
    raised, rows = ranges([0, 20, 21, 30], scale), torch.arange(count) * 7 % 33
    kernels.raise_scales(rows, weights(numbers, 33, 3, dtype), raised)
    several = ranges([0, 20, 21, 30], scale)._replace(highest=here(SEVERAL[1:]))
    kernels.raise_scales(rows, weights(numbers, 33, 3, dtype), several)
    return raised.scale, several.scale


@case(*product([(1, 1), (15, 3), (16, 16), (17, 17), (1003, 17)], [FP32, BF16], [*ODD, None], [0, 1]))
def blocks_max(shape, dtype, value, clean):
    table = random_rows(*shape, dtype=dtype)
    if value is not None:
        table[-1, -1] = value
    count = -(-shape[0] // 16)
    dirty, maxima = (torch.arange(count) % 3 > clean * 2).to(torch.uint8), torch.arange(count) / 100
    return torch.tensor(kernels.blocks_max(table, 16, dirty, maxima)), dirty, maxima


@case(*product([(1, 1), (15, 3), (16, 16), (17, 17), (1003, 17)], [odd, random_rows], [0, 1]))
def blocks_max_(shape, numbers, clean):
    count = -(-shape[0] // 16)
    dirty, maxima = (torch.arange(count) % 3 > clean * 2).to(torch.uint8), torch.arange(count) / 100
    return torch.tensor(kernels.blocks_max(weights(numbers, *shape, INT8), 16, dirty, maxima)), dirty, maxima
