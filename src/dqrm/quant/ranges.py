"""When a table's scale is refreshed, and from which rows.

A scale comes from the whole table, and reading a table of ten million rows costs more than the rest of a training step.
So it is refreshed at training forwards 0, P, 2P, ... (P: the scale period; DQRM paper) and reused between them, in
evaluation, and in whatever is exported: the loss that a checkpoint reports is the loss that its codes give.
With `running_max` (ours) the rows just updated raise the scale in between, and the exact refresh is rare.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqrm import kernels
from dqrm.quant.config import REFRESHES
from dqrm.quant.uniform import check_bits, code_limits, scale_from_max

# Rows read at once where the kernels cannot be used: torch may copy what it reduces.
_CHUNK = 1 << 20
# Rows per block whose maximum is remembered: small enough that a period dirties few of them.
_BLOCK = 16
# Forwards whose rows running_max keeps while no optimizer changes the weight; with more, it rescans.
_FORWARDS_KEPT = 64


def max_abs(weight: Tensor) -> Tensor:
    """max|weight| as a float32 scalar tensor, in one pass and without a copy of `weight`."""
    if weight.numel() == 0:
        return torch.zeros((), device=weight.device)
    pieces = [torch.stack(torch.aminmax(piece)) for piece in weight.split(_CHUNK)]
    low, high = pieces[0] if len(pieces) == 1 else torch.stack(pieces).unbind(1)
    return torch.maximum(-low.amin(), high.amax()).float()


class BlockMaxima:
    """max|w| of every block of 16 rows, so that an exact refresh reads only the blocks that were looked up since.

    Right as long as only rows that a training forward looked up can have changed; costs 5 bytes per block (0.5 % of a
    float32 table of dim 16).
    """

    def __init__(self, table_rows: tuple[int, ...]) -> None:
        blocks = torch.tensor([0, *(-(-rows // _BLOCK) for rows in table_rows)], dtype=torch.int64).cumsum(0)
        self.starts = blocks[:-1].contiguous()
        self._row_starts = torch.tensor([0, *table_rows[:-1]], dtype=torch.int64).cumsum(0)
        self._bounds = blocks.tolist()
        self.block = _BLOCK
        self.dirty = torch.ones(self._bounds[-1], dtype=torch.uint8)
        self.maxima = torch.zeros(self._bounds[-1])

    def mark(self, rows: Tensor, first: int, tables: int) -> None:
        """Rows of the whole weight, position i of table first + i % tables, may change (the kernels mark their own)."""
        part = slice(first, first + tables)
        blocks = self.starts[part] + (rows.view(-1, tables) - self._row_starts[part]).div_(
            _BLOCK, rounding_mode="floor"
        )
        self.dirty[blocks.view(-1)] = 1

    def mark_any(self, rows: Tensor) -> None:
        """The same for rows of any tables, in any order."""
        table = torch.searchsorted(self._row_starts, rows, right=True).sub_(1)
        blocks = (rows - self._row_starts[table]).div_(_BLOCK, rounding_mode="floor")
        self.dirty[blocks.add_(self.starts[table])] = 1

    def all_changed(self) -> None:
        """The weights are others now: the next refresh reads everything."""
        self.dirty.fill_(1)

    def table_max(self, number: int, table: Tensor) -> float:
        """max|table| of table `number`, exact."""
        part = slice(self._bounds[number], self._bounds[number + 1])
        return kernels.blocks_max(table, self.block, self.dirty[part], self.maxima[part])


class TableScales(nn.Module):
    """Mixin: scales of the tables in `self.weight`, and the clock that says when to refresh them.

    Adds the buffer `scale` (float32 [tables]; 0 until it is first computed) and, to the state dict, `scale_ticks`
    (int64 scalar): how many training forwards there were, so that a resumed run refreshes at the same steps. A state
    dict without them (an unquantized model's) loads too; the scale is then computed at the next forward.
    Activation checkpointing runs a forward twice and so ticks twice.
    """

    weight: Any
    bits: int
    scale: Tensor

    def _init_scales(
        self,
        tables: int,
        bits: int,
        scale_period: int,
        scale_refresh: str = "periodic",
        rescan_period: int = 10_000,
    ) -> None:
        for name, period in (("scale_period", scale_period), ("rescan_period", rescan_period)):
            if not isinstance(period, int) or period < 1:
                raise ValueError(f"{name} is {period!r}, expected a whole number of training steps, 1 or more")
        if scale_refresh not in REFRESHES:
            raise ValueError(f"scale_refresh is {scale_refresh!r}, expected {' or '.join(map(repr, REFRESHES))}")
        check_bits("bits", bits)
        self.bits, self.scale_period = bits, scale_period
        self.scale_refresh, self.rescan_period = scale_refresh, rescan_period
        self.register_buffer("scale", torch.zeros(tables, dtype=torch.float32, device=self.weight.device))
        self.scale_ticks = 0
        self._step_goes_on = False
        self._scale_known = False
        self._blocks: BlockMaxima | None = None
        # Rows that training forwards looked up, as (rows, first table, tables), and the weight's version at that time.
        self._looked_up: list[tuple[Tensor, int, int]] = []
        self._looked_up_at = -1

    def _tables(self) -> list[Tensor]:
        return [self.weight.detach()]

    def only_looked_up_rows_change(self) -> None:
        """Promise that nothing but the optimizer changes the weight, and only rows that a training forward looked up.

        And that an update follows each training forward; where one follows several, say `same_step` between them.
        True of plain SGD and Adagrad on sparse gradients, not of momentum or dense weight decay. A refresh of the scale
        then reads the rows looked up since the last one, and is as exact as before. Loading a state dict and moving the
        module are noticed; after any other change call `refresh_scale`.
        """
        if self.bits != 32 and kernels.fits(self.weight) and self._blocks is None:
            self._blocks = BlockMaxima(tuple(len(table) for table in self._tables()))

    @torch.no_grad()
    def refresh_scale(self) -> None:
        """Compute every table's scale from all of its rows."""
        if self._blocks is not None:
            self._blocks.all_changed()
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if len(self.scale):
            if self._blocks is not None:
                found = [self._blocks.table_max(number, table) for number, table in enumerate(self._tables())]
                largest = torch.tensor(found)
            else:
                largest = torch.stack([max_abs(table) for table in self._tables()])
            self.scale.copy_(scale_from_max(largest, self.bits))
        self._scale_known = True
        self._looked_up.clear()

    @torch.no_grad()
    def _raise_scale(self) -> None:
        """Raise scales to what the rows of the last training forwards need, once an optimizer has changed them."""
        if not self._looked_up or self.weight._version == self._looked_up_at:
            return
        if len(self._looked_up) > _FORWARDS_KEPT:
            return self.refresh_scale()
        for rows, first, tables in self._looked_up:
            scale = self.scale[first : first + tables]
            largest = torch.zeros_like(scale)
            if kernels.fits(rows, self.weight):
                kernels.rows_max(rows, tables, self.weight.detach(), largest)
            elif len(rows):
                found = self.weight.detach().index_select(0, rows).abs().amax(1).float()
                largest = found.view(-1, tables).amax(0)
            # As a product, never below the scale that the same maximum gave when it was exact.
            torch.maximum(scale, scale_from_max(largest, self.bits), out=scale)
        self._looked_up.clear()

    def _note_rows(self, rows: Tensor, first: int = 0, tables: int = 1) -> None:
        """This forward looks up `rows` (int64 [N]; position i is of table first + i % tables)."""
        if self.scale_refresh == "running_max" and self.training and self.bits != 32 and self.weight.requires_grad:
            if len(self._looked_up) <= _FORWARDS_KEPT:
                self._looked_up.append((rows, first, tables))
            self._looked_up_at = self.weight._version

    def _mark(self, rows: Tensor, first: int = 0, tables: int = 1) -> None:
        """As `_note_rows`, for exact refreshes, where the kernels have not done it."""
        if self._blocks is not None:
            self._blocks.mark(rows, first, tables)

    def same_step(self) -> None:
        """The next training forward belongs to the last one's step: one tick of the clock, and no other refresh."""
        self._step_goes_on = True

    @torch.no_grad()
    def rows_changed(self, rows: Tensor) -> None:
        """An optimizer has changed these rows (int64 [U] of the weight), whichever process looked them up."""
        if self.bits == 32 or len(rows) == 0:
            return
        if self._blocks is not None:
            self._blocks.mark_any(rows)
        if self.scale_refresh == "running_max" and self._scale_known:
            starts = torch.tensor([0, *map(len, self._tables())][:-1], device=rows.device).cumsum(0)
            largest = self.weight.detach().index_select(0, rows).abs().amax(1).float()
            table = torch.searchsorted(starts, rows, right=True).sub_(1)
            needed = torch.zeros_like(self.scale).scatter_reduce_(0, table, largest, "amax")
            torch.maximum(self.scale, scale_from_max(needed, self.bits), out=self.scale)
        self._looked_up.clear()

    def weights_replaced(self, ticks: int) -> None:
        """Weights and scales are others now, and so many training forwards old."""
        self._looked_up.clear()
        self._step_goes_on = False
        if self._blocks is not None:
            self._blocks.all_changed()
        self.scale_ticks = ticks
        self._scale_known = bool((self.scale > 0).all())

    def current_scale(self) -> Tensor:
        """The scales that a forward in evaluation uses: float32 [tables]. The clock does not tick."""
        self._raise_scale()
        if not self._scale_known:
            self._refresh()
        return self.scale

    def _tick(self) -> Tensor:
        """The scales that this forward uses [tables]; in training, one tick of the clock."""
        self._raise_scale()
        if self.training and self._step_goes_on and self._scale_known:
            self._step_goes_on = False
            return self.scale
        period = self.scale_period if self.scale_refresh == "periodic" else self.rescan_period
        if not self._scale_known or (self.training and self.scale_ticks % period == 0):
            self._refresh()
        if self.training:
            self.scale_ticks += 1
        return self.scale

    def _limits(self) -> tuple[int, int]:
        return (0, 0) if self.bits == 32 else code_limits(self.bits)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the scale with the module, but never casts it: in FP16 the scale of small weights would be 0."""
        self._raise_scale()
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        self._looked_up.clear()
        if self._blocks is not None:
            self._blocks = None
            self.only_looked_up_rows_change()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: their weight counts its versions anew."""
        self._raise_scale()
        return {**self.__dict__, "_looked_up": list(self._looked_up), "_looked_up_at": -1}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._raise_scale()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale_ticks"] = torch.tensor(self.scale_ticks, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing = rest[2]  # (local_metadata, strict, missing_keys, ...)
        ticks = state_dict.pop(prefix + "scale_ticks", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "scale" in missing:
            missing.remove(prefix + "scale")
            if prefix + "weight" in missing:  # a partial state dict that is not about this module
                ticks = self.scale_ticks
            else:
                self.scale.zero_()
        self.weights_replaced(0 if ticks is None else int(ticks))
