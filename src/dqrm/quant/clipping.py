"""Scales that clip: the least squared error on a grid of fractions of max|w| ('mse'), or a percentile of |w|.

A scale of the largest magnitude spends codes on a few outliers. These scales are set at a refresh (every `scale_period`
training steps; every `rescan_period` with `scale_refresh: running_max`) and kept in between: weights beyond are clamped
and counted. A linear layer's scale is from its whole weight. A table's is from a sample of its rows, so that a refresh
reads a bounded part of it: 16384 weights, of rows drawn from (training step, table), or all of a table with no more.
And whole-table QAT, for comparison.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.quant.config import QATConfig
from dqrm.quant.groups import Groups
from dqrm.quant.ptq import grid_scales
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.quant.ranges import TableMax
from dqrm.quant.storage import storage_of
from dqrm.quant.uniform import scale_from_max

SAMPLED = 1 << 14
"""Weights of a table that a refresh reads."""
QUANTILE_LIMIT = 1 << 24
"""The most values of which torch.quantile gives a quantile; a linear layer with one scale may have more."""


def sampled_rows(rows: int, dim: int, number: int, step: int) -> Tensor:
    """Rows of a table to set its scale from: int64; all of them, or drawn with replacement from (table, step)."""
    count = max(1, SAMPLED // max(1, dim))
    if rows <= count:
        return torch.arange(rows)
    return torch.from_numpy(np.random.default_rng([step, number]).integers(0, rows, count))


def clipped_scales(rows: Tensor, bits: int, qat: QATConfig) -> Tensor:
    """One scale for each of the rows [groups, n] by the quantizer that `qat` names: float32 [groups]."""
    if rows.shape[1] == 0:
        return scale_from_max(rows.new_zeros(len(rows)), bits)
    if qat.quantizer == "mse":
        return grid_scales(rows, bits)
    return scale_from_max(_quantile(rows.detach().float().abs(), qat.percentile / 100), bits)


def _quantile(x: Tensor, q: float) -> Tensor:
    """The quantile q of each row of x [groups, n], linearly interpolated: [groups]."""
    if x.shape[1] <= QUANTILE_LIMIT:
        return torch.quantile(x, q, dim=1)
    position = q * (x.shape[1] - 1)
    low, ordered = int(position), x.sort(dim=1).values
    return torch.lerp(ordered[:, low], ordered[:, min(low + 1, x.shape[1] - 1)], position - low)


class TableClipped(TableMax):
    """Scales of tables by `clipped_scales` of a sample of their rows, on the clock of `TableMax`."""

    clips = True
    grouped = False

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self._running = False  # nothing raises a scale that clips on purpose

    def only_looked_up_rows_change(self, weight: Tensor) -> None:
        """Nothing is remembered of rows: a refresh reads a sample."""
        self._promised = True

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        for number, table in enumerate(self.groups.tables(weight)):
            bits = self.groups.bits[number] if self.groups.bits else self.bits
            rows = sampled_rows(len(table), table.shape[1], number, self.scale_ticks).to(weight.device)
            sample = storage_of(weight).gather(table, rows).view(1, -1)
            self.scale[number] = 1 if bits == 32 else clipped_scales(sample, bits, self.qat)[0]
        self._scale_known = True
        self._covered(weight)


class LinearClipped(WeightFakeQuantizer):
    """Scales of a linear layer's output channels (or one in all), set at a refresh from the whole weight.

    Its state is the buffer `scale` and `scale_ticks`, how many training steps there were.
    """

    uniform = keeps_ticks = needs_step = clips = True

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.register_buffer("scale", torch.zeros(groups.count))
        self._period = qat.refresh_period

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        rows = weight.detach().float()
        rows = rows if self.groups.count == len(rows) else rows.reshape(1, -1)
        self.scale.copy_(clipped_scales(rows, self.bits, self.qat))
        self._scale_known = True

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        if self.training and self._tick() % self._period == 0:
            self.refresh(weight)
        super().before_forward(weight, sparse)


def clipped_quantizer(qat: QATConfig, bits: int, groups: Groups) -> WeightFakeQuantizer:
    """'mse' or 'percentile' for tables or for a linear layer."""
    return (LinearClipped if groups.table_rows is None else TableClipped)(qat, bits, groups)


class _Taken(torch.autograd.Function):
    """Values taken from elsewhere; the gradient passes to those that they are of (STE)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(values).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class NaiveTables(TableMax):
    """Whole-table QAT (DQRM paper, Figure 2a): in each training step every table is read for its scale and quantized
    as a whole, and rows are looked up in that float32 copy.

    For comparison: the values are those of `max` with a scale period of 1, at a cost that grows with the tables. The
    gradient stays that of the rows in use.
    """

    fusible = grouped = False
    marks_rows = True

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self._running, self._period = False, 1
        self._quantized: Tensor | None = None

    def only_looked_up_rows_change(self, weight: Tensor) -> None:
        """Of no use: every step reads everything."""
        self._promised = True

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        super().before_forward(weight, sparse)
        self._quantized = None
        if self.training and self.bits != 32:
            parts, first = [], 0
            for number, table in enumerate(self.groups.tables(weight)):
                group = slice(number, number + 1)
                self.mark_rows(torch.arange(first, first + len(table), device=weight.device), number, 1)
                parts.append(self.values_of(storage_of(table).read(table)[:, None], self.scale[group], group)[:, 0])
                first += len(table)
            self._rows.clear()
            self._quantized = torch.cat(parts) if parts else storage_of(weight).read(weight)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        if self._quantized is None:
            return super().fake_quantize(values, group)
        self.clamps.counter(values.numel(), values.device)  # none is: scales are of these weights
        taken: Tensor = _Taken.apply(values, self._quantized.index_select(0, self._rows.pop(group.start or 0)))
        return taken

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_quantized": None}


def naive_quantizer(qat: QATConfig, bits: int, groups: Groups) -> WeightFakeQuantizer:
    """'naive' for tables; a linear layer's weight is quantized as a whole by 'max' already."""
    from dqrm.quant.linear import LinearMax

    return (LinearMax if groups.table_rows is None else NaiveTables)(qat, bits, groups)
