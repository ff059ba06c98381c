"""Memory layouts that operations take: blocks of values that share a scale, and the scales of tables in a weight."""

import math
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Limits = tuple[int, int] | Tensor
"""Lowest and highest code; or for tables of several bit widths int32 [tables], the highest code of each: its codes go
from -highest - 1 to highest, and 0 is a table that is not quantized."""


class Tiers(NamedTuple):
    """Rows of a table that is stored in two tiers (`quant/tiered_rows.py`), or some of them, as views of its memory."""

    cold: Tensor
    """uint8 [R, `int4_row_width(dim)`]: rows of 4 bits, and the slots of the others."""
    hot: Tensor
    """int8 [slots, `int8_row_width(dim)`]."""
    dim: int
    owner: Tensor
    """int32 [slots]: the row of the whole table that has a slot, plus 1, or 0."""
    counts: Tensor
    """int16 [slots], to be read without sign: updates counted."""

    @property
    def device(self) -> torch.device:
        return self.cold.device

    def __len__(self) -> int:
        return len(self.cold)


Weight = Tensor | Tiers
"""What rows are read from."""


def int8_row_width(dim: int) -> int:
    """Bytes of an int8 row of `dim` values: codes, a byte of padding where dim is odd, and the scale in bf16."""
    return dim + dim % 2 + 2


def int4_row_width(dim: int) -> int:
    """Bytes of a row of 4 bits: at least 4 of codes, since the number of a slot takes their place, and the scale."""
    return max(4, -(-dim // 2)) + 2


class GroupMap(NamedTuple):
    """Which scale a row has, where blocks of 1 << shift rows of one table share one: row `id` of table t has the scale
    first[t] + (id >> shift).

    With shift 0 each row has its own: whatever raises scales then sets it to exactly what the row needs.
    """

    starts: Tensor
    """int64 [tables], the first row of each."""
    first: Tensor
    """int64 [tables], the first scale of each."""
    shift: int

    def part(self, tables: slice) -> "GroupMap":
        """Of these tables only."""
        return GroupMap(self.starts[tables], self.first[tables], self.shift)

    def of(self, rows: Tensor) -> Tensor:
        """The scale of each row int64 [N] of the weight: int64 [N]."""
        if self.shift == 0:
            return rows
        table = torch.searchsorted(self.starts, rows, right=True).sub_(1)
        return self.first[table] + (rows - self.starts[table] >> self.shift)


class TableRanges(NamedTuple):
    """Scales of the tables in one weight, for code that changes its rows to raise."""

    starts: Tensor
    """int64 [tables], the first row of each."""
    scale: Tensor
    """float32 [tables], or [groups]."""
    highest: int | Tensor
    """The highest code; or int32 [tables], that of each table (0: not quantized, its scale stays)."""
    groups: GroupMap | None = None
    """Which scale a row has; None: that of its table. With it, `highest` is a number."""


IDLE_SIZES = 7
"""Idle steps are taken 1, 2, 4, ... 64 at once."""
EARLY_STEPS = 128
"""Before this step the bias corrections change too fast for a gap to be taken in one."""


class IdleCourse(NamedTuple):
    """What Adam with L2 in the gradient does in each step to weights whose loss has no gradient."""

    alpha: Tensor
    """float32 [entries]: learning rate / (1 - beta1^t) of step t = entry * stride + 1."""
    root: Tensor
    """float32 [entries]: 1 / sqrt(1 - beta2^t)."""
    powers: Tensor
    """float32 [4 * IDLE_SIZES]: see `idle_powers`."""
    fades: Tensor
    """float32 [2 * steps]: see `idle_fades`."""
    stride: int
    beta1: float
    beta2: float
    eps: float
    l2: float

    @property
    def gamma(self) -> float:
        """How much of a weight its first moment takes up in a step."""
        return (1 - self.beta1) * self.l2

    @property
    def most(self) -> float:
        """The rate up to which a block of steps is stable: half of that at which Adam itself no longer is."""
        return (1 + self.beta1) / self.gamma if self.gamma else float("inf")


@lru_cache(8)
def idle_powers(beta2: float, l2: float, device: torch.device | str = "cpu") -> Tensor:
    """For n = 1, 2, 4, ... 64 steps: beta2^((n + 1) / 2), (1 - that) * l2^2, beta2^n, and (1 - that) * l2^2 / 3.

    The last of one step is 1 - beta2. float32 [4 * IDLE_SIZES].
    """
    sizes = [1 << j for j in range(IDLE_SIZES)]
    middle, whole = [beta2 ** ((n + 1) / 2) for n in sizes], [beta2**n for n in sizes]
    last = [1 - beta2, *((1 - power) * l2**2 / 3 for power in whole[1:])]
    lines = [*middle, *((1 - power) * l2**2 for power in middle), *whole, *last]
    return torch.tensor(lines, dtype=torch.float32, device=device)


@lru_cache(8)
def idle_fades(beta1: float, beta2: float, l2: float, device: torch.device | str = "cpu") -> Tensor:
    """For n = 1, 2, ... steps, until beta1^n is below 1e-7: beta1^n, then beta2^(-n / 2) for each n.

    float32 [2 * steps], of a multiple of 16 steps; empty where a gap is not to be taken in one: with L2, or where the
    second moment fades as fast as the first.
    """
    if l2 or beta2 < 0.99 or beta1**2 > beta2:
        return torch.zeros(0, device=device)
    steps = 1 if beta1 < 1e-7 else math.ceil(math.log(1e-7) / math.log(beta1))
    n = torch.arange(1, -(-steps // 16) * 16 + 1, dtype=torch.float64)
    return torch.cat([beta1**n, beta2 ** (-n / 2)]).float().to(device)


class Blocks:
    """Positions of blocks (runs of values that share a scale) in a flat tensor, in the order of encoding.

    A block of a gradient is a channel of a weight, a bucket of K values, a table's rows, or a row.

    Args:
        starts: int64 [N], position of each block's first value.
        lengths: int64 [N], values of each block.
        keys: int64 [N], position of each block's residual and in the random stream; default: `starts`.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, keys: Tensor | None = None) -> None:
        self.starts, self.lengths = starts.contiguous(), lengths.contiguous()
        self.keys = self.starts if keys is None else keys.contiguous()
        ends = lengths.cumsum(0)
        self.offsets = ends - self.lengths
        self.total = int(ends[-1]) if len(ends) else 0

    @classmethod
    def of_rows(cls, counts: Tensor, dim: int, per_row: bool) -> "Blocks":
        """Blocks of gradients [U, dim]: each row, or each table's rows if it has any; counts: int64 [tables]."""
        lengths = counts.new_full((int(counts.sum()),), dim) if per_row else counts[counts > 0] * dim
        return cls(lengths.cumsum(0) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def packed(self) -> "Blocks":
        """The same blocks, contiguous in a tensor of their values; keys stay."""
        return Blocks(self.offsets, self.lengths, self.keys)

    @cached_property
    def block(self) -> Tensor:
        """int64 [total]: the block of each value."""
        return torch.repeat_interleave(self.lengths)

    @cached_property
    def _within(self) -> Tensor:
        return torch.arange(self.total, device=self.starts.device) - self.offsets[self.block]

    @cached_property
    def position(self) -> Tensor:
        """int64 [total]: position of each value."""
        return self.starts[self.block] + self._within

    @cached_property
    def key(self) -> Tensor:
        """int64 [total]: the key of each value."""
        return self.keys[self.block] + self._within
