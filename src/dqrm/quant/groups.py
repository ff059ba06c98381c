"""Which rows of a weight share a scale: all of a table, blocks of a table's rows, or single rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dqrm.kernels import GroupMap
from dqrm.quant.config import QATConfig
from dqrm.quant.packing import pieces
from dqrm.quant.storage import storage_of


@dataclass(frozen=True)
class Groups:
    """The parts of a weight [rows, dim] that have one scale each."""

    count: int
    table_rows: tuple[int, ...] | None = None
    """Rows of each table in the weight; None: of a linear layer, with one group per row, or one in all."""
    bits: tuple[int, ...] | None = None
    """Bits of each table where they differ (32: not quantized); None: all have the quantizer's `bits`."""
    rows_per_group: int | None = None
    """Rows of a table that share a scale, a power of 2; None: all of them."""

    @classmethod
    def of_tables(cls, qat: QATConfig, table_rows: Sequence[int], bits: Sequence[int]) -> "Groups":
        """Those of tables of these rows and bits, at the granularity that `qat` names."""
        mixed = tuple(bits) if len({*bits}) > 1 else None
        each = qat.rows_per_scale
        count = len(table_rows) if each is None else sum(-(-rows // each) for rows in table_rows)
        return cls(count, tuple(table_rows), mixed, each)

    def tables(self, weight: Tensor) -> Sequence[Tensor]:
        """Each table's rows of the weight: views without a gradient."""
        weight = weight.detach()
        return [weight] if self.count == 1 else weight.split(self.table_rows or ())

    def starts(self, device: torch.device) -> Tensor:
        """The first row of each table: int64 [tables]."""
        return torch.tensor([0, *(self.table_rows or ())][:-1], dtype=torch.int64, device=device).cumsum(0)

    @property
    def per_table(self) -> list[int]:
        """The number of groups of each table."""
        each = self.rows_per_group
        return [1 if each is None else -(-rows // each) for rows in self.table_rows or ()]

    def map(self, device: torch.device) -> GroupMap | None:
        """Which scale a row has; None: that of its table."""
        if self.rows_per_group is None:
            return None
        first = torch.tensor([0, *accumulate(self.per_table)][:-1], dtype=torch.int64, device=device)
        return GroupMap(self.starts(device), first, self.rows_per_group.bit_length() - 1)

    def largest(self, weight: Tensor) -> Tensor:
        """max|weight| of each group, from all of its rows: [groups], without a gradient."""
        if self.count == 0 or weight.numel() == 0:
            return torch.zeros(self.count, device=weight.device)
        if self.rows_per_group is not None:
            low, high = self.extremes(weight)
            return torch.maximum(-low, high)
        if self.table_rows is not None:
            largest = storage_of(weight).largest
            return torch.stack([largest(table) for table in self.tables(weight)])
        magnitude = weight.detach().abs()
        return magnitude.amax(1) if self.count == len(weight) else magnitude.amax().view(1)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each group of tables, from all rows: float32 [groups] each."""
        low, high = [torch.zeros(0, device=weight.device)], [torch.zeros(0, device=weight.device)]
        for table in self.tables(weight) if weight.numel() else ():
            ends = [torch.aminmax(piece, dim=1) for piece in pieces(table)]
            each = self.rows_per_group or len(table)
            low.append(-largest_of_each(-torch.cat([end.min for end in ends]).float(), each))
            high.append(largest_of_each(torch.cat([end.max for end in ends]).float(), each))
        return torch.cat(low), torch.cat(high)


def largest_of_each(x: Tensor, size: int) -> Tensor:
    """The largest of each `size` numbers of x [N], of which the last may be fewer: [ceil(N / size)]."""
    if size == 1:
        return x
    whole = len(x) // size * size
    parts = [x[:whole].view(-1, size).amax(1)] if whole else []
    return torch.cat([*parts, x[whole:].amax().view(1)] if whole < len(x) else parts)
