"""Scales from the largest magnitude: of tables, with the rules of their refresh; of linear layers, at each forward.

A scale comes from the whole table, and reading a table of ten million rows costs more than the rest of a training step.
With `running_max` (ours, the default) the rows just updated raise it, and an exact refresh is rare: no forward clamps a
weight. With `periodic` (DQRM paper) it is refreshed at training forwards 0, P, 2P, ... and weights that outgrow it in
between are clamped. Either way evaluation and whatever is exported use it too: the loss that a checkpoint reports is
the loss that its codes give.
"""

from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.quant.config import QATConfig
from dqrm.quant.groups import Groups, largest_of_each
from dqrm.quant.linear import LinearMax
from dqrm.quant.quantizer import LookupArguments, WeightFakeQuantizer
from dqrm.quant.storage import storage_of

# Rows per block whose maximum is remembered: small enough that a period dirties few of them.
_BLOCK = 16
# Forwards whose rows running_max keeps while no optimizer changes the weight; with more, it rescans.
_FORWARDS_KEPT = 64


class BlockMaxima:
    """max|w| of every block of 16 rows, so that an exact refresh reads only the blocks that were looked up since.

    Correct as long as only rows that a training forward looked up can have changed; costs 5 bytes per block (0.5 % of a
    float32 table of dim 16).

    Args:
        block: rows of a block, a power of 2; fewer than 16 where fewer rows share a scale.
    """

    def __init__(self, table_rows: tuple[int, ...], device: torch.device | str = "cpu", block: int = _BLOCK) -> None:
        blocks = torch.tensor([0, *(-(-rows // block) for rows in table_rows)], dtype=torch.int64).cumsum(0)
        self.starts = blocks[:-1].to(device)
        self._row_starts = torch.tensor([0, *table_rows[:-1]], dtype=torch.int64).cumsum(0).to(device)
        self._bounds = blocks.tolist()
        self.block = block
        self.dirty = torch.ones(self._bounds[-1], dtype=torch.uint8, device=device)
        self.maxima = torch.zeros(self._bounds[-1], device=device)

    def mark(self, rows: Tensor, first: int, tables: int) -> None:
        """Rows of the whole weight, position i of table first + i % tables, may change (the kernels mark their own)."""
        part = slice(first, first + tables)
        blocks = self.starts[part] + (rows.view(-1, tables) - self._row_starts[part]).div_(
            self.block, rounding_mode="floor"
        )
        self.dirty[blocks.view(-1)] = 1

    def mark_any(self, rows: Tensor) -> None:
        """The same for rows of any tables, in any order."""
        table = torch.searchsorted(self._row_starts, rows, right=True).sub_(1)
        blocks = (rows - self._row_starts[table]).div_(self.block, rounding_mode="floor")
        self.dirty[blocks.add_(self.starts[table])] = 1

    def all_changed(self) -> None:
        """Mark all blocks dirty after the weights were replaced: the next refresh reads everything."""
        self.dirty.fill_(1)

    def table_max(self, number: int, table: Tensor) -> float:
        """max|table| of table `number`, exact."""
        part = slice(self._bounds[number], self._bounds[number + 1])
        return kernels.blocks_max(storage_of(table).operand(table), self.block, self.dirty[part], self.maxima[part])

    def largest(self, number: int, table: Tensor, rows: int) -> Tensor:
        """max|.| of each `rows` rows, a power of 2, of table `number`, exact: float32 [ceil(len(table) / rows)]."""
        self.table_max(number, table)
        part = slice(self._bounds[number], self._bounds[number + 1])
        return largest_of_each(self.maxima[part], max(1, rows // self.block))


class TableMax(WeightFakeQuantizer):
    """Scales of tables in one weight from their largest magnitudes, and the clock that says when to refresh them.

    Blocks of rows that have a scale each (`groups`) are treated as tables are. A row that has its own scale is at hand
    whole: with running_max its scale is that of the row as it is, whenever the row is read.

    Its state is the buffer `scale` (float32 [groups]; 0 until it is first computed) and `scale_ticks` (int64 scalar):
    the number of training forwards, so that a resumed run refreshes at the same steps. Activation checkpointing runs a
    forward twice and so counts it twice.
    """

    fusible = uniform = keeps_ticks = grouped = True

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.register_buffer("scale", torch.zeros(groups.count, dtype=torch.float32))
        self._running = qat.scale_refresh == "running_max" and bits != 32
        self._period = qat.refresh_period
        self._starts, self._map = groups.starts(self.scale.device), groups.map(self.scale.device)
        self._step_goes_on = False
        self._promised = False
        self._raising = False  # whether this forward raises scales to what its rows need
        self._blocks: BlockMaxima | None = None
        # Rows that training forwards looked up, and the weight's version at that time.
        self._looked_up: list[Tensor] = []
        self._looked_up_at = -1
        self._raised_at = -1  # the weight's version when its optimizer last said that scales fit
        # The weight's version when every row was last known to fit its scale, and whether a training forward followed:
        # an update through `.data` changes no version.
        self._covered_at, self._trained_since = -1, False

    def only_looked_up_rows_change(self, weight: Tensor) -> None:
        self._promised = True
        if self.bits != 32 and not self._running and self._blocks is None:
            rows = tuple(len(table) for table in self.groups.tables(weight))
            self._blocks = BlockMaxima(rows, weight.device, min(_BLOCK, self.groups.rows_per_group or _BLOCK))

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        if self.bits == 32:
            return
        if everything and self._blocks is not None:
            self._blocks.all_changed()
        self.scale.copy_(self.scale_of(self._largest(weight)))
        self._scale_known = True
        self._looked_up.clear()
        self._covered(weight)

    def _largest(self, weight: Tensor) -> Tensor:
        """max|w| of each group, from all of its rows: float32 [groups]."""
        if self._blocks is None:
            return self.groups.largest(weight)
        tables = enumerate(self.groups.tables(weight))
        if each := self.groups.rows_per_group:
            return torch.cat([self._blocks.largest(number, table, each) for number, table in tables])
        return torch.tensor([self._blocks.table_max(number, table) for number, table in tables], device=weight.device)

    def _covered(self, weight: Tensor) -> None:
        self._covered_at, self._trained_since = _version(weight), False

    @torch.no_grad()
    def _raise_scale(self, weight: Tensor) -> None:
        """Raise scales to what the rows of the last training forwards need, once an optimizer has changed them."""
        if not self._looked_up or weight._version == self._looked_up_at:
            return
        if len(self._looked_up) > _FORWARDS_KEPT:
            return self.refresh(weight, everything=True)
        for rows in self._looked_up:
            self._raise_for(rows, weight)
        self._looked_up.clear()

    def _ranges(self) -> kernels.TableRanges:
        limits = self.limits
        highest = limits[1] if isinstance(limits, tuple) else limits
        return kernels.TableRanges(self._starts, self.scale, highest, self._map)

    def _raise_to(self, largest: Tensor, index: slice | Tensor = slice(None)) -> None:
        """In place: scales at least those of weights whose largest magnitudes are `largest`, by index.

        As scales, not as products: never below what the same maximum gave when it was exact.
        """
        if isinstance(index, Tensor):
            assert self._map is not None
            kernels.plain.raise_groups(index, largest, self.scale, self._limits[1], self._map)
        else:
            scale = self.scale[index]
            torch.maximum(scale, self.scale_of(largest, index), out=scale)

    def _raise_all(self, weight: Tensor) -> None:
        """Raise scales to what all rows need; of rows with a scale each: set them."""
        if self._map is not None and self._map.shift == 0:
            self.scale.copy_(self.scale_of(self._largest(weight)))
        else:
            self._raise_to(self._largest(weight))

    def _raise_for(self, rows: Tensor, weight: Tensor) -> None:
        """Raise scales to what these rows need: int64 [N] of the weight."""
        storage_of(weight).raise_scales(weight, rows, self._ranges())

    def ranges_to_raise(self, weight: Tensor) -> kernels.TableRanges | None:
        return self._ranges() if self._running and self._scale_known else None

    def raised(self, weight: Tensor) -> None:
        self._looked_up.clear()
        self._raised_at = _version(weight)

    @torch.no_grad()
    def synchronize(self, weight: Tensor) -> None:
        """With running_max: raise scales to what every row needs, whatever has changed it.

        Reads all rows unless it is known that nothing but rows looked up has changed. Evaluation, copies and state
        dicts call it, and each training step whose gradients are dense: its update reads the whole table in any case.
        """
        self._raise_scale(weight)
        if not self._running or not self._scale_known or self._promised:
            return
        if self._trained_since or _version(weight) != self._covered_at:
            self._raise_all(weight)
            self._covered(weight)

    def note_rows(self, rows: Tensor, weight: Tensor, sparse: bool) -> None:
        if self._raising and sparse and weight.requires_grad:
            if len(self._looked_up) <= _FORWARDS_KEPT:
                self._looked_up.append(rows)
            self._looked_up_at = weight._version

    def lookup_arguments(self, weight: Tensor, rows: int) -> LookupArguments:
        counting = self.training and self.bits != 32
        counter = self.clamps.counter(rows * weight.shape[1], weight.device) if counting else None
        scale = None if self.bits == 32 else self.scale
        return scale, self._map, self.limits, self._blocks, counter, self._raising

    def mark_rows(self, rows: Tensor, first: int, tables: int) -> None:
        super().mark_rows(rows, first, tables)
        if self._map is not None:
            self._rows[first] = rows
        if self._blocks is not None:
            self._blocks.mark(rows, first, tables)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        """Also raise the scales to what these values need (running_max), or count what they clamp (periodic)."""
        index, shape = self._index(group), values.shape
        if isinstance(index, Tensor):
            values = values.reshape(-1, shape[-1])
        if values.numel() and not torch.compiler.is_compiling():
            self._meet(values.detach(), index, group)
        return self.values_of(values, self.scale[index], group).view(shape)

    def _index(self, group: slice) -> slice | Tensor:
        """Of the tables' scales, or for each row that was marked: int64 [N]."""
        if self._map is None:
            return group
        key = group.start or 0
        rows = self._rows[key] if self.stochastic and self.training else self._rows.pop(key)
        return self._map.of(rows)

    def _meet(self, values: Tensor, index: slice | Tensor, group: slice) -> None:
        values = values.view(-1, len(self.scale[index]), values.shape[-1])
        if self._raising:
            self._raise_to(values.abs().amax((0, 2)).float(), index)
        if not self.training:
            return
        counter = self.clamps.counter(values.numel(), values.device)
        if not self._running:
            codes = (values.float() / self.scale[index, None]).round_()
            low, high = self._limits
            if self._highest is None:
                counter += ((codes < low) | (codes > high)).sum()
            else:
                highest = self._highest[group, None]
                counter += (((codes < -highest - 1) | (codes > highest)) & (highest > 0)).sum()

    def same_step(self) -> None:
        self._step_goes_on = True

    @torch.no_grad()
    def rows_changed(self, rows: Tensor, weight: Tensor) -> None:
        if self.bits == 32 or len(rows) == 0:
            return
        if self._blocks is not None:
            self._blocks.mark_any(rows)
        if self._running and self._scale_known and self._raised_at != _version(weight):
            self._raise_for(rows, weight)
        self._looked_up.clear()

    def weights_replaced(self, weight: Tensor, ticks: int) -> None:
        super().weights_replaced(weight, ticks)
        self._looked_up.clear()
        self._step_goes_on = False
        if self._blocks is not None:
            self._blocks.all_changed()
        self._covered(weight)  # evaluation uses the scales that were saved with the weights

    def current_scale(self, weight: Tensor) -> Tensor:
        """The scales that a forward in evaluation uses: float32 [groups]. Does not advance the step count."""
        self.synchronize(weight)
        if not self._scale_known:
            self.refresh(weight)
        self.clamps.check()
        return self.scale

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        """In training, advance the step count by one and refresh what is due."""
        # An update may follow in training, or while gradients are recorded in evaluation.
        learning = self.training or (torch.is_grad_enabled() and weight.requires_grad)
        self._raising = learning and self._running
        if not learning:
            self.current_scale(weight)
            return
        if sparse or _version(weight) == self._covered_at:
            self._raise_scale(weight)
        else:
            self.synchronize(weight)
        due = not self._scale_known
        if self.training:
            self.clamps.forward_begins()
            if self._step_goes_on and not due:
                self._step_goes_on = False
            else:
                due = due or self.scale_ticks % self._period == 0
                self.scale_ticks += 1
        if due:
            self.refresh(weight)
        self._trained_since = True

    def weight_moved(self, weight: Tensor, cast: bool) -> None:
        self._starts, self._map = self.groups.starts(weight.device), self.groups.map(weight.device)
        self._looked_up.clear()
        self._covered_at = -1
        if self._running and self._scale_known and cast:
            with torch.no_grad():  # rounding to another type makes some weights larger
                self._raise_all(weight)
        if self._blocks is not None:
            self._blocks = None
            self.only_looked_up_rows_change(weight)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the version counter of their weight starts again."""
        versions = {"_looked_up_at": -1, "_raised_at": -1, "_covered_at": -1}
        return {**self.__dict__, "_looked_up": list(self._looked_up), **versions}

    def extra_repr(self) -> str:
        period = "" if self._running else f", scale_period={self.qat.scale_period}"
        return f"scale_refresh={self.qat.scale_refresh!r}{period}"


def _version(weight: Tensor) -> int:
    return -2 if weight.is_inference() else int(weight._version)


def max_quantizer(qat: QATConfig, bits: int, groups: Groups) -> WeightFakeQuantizer:
    """The scale of the largest magnitude for tables or for a linear layer; for affine tables that of their range."""
    if groups.table_rows is None:
        return LinearMax(qat, bits, groups)
    if qat.table_qscheme == "affine" and bits != 32:
        from dqrm.quant.affine import TableAffine

        return TableAffine(qat, bits, groups)
    return TableMax(qat, bits, groups)
