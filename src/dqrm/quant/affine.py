"""Tables with a scale and a zero point: codes over the range of the weights rather than on both sides of 0.

Affine quantization (Jacob et al., arXiv 1712.05877; torch calls it `per_channel_affine`): with k bits, codes from
low = -2**(k-1) to high = 2**(k-1) - 1 and, for weights w that share one scale,

    min_val = min(0, min w)      max_val = max(0, max w)      scale = max(max_val - min_val, 1e-8) / (2**k - 1)
    zero_point = clamp(low - round(min_val / scale), low, high)
    code = clamp(round(w / scale) + zero_point, low, high)    value = (code - zero_point) * scale

The range contains 0 and the zero point is an integer, so 0.0 is exact. The grid's ends are up to half a step off those
of the range, and a weight there is no further off than anywhere else.
"""

import torch
from torch import Tensor

from dqrm.kernels import TableRanges
from dqrm.quant.config import QATConfig
from dqrm.quant.groups import Groups
from dqrm.quant.packing import TableScales
from dqrm.quant.ranges import TableMax
from dqrm.quant.storage import storage_of
from dqrm.quant.uniform import SMALLEST_MAXIMUM, code_limits, fake_quantize


def affine_parameters(min_val: Tensor, max_val: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero point int32 of ranges [min_val, max_val], float32, that contain 0; all of one shape.

    Computed in float64, in which no range overflows. NaN gives a scale that is NaN.
    """
    low, high = code_limits(bits)
    width = (max_val.double() - min_val.double()).clamp(min=SMALLEST_MAXIMUM)
    scale = (width / (high - low)).float()
    zero_point = low - (min_val.double() / scale.double()).round()
    return scale, zero_point.nan_to_num(low).clamp(low, high).int()


class TableAffine(TableMax):
    """Scales and zero points of tables from their smallest and largest weights, on the clock of `TableMax`.

    With running_max a range is widened to the rows just updated; that of a row with its own scale is set from it. Its
    state is that of `TableMax` and, of each group, the buffers zero_point int32 and min_val and max_val float32.
    """

    fusible = False
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.register_buffer("zero_point", torch.zeros(groups.count, dtype=torch.int32))
        for name in ("min_val", "max_val"):
            self.register_buffer(name, torch.zeros(groups.count))

    @property
    def bytes_per_group(self) -> int:
        return 8

    def only_looked_up_rows_change(self, weight: Tensor) -> None:
        """A periodic refresh reads all rows: nothing is remembered of them."""
        self._promised = True

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        self._set(weight)
        self._scale_known = True
        self._looked_up.clear()
        self._covered(weight)

    def _set(self, weight: Tensor) -> None:
        """From all rows."""
        low, high = self.groups.extremes(weight)
        if len(low):
            self.min_val.copy_(low.clamp(max=0))
            self.max_val.copy_(high.clamp(min=0))
        self._derive(slice(None))

    def _derive(self, index: slice | Tensor) -> None:
        """Scales and zero points from the ranges."""
        self.scale[index], self.zero_point[index] = affine_parameters(
            self.min_val[index], self.max_val[index], self.bits
        )

    def _widen(self, index: Tensor, low: Tensor, high: Tensor) -> None:
        """In place: ranges that contain low and high, float [N], of the groups int64 [N]."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        if self._map is not None and self._map.shift == 0:
            self.min_val[index], self.max_val[index] = low, high
        else:
            self.min_val.scatter_reduce_(0, index, low, "amin")
            self.max_val.scatter_reduce_(0, index, high, "amax")
        self._derive(index)

    def _raise_for(self, rows: Tensor, weight: Tensor) -> None:
        if len(rows):
            values = storage_of(weight).gather(weight, rows)
            self._widen(self._groups_of(rows), *values.aminmax(dim=1))

    def _raise_all(self, weight: Tensor) -> None:
        low, high = self.groups.extremes(weight)
        if len(low):
            self._widen(torch.arange(len(low), device=low.device), low, high)

    def ranges_to_raise(self, weight: Tensor) -> TableRanges | None:
        """None: an optimizer's `rows_changed` follows."""
        return None

    def mark_rows(self, rows: Tensor, first: int, tables: int) -> None:
        super().mark_rows(rows, first, tables)
        self._rows[first] = rows

    def _groups_of(self, rows: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, rows, right=True).sub_(1) if self._map is None else self._map.of(rows)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        """Also widen the ranges to these values (running_max), or count those beyond them (periodic)."""
        index, flat = self._groups_of(self._rows[group.start or 0]), values.reshape(-1, values.shape[-1])
        if flat.numel() and not torch.compiler.is_compiling():
            self._count(flat.detach(), index)
        noise = self._noise(flat, group) if self.stochastic and self.training else None
        self._rows.pop(group.start or 0, None)
        scale, zero_point = self.scale[index, None], self.zero_point[index, None]
        return fake_quantize(flat, scale, self.bits, noise, zero_point).view(values.shape)

    def _count(self, values: Tensor, index: Tensor) -> None:
        if self._raising:
            self._widen(index, *values.aminmax(dim=1))
        if self.training:
            counter = self.clamps.counter(values.numel(), values.device)
            if not self._running:
                counter += ((values < self.min_val[index, None]) | (values > self.max_val[index, None])).sum()

    def table_scales(self, weight: Tensor) -> list[TableScales]:
        zero_points = self.zero_point.split(self.groups.per_table)
        plain = super().table_scales(weight)
        return [each._replace(zero_point=zero.clone()) for each, zero in zip(plain, zero_points)]

    def reset(self) -> None:
        super().reset()
        for buffer in (self.zero_point, self.min_val, self.max_val):
            buffer.zero_()
