"""Cases of the operations on tables in two tiers."""

from itertools import product

import torch

from dqrm import kernels
from dqrm.kernels import GroupMap, TableRanges, Tiers, plain
from dqrm.kernels.layout import int4_row_width, int8_row_width
from kernel_helpers import random_ids, random_rows
from kernels.cases import case, odd

SHAPES = [(1, 8, 1), (50, 0, 3), (200, 16, 7), (200, 16, 16), (900, 40, 17), (900, 160, 64)]
"""Rows, slots, dim."""


def tiers(rows, slots, dim, numbers=random_rows, steps=5):
    """A weight whose slots are taken, by updates in plain torch."""
    weight = Tiers(
        torch.zeros(rows, int4_row_width(dim), dtype=torch.uint8), torch.zeros(slots, int8_row_width(dim)).char(), dim,
        torch.zeros(slots, dtype=torch.int32), torch.zeros(slots, dtype=torch.int16),
    )  # fmt: skip
    plain.encode_tiers(numbers(rows, dim), weight)
    for step in range(steps):
        some = torch.arange(0, rows, step + 1)
        plain.update_tiers(weight, some, random_rows(len(some), dim, seed=step), 0.1, step)
    return weight


def contents(weight):
    return weight.cold, weight.hot.view(torch.uint8), weight.owner, weight.counts


@case(*product(SHAPES, [random_rows, odd]))
def encode_tiers(shape, numbers):
    weight = tiers(*shape)
    kernels.encode_tiers(numbers(shape[0], shape[2], seed=9), weight)
    return contents(weight)


@case(*product(SHAPES, [random_rows, odd], [0, 2**32 - 1], [None, "table", "row"]))
def update_tiers(shape, numbers, seed, raising):
    rows, _, dim = shape
    weight, found = tiers(*shape, numbers), []
    weight.counts[1::3] = -1  # 65535
    for step in range(3):
        some = torch.arange(min(step, rows), rows, 2)
        starts = torch.tensor([0])
        groups = GroupMap(starts, torch.tensor([0]), 0) if raising == "row" else None
        ranges = TableRanges(starts, torch.zeros(rows if groups else 1), 7, groups) if raising else None
        values = random_rows(len(some), dim, seed=step)
        found += [kernels.update_tiers(weight, some, values, -0.3, (seed + step) % 2**32, ranges)]
        found += [] if ranges is None else [ranges.scale]
    return [*found, *contents(weight)]


@case(*product([(200, 16, 7), (900, 160, 16), (900, 40, 17)], [2, 4, 8, 32], [False, True]))
def lookup___(shape, bits, raising):
    rows, _, dim = shape
    weight, starts = tiers(*shape), torch.tensor([0, rows // 3])
    ids, each = random_ids((rows // 3, rows - rows // 3), 600, torch.int32), torch.tensor([rows // 3, rows - rows // 3])
    scale = None if bits == 32 else torch.full((2,), 0.01)
    out, rows_out, clamped = torch.zeros(1200, dim), torch.zeros(1200, dtype=torch.int64), torch.zeros(1).long()
    limits = (0, 0) if bits == 32 else plain.limits(bits)
    assert kernels.lookup(ids, starts, each, weight, scale, limits, out, rows_out, clamped, raising and bits < 32) == -1
    return out, rows_out, clamped, scale


@case(*product(SHAPES, [random_rows, odd]))
def raise_scales__(shape, numbers):
    ranges = TableRanges(torch.tensor([0]), torch.zeros(1), 7)
    kernels.raise_scales(torch.arange(shape[0]), tiers(*shape, numbers), ranges)
    return (ranges.scale,)


@case(*product(SHAPES, [random_rows, odd]))
def blocks_max__(shape, numbers):
    count = -(-shape[0] // 16)
    dirty, maxima = torch.ones(count, dtype=torch.uint8), torch.zeros(count)
    return torch.tensor(kernels.blocks_max(tiers(*shape, numbers), 16, dirty, maxima)), dirty, maxima
