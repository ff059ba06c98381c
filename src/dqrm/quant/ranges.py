"""When a table's scale is refreshed, and from which rows.

A scale comes from the whole table, and reading a table of ten million rows costs more than the rest of a training step.
With `running_max` (ours, the default) the rows just updated raise it, and an exact refresh is rare: no forward clamps a
weight. With `periodic` (DQRM paper) it is refreshed at training forwards 0, P, 2P, ... and weights that outgrow it in
between are clamped. Either way evaluation and whatever is exported use it too: the loss that a checkpoint reports is
the loss that its codes give.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqrm import kernels
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import RESCAN_PERIOD, refresh_rule
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


def raise_to(scale: Tensor, largest: Tensor, bits: int) -> None:
    """In place: scales [tables] at least those of weights whose largest magnitudes are `largest` [tables].

    As scales, not as products: never below what the same maximum gave when it was exact.
    """
    torch.maximum(scale, scale_from_max(largest, bits), out=scale)


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
    sparse: bool

    def _init_scales(
        self,
        tables: int,
        bits: int,
        scale_period: int | None = None,
        scale_refresh: str | None = None,
        rescan_period: int = RESCAN_PERIOD,
    ) -> None:
        self.scale_refresh, self.scale_period = refresh_rule(scale_refresh, scale_period, rescan_period)
        check_bits("bits", bits)
        self.bits, self.rescan_period = bits, rescan_period
        self.register_buffer("scale", torch.zeros(tables, dtype=torch.float32, device=self.weight.device))
        self.scale_ticks = 0
        self.clamps = Clamps()
        self._step_goes_on = False
        self._scale_known = False
        self._promised = False
        self._blocks: BlockMaxima | None = None
        # Rows that training forwards looked up, and the weight's version at that time.
        self._looked_up: list[Tensor] = []
        self._looked_up_at = -1
        self._raised_at = -1  # the weight's version when its optimizer last said that scales fit
        # The weight's version when every row was last known to fit its scale, and whether a training forward followed:
        # an update through `.data` changes no version.
        self._covered_at, self._trained_since = -1, False

    @property
    def _running(self) -> bool:
        return self.scale_refresh == "running_max" and self.bits != 32

    @property
    def _learning(self) -> bool:
        """Whether an update may follow this forward: in training, or while gradients are recorded in evaluation."""
        return self.training or (torch.is_grad_enabled() and self.weight.requires_grad)

    def _weight_version(self) -> int:
        return -2 if self.weight.is_inference() else int(self.weight._version)

    def _tables(self) -> list[Tensor]:
        return [self.weight.detach()]

    def _first_rows(self) -> Tensor:
        """int64 [tables]."""
        return torch.zeros(1, dtype=torch.int64, device=self.weight.device)

    def only_looked_up_rows_change(self) -> None:
        """Promise that nothing but the optimizer changes the weight, and only rows that a training forward looked up.

        And that an update follows each training forward; where one follows several, say `same_step` between them.
        True of plain SGD and Adagrad on sparse gradients, not of momentum or dense weight decay. A periodic refresh of
        the scale then reads the rows looked up since the last one, and is as exact as before; with running_max an
        evaluation reads none. Loading a state dict and moving the module are noticed; after any other change call
        `refresh_scale`.
        """
        self._promised = True
        if self.bits != 32 and not self._running and kernels.fits(self.weight) and self._blocks is None:
            self._blocks = BlockMaxima(tuple(len(table) for table in self._tables()))

    @torch.no_grad()
    def refresh_scale(self) -> None:
        """Compute every table's scale from all of its rows; of tables of 32 bits, which have none, nothing."""
        if self._blocks is not None:
            self._blocks.all_changed()
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.bits == 32:
            return
        if len(self.scale):
            self.scale.copy_(scale_from_max(self._largest(), self.bits))
        self._scale_known = True
        self._looked_up.clear()
        self._covered()

    def _largest(self) -> Tensor:
        """max|w| of each table, from all of its rows: float32 [tables]."""
        if self._blocks is not None:
            found = [self._blocks.table_max(number, table) for number, table in enumerate(self._tables())]
            return torch.tensor(found)
        return torch.stack([max_abs(table) for table in self._tables()])

    def _covered(self) -> None:
        self._covered_at, self._trained_since = self._weight_version(), False

    @torch.no_grad()
    def _raise_scale(self) -> None:
        """Raise scales to what the rows of the last training forwards need, once an optimizer has changed them."""
        if not self._looked_up or self.weight._version == self._looked_up_at:
            return
        if len(self._looked_up) > _FORWARDS_KEPT:
            return self.refresh_scale()
        for rows in self._looked_up:
            self._raise_for(rows)
        self._looked_up.clear()

    def _raise_for(self, rows: Tensor) -> None:
        """Raise scales to what these rows need: int64 [N] of the weight."""
        starts = self._first_rows()
        if kernels.fits(rows, self.weight, self.scale, starts):
            ranges = kernels.TableRanges(starts, self.scale, code_limits(self.bits)[1])
            kernels.raise_scales(rows, self.weight, ranges)
        elif len(rows):
            largest = self.weight.detach().index_select(0, rows).abs().amax(1).float()
            table = torch.searchsorted(starts, rows, right=True).sub_(1)
            raise_to(self.scale, torch.zeros_like(self.scale).scatter_reduce_(0, table, largest, "amax"), self.bits)

    def ranges_to_raise(self) -> kernels.TableRanges | None:
        """For an optimizer that raises scales while it updates rows, and then says so (`raised`); None: need not."""
        if not (self._running and self._scale_known and kernels.fits(self.weight, self.scale)):
            return None
        return kernels.TableRanges(self._first_rows(), self.scale, code_limits(self.bits)[1])

    def raised(self) -> None:
        """All rows that have changed since the last forward fit their scales."""
        self._looked_up.clear()
        self._raised_at = self._weight_version()

    @torch.no_grad()
    def _cover_all(self) -> None:
        """With running_max: raise scales to what every row needs, whatever has changed it.

        Reads all rows unless it is known that nothing but rows looked up has changed. Evaluation, copies and state
        dicts ask for it, and each training step whose gradients are dense: it goes over the whole table anyway.
        """
        self._raise_scale()
        if not self._running or not self._scale_known or self._promised:
            return
        if self._trained_since or self._weight_version() != self._covered_at:
            if len(self.scale):
                raise_to(self.scale, self._largest(), self.bits)
            self._covered()

    def _note_rows(self, rows: Tensor) -> None:
        """This forward looks up `rows` (int64 [N])."""
        if self._running and self._learning and self.weight.requires_grad and self.sparse:
            if len(self._looked_up) <= _FORWARDS_KEPT:
                self._looked_up.append(rows)
            self._looked_up_at = self.weight._version

    def _watched(self, rows: int) -> tuple[tuple[int, int], BlockMaxima | None, Tensor | None, bool]:
        """For a lookup of so many rows by the kernels: code limits, blocks to mark, where clamped weights are counted
        and whether scales are raised to what the rows need."""
        counting = self.training and self.bits != 32
        counter = self.clamps.counter(rows * self.weight.shape[1], self.weight.device) if counting else None
        return self._limits(), self._blocks, counter, self._running and self._learning

    def _meet(self, found: Tensor, first: int = 0) -> None:
        """Before a forward of training quantizes `found` [N, tables, dim] (tables from `first` on), not by the kernels:
        raise their scales to what these rows need (running_max), or count what their scales clamp (periodic)."""
        if found.numel() == 0 or torch.compiler.is_compiling():
            return
        found, scale = found.detach(), self.scale[first : first + found.shape[1]]
        if self._running and self._learning:  # which asks whether gradients are recorded
            raise_to(scale, found.abs().amax((0, 2)).float(), self.bits)
        if not self.training:
            return
        counter = self.clamps.counter(found.numel(), found.device)
        if not self._running:
            low, high = code_limits(self.bits)
            codes = (found.float() / scale[:, None]).round_()
            counter += ((codes < low) | (codes > high)).sum()

    def _mark(self, rows: Tensor, first: int = 0, tables: int = 1) -> None:
        """For exact refreshes, where the kernels have not done it: this forward looks up `rows` (int64 [N]; position i
        is of table first + i % tables)."""
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
        if self._running and self._scale_known and self._raised_at != self._weight_version():
            self._raise_for(rows)
        self._looked_up.clear()

    def weights_replaced(self, ticks: int) -> None:
        """Weights and scales are others now, and so many training forwards old."""
        self._looked_up.clear()
        self._step_goes_on = False
        if self._blocks is not None:
            self._blocks.all_changed()
        self.scale_ticks = ticks
        self._scale_known = bool((self.scale > 0).all())
        self._covered()  # the scales that came with weights are theirs: what was saved is what is evaluated

    def current_scale(self) -> Tensor:
        """The scales that a forward in evaluation uses: float32 [tables]. The clock does not tick."""
        self._cover_all()
        if not self._scale_known:
            self._refresh()
        self.clamps.check()
        return self.scale

    def _tick(self) -> Tensor:
        """The scales that this forward uses [tables]; in training, one tick of the clock."""
        if not self._learning:
            return self.current_scale()
        if self.sparse or self._weight_version() == self._covered_at:
            self._raise_scale()
        else:
            self._cover_all()
        if not self.training:
            if not self._scale_known:
                self._refresh()
            self._trained_since = True
            return self.scale
        self._trained_since = True
        self.clamps.forward_begins()
        if self._step_goes_on and self._scale_known:
            self._step_goes_on = False
            return self.scale
        period = self.scale_period if self.scale_refresh == "periodic" else self.rescan_period
        if not self._scale_known or self.scale_ticks % period == 0:
            self._refresh()
            self._trained_since = True
        self.scale_ticks += 1
        return self.scale

    def _rule(self) -> str:
        period = "" if self._running else f", scale_period={self.scale_period}"
        return f"scale_refresh={self.scale_refresh!r}{period}"

    def _limits(self) -> tuple[int, int]:
        return (0, 0) if self.bits == 32 else code_limits(self.bits)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the scale with the module, but never casts it: in FP16 the scale of small weights would be 0."""
        self._cover_all()
        scale, dtype = self.scale, self.weight.dtype
        super()._apply(fn, recurse)
        self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        self._looked_up.clear()
        self._covered_at = -1
        if self._running and self._scale_known and self.weight.dtype != dtype and len(self.scale):
            with torch.no_grad():  # rounding to another type makes some weights larger
                raise_to(self.scale, self._largest(), self.bits)
        if self._blocks is not None:
            self._blocks = None
            self.only_looked_up_rows_change()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies: their weight counts its versions anew."""
        self._cover_all()
        return {
            **self.__dict__,
            "_looked_up": list(self._looked_up),
            "_looked_up_at": -1,
            "_raised_at": -1,
            "_covered_at": -1,
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._cover_all()
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
