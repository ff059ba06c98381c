"""Every operation on random and odd inputs: each case gives all that the operation returns or writes."""

from itertools import product

import pytest
import torch

from dqrm import kernels
from dqrm.kernels import Blocks, IdleCourse, TableRanges, plain
from dqrm.kernels.layout import idle_powers
from dqrm.models.interaction import pairs
from kernel_helpers import ODD, ROW_GRADIENTS, here, random_ids, random_rows, same
from selection import pairwise

FP32, BF16 = torch.float32, torch.bfloat16
CASES = []


def case(*grid, rtol=0.0, atol=0.0):
    """The function named as the operation gives all that the operation gives or writes, for each point of the grid."""

    def add(function):
        quick = set(pairwise(grid))
        for number, point in enumerate(grid):
            name = "-".join(getattr(value, "__name__", str(value)) for value in (function, *point))
            marks = () if number in quick else pytest.mark.slow
            CASES.append(pytest.param(function, point, (rtol, atol), id=name, marks=marks))
        return function

    return add


def odd(*shape, dtype=FP32, seed=1):
    choice = torch.randint(len(ODD), shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return torch.tensor(ODD)[here(choice)].to(dtype)


# The last of each list is more than the kernels ask for before they use threads.
TABLES = [((1,), 5, 3), ((7,), 129, 16), ((9, 4), 0, 3), ((5, 6), 1, 64), ((3, 1, 50, 2), 300, 17)]


def starts_of(table_rows):
    rows = torch.tensor(table_rows)
    return rows.cumsum(0) - rows, rows


@case(*product(TABLES, [FP32, BF16], [2, 4, 16, 32], [torch.int32, torch.int64], [random_rows, odd], [False, True]))
def lookup(tables, dtype, bits, ids_dtype, numbers, raising):
    table_rows, batch, dim = tables
    starts, rows = starts_of(table_rows)
    weight, ids = numbers(sum(table_rows), dim, dtype=dtype), random_ids(table_rows, batch, ids_dtype)
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


@case(*product([(3, 1, 50, 2), (300, 20, 1, 7)], [0, 5, 300], [FP32, BF16], [random_rows, odd], [False, True]))
def lookup__(table_rows, batch, dtype, numbers, raising):  # tables of several bit widths
    starts, rows = starts_of(table_rows)
    weight, ids = numbers(sum(table_rows), 3, dtype=dtype), random_ids(table_rows, batch, torch.int32)
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
    return kernels.lookup_packed(random_ids(table_rows, batch, ids_dtype), starts, rows, codes, bits, scale, dim)[:1]


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


@case(*UPDATES)
def add_rows_stochastic(name, factor, raising, numbers):
    rows, dim = gradient(name)
    rows, weight, found = rows.unique(), random_rows(901, dim, seed=2, dtype=BF16), []
    for seed in (0, 1, 2**31, 2**32 - 1):
        raised = ranges([0, 1, 5, 6, 300]) if raising else None
        raised = raised._replace(highest=here(SEVERAL)) if raising == "several" else raised
        found.append(kernels.add_rows_stochastic(weight.clone(), rows, numbers(len(rows), dim), factor, seed, raised))
        found.append(None if raised is None else raised.scale)
    return found


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
    first = random_rows(count, dim, seed=1) * 1e-4
    weight, second, now = random_rows(count, dim) * 0.05, first.square(), 2000
    last = (torch.arange(count) * 61 % (now - earliest) + earliest + 1).int()
    steps = torch.arange(1, now + 1, stride, dtype=torch.float64)
    alpha, root = 1e-3 / (1 - 0.9**steps), (1 - 0.999**steps).rsqrt()
    course = IdleCourse(alpha.float(), root.float(), idle_powers(0.999, l2), stride, 0.9, 1e-8, l2)
    kernels.idle_adam(weight, first, second, last, now, course)
    return weight, first * 1e3, second * 1e6


@case(*product([FP32, BF16], [0.0, 1e30, float("nan"), 0.05], [odd, random_rows], [0, 1, 300, 6000]))
def raise_scales(dtype, scale, numbers, count):
    raised, rows = ranges([0, 20, 21, 30], scale), torch.arange(count) * 7 % 33
    kernels.raise_scales(rows, numbers(33, 3, dtype=dtype), raised)
    several = ranges([0, 20, 21, 30], scale)._replace(highest=here(SEVERAL[1:]))
    kernels.raise_scales(rows, numbers(33, 3, dtype=dtype), several)
    return raised.scale, several.scale


@case(*product([(1, 1), (15, 3), (16, 16), (17, 17), (1003, 17)], [FP32, BF16], [*ODD, None], [0, 1]))
def blocks_max(shape, dtype, value, clean):
    table = random_rows(*shape, dtype=dtype)
    if value is not None:
        table[-1, -1] = value
    count = -(-shape[0] // 16)
    dirty, maxima = (torch.arange(count) % 3 > clean * 2).to(torch.uint8), torch.arange(count) / 100
    return torch.tensor(kernels.blocks_max(table, 16, dirty, maxima)), dirty, maxima


WEIGHTS = [(1, 1), (3, 17), (17, 3), (64, 300), (512, 64), (5, 0), (0, 5)]


@case(*product([2, 4, 8, 16], [True, False], [random_rows, odd]))
def quantize_weights(bits, per_channel, numbers):
    weights = [numbers(*shape) * 10.0 ** torch.linspace(-9, 3, shape[0])[:, None] for shape in WEIGHTS]
    highest = plain.limits(bits)[1]
    found = []
    for codes in [False] if bits == 16 else [False, True]:
        found += kernels.quantize_weights(weights, [(per_channel, highest, codes)] * len(weights))
        for few in (weights[:1], weights[-2:], []):
            found += kernels.quantize_weights(few, [(per_channel, highest, codes)] * len(few))
    return [tensor for pair in found for tensor in pair]


SHAPES = [(0, 3), (1, 1), (5, 17), (129, 64), (65, 513)]


# torch fuses the product into the sum, or not: one rounding to bf16.
@case(*product(SHAPES, [False, True], [False, True], [random_rows, odd]), rtol=2**-7, atol=1e-30)
def finish_linear(shape, per_channel, relu, numbers):
    outputs = shape[1]
    scale = random_rows(outputs if per_channel else 1, 1, seed=2).abs()[:, 0]
    return (kernels.finish_linear(numbers(*shape, dtype=BF16), scale, random_rows(outputs, 1, seed=3)[:, 0], relu),)


@case(*product(SHAPES, [FP32, BF16], ["none", "tensor", "channel"], [False, True]), rtol=1e-5, atol=1e-4)
def start_linear(shape, dtype, scales, relu):
    grad, y = random_rows(*shape, dtype=dtype), random_rows(*shape, seed=1, dtype=dtype).relu() if relu else None
    scale = None if scales == "none" else random_rows(1 if scales == "tensor" else shape[1], 1, seed=2)[:, 0]
    return kernels.start_linear(grad, y, scale)


@case(
    *product(
        [(0, 2, 3), (1, 1, 1), (5, 5, 3), (3, 26, 16), (2, 5, 64), (153, 13, 17)], [FP32, BF16, None], [False, True]
    ),
    rtol=0.05,
    atol=0.5,
)
def interact(shape, dense_dtype, self_interaction):
    batch, count, dim = shape
    tables = random_rows(batch * count, dim, seed=1).view(shape).requires_grad_()
    dense = None if dense_dtype is None else random_rows(batch, dim, seed=2, dtype=dense_dtype).requires_grad_()
    chosen = here(pairs(count + (dense is not None), self_interaction))
    out = kernels.interact(dense, tables, chosen, self_interaction)
    out.backward(random_rows(batch, out.shape[1], seed=3, dtype=out.dtype))
    return out.detach(), tables.grad, None if dense is None else dense.grad


BLOCKS = {
    "none": ([], [], []),
    "empty": ([0, 5, 5, 9, 2], [1, 0, 1, 0, 1], [8, 0, 1, 1, 30]),
    "long": ([17], [617], [60]),
    "ragged": ([20, 0, 40, 11], [7, 11, 2, 9], [60, 4, 2, 90]),
    "many": (list(range(0, 4500, 3)), [3, 1, 2] * 500, list(range(0, 4500, 3))),
}
BLOCK_CASES = (BLOCKS, [False, True], [random_rows, odd])


def blocks_and_values(name, with_residual, numbers):
    blocks = Blocks(*(torch.tensor(part, dtype=torch.int64) for part in BLOCKS[name]))
    return numbers(4500, 1)[:, 0], blocks, random_rows(4500, 1, seed=5)[:, 0] if with_residual else None


@case(*product(*BLOCK_CASES, [4, 8]))
def block_scales(name, with_residual, numbers, bits):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    return (kernels.block_scales(x, blocks, bits, residual),)


@case(*product(*BLOCK_CASES, [4, 8], [None, 7, 2**32 - 1], [False, True]))
def quantize_blocks(name, with_residual, numbers, bits, seed, with_out):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    out = torch.zeros(blocks.total, dtype=torch.int8) if with_out else None
    return kernels.quantize_blocks(x, blocks, torch.full((len(blocks),), 0.1), bits, residual, seed, out), residual


@case(*product(*BLOCK_CASES, [FP32, BF16], [None, 7, 2**32 - 1]))
def cast_blocks(name, with_residual, numbers, dtype, seed):
    x, blocks, residual = blocks_and_values(name, with_residual, numbers)
    return kernels.cast_blocks(x, blocks, dtype, residual, seed), residual


@case(*product(BLOCKS, [torch.int8, BF16, FP32], [False, True]))
def decode_blocks(name, dtype, add):
    x, blocks, _ = blocks_and_values(name, False, random_rows)
    stored = (x[: blocks.total] * 50).to(dtype)
    kernels.decode_blocks(stored, blocks, x, random_rows(len(blocks), 1)[:, 0] if dtype == torch.int8 else None, add)
    return (x,)


def nibbles(count):
    codes = torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(count), device="cpu")
    return here(codes.to(torch.int8))


@case(*product([0, 1, 2, 17, 255, 1000]))
def pack_nibbles(count):
    return (kernels.pack_nibbles(nibbles(count)),)


@case(*product([0, 1, 2, 17, 255, 1000]))
def unpack_nibbles(count):
    return kernels.unpack_nibbles(plain.pack_nibbles(nibbles(count)), count), nibbles(count)


FORMATS = [(torch.int8, 4), (torch.int8, 8), (BF16, 0), (FP32, 0)]
MESSAGES = [*product([0, 1, 9, 70_000], [False, True], FORMATS, [None, 7])]


def message_of(encode, count, per_row, format, seed, given=None):
    sizes = [1, 2, 255, 257, 65_537, 2**24 + 1, 2**31]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    rows = here(torch.randint(int(bounds[-1]), (count,), generator=generator, device="cpu").unique())
    widths = torch.tensor([max(1, -(-(size - 1).bit_length() // 8)) for size in sizes])
    return encode(rows, random_rows(len(rows), 3), bounds, widths, per_row, *format, given, seed), bounds, widths


@case(*MESSAGES)
def encode_rows(count, per_row, format, seed):
    given = None if per_row or seed else torch.full((7,), 0.1)
    message, sizes = message_of(kernels.encode_rows, count, per_row, format, seed, given)[0]
    return message, torch.tensor(sizes)


@case(*MESSAGES)
def decode_rows(count, per_row, format, seed):
    (message, _), bounds, widths = message_of(plain.encode_rows, count, per_row, format, seed)
    return kernels.decode_rows(message, bounds, widths, 3, per_row, *format)
