"""The interface of quantizers: the child module `weight_fake_quantizer`, with a layer's scales and fake quantization.

The layer passes the rows of its weight that it uses; its quantizer owns the scales, fake-quantizes those rows, and is
notified of changes to the weight. To add one: subclass `WeightFakeQuantizer` and enter it
in `config.QUANTIZERS`; `QATConfig.quantizer` then names it. A scale may be learned: a parameter instead of a buffer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.kernels import GroupMap, Limits, TableRanges, plain
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import BITS, QUANTIZERS, QATConfig, registered
from dqrm.quant.groups import Groups
from dqrm.quant.packing import TableScales
from dqrm.quant.uniform import code_limits, fake_quantize, fake_quantize_groups, highest_codes, scale_from_max

_NAME = "weight_fake_quantizer"
# Scales (None: not quantized), and which a row has (None: that of its table); code limits; blocks to mark
# (`ranges.BlockMaxima`) or None; where clamped weights are counted, or None; whether scales are raised to what the rows
# need.
LookupArguments = tuple[Tensor | None, GroupMap | None, Limits, Any, Tensor | None, bool]
# Keys of the same values in state dicts of versions without this child module.
_MOVED = ("scale", "scale_ticks")


class WeightFakeQuantizer(nn.Module):
    """Scales of one weight, one for each of its groups, and the values that they give.

    A subclass registers `scale` in its constructor, float32 zeros [groups], as a buffer or a parameter; it is set from
    the weight before it is first used. Packed layers and artifacts hold the codes of `quant.uniform` on that scale:
    `fake_quantize` must give the values of those codes.

    Args:
        qat: what is quantized and how.
        bits: of this weight: 2, 4, 8 or 16 (`max` only: or 32, not quantized); the fewest, where tables differ.
        groups: what has a scale of its own.

    Attributes:
        clamps: counts of weights that were clamped, for quantizers that count them.
        scale_ticks: number of training steps so far, for quantizers whose scales or values depend on it.
        rounding_seed: of stochastic rounding, below 2**32.
        step: the training step, where a loop says it (`needs_step`); None: `scale_ticks`.
    """

    scale: Tensor
    _highest: Tensor | None
    fusible = False
    """Whether compiled code may take the place of `fake_quantize`: for tables, rows on `scale`, which gets no gradient;
    for linear layers, a weight on the scale of its largest magnitudes."""
    keeps_ticks = False
    """Whether `scale_ticks` is in its state dict (always, where it rounds stochastically)."""
    clips = False
    """Whether it clamps weights on purpose, so that many of them are no reason to warn."""
    needs_step = False
    """Whether a training loop whose steps have several forwards must say which step it is, by `step`."""
    marks_rows = False
    """Whether `fake_quantize` needs to know which rows its values are: `self._rows`, by the first group."""
    grouped = False
    """Whether it knows tables whose blocks of rows have a scale each (`groups.rows_per_group`), and zero points."""
    uniform = False
    """Whether its scales are from `scale_of` and its values from `values_of`, which know tables of several bit widths
    (`groups.bits`) and stochastic rounding."""

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__()
        self.qat, self.bits, self.groups = qat, bits, groups
        self.clamps = Clamps()
        self.clamps.quiet = self.clips
        self.scale_ticks = 0
        self.register_buffer("_highest", highest_codes(groups.bits) if groups.bits else None, persistent=False)
        self._limits = (0, 0) if bits == 32 else code_limits(bits)
        self._scale_known = False
        self.stochastic = qat.forward_rounding == "stochastic" and bits != 32
        self.needs_step |= self.stochastic
        self.rounding_seed = 0
        self.step: int | None = None
        self._rows: dict[int, Tensor] = {}
        if self.stochastic:
            self.fusible = False

    @property
    def limits(self) -> Limits:
        """Lowest and highest code, or those of each group where they differ."""
        return self._limits if self._highest is None else self._highest

    def scale_of(self, largest: Tensor, group: slice = slice(None)) -> Tensor:
        """The scales of the largest magnitudes [groups] of the groups `group`: float32 [groups]; 1 where a group is not
        quantized."""
        if self._highest is None:
            return scale_from_max(largest, self.bits)
        highest = self._highest[group]
        return torch.where(highest == 0, 1.0, scale_from_max(largest, 2) / highest.clamp(min=1))  # of 2 bits: times 1

    def values_of(self, x: Tensor, scale: Tensor, group: slice = slice(None)) -> Tensor:
        """The values of the codes of x [..., groups, dim] on `scale` float32 [groups], or [1] for all; STE."""
        noise = self._noise(x, group) if self.stochastic and self.training else None
        if self._highest is None:
            return fake_quantize(x, scale[:, None], self.bits, noise)
        return fake_quantize_groups(x, scale, self._highest[group], noise)

    def _noise(self, x: Tensor, group: slice) -> Tensor:
        """What stochastic rounding adds: a hash of (seed, step, row, column), as x; the same on any rank."""
        rows = self._rows.pop(group.start or 0, None)  # of tables: as marked
        rows = torch.arange(x.shape[-2], device=x.device) if rows is None else rows.view(x.shape[:-1])
        position = rows[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
        return plain.uniform(position, (self.rounding_seed * 0x9E3779B1 + self.scale_ticks * 0x85EBCA77) % 2**32)

    def _tick(self) -> int:
        """A training forward of a linear layer begins: which step it is of; `scale_ticks` then counts it."""
        step = self.scale_ticks if self.step is None else self.step
        self.scale_ticks = step + 1
        return step

    # Called by the forward pass.

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        """Before each forward, whose gradient for the weight is sparse or dense: bring `scale` up to date."""
        if not self._scale_known:
            self.refresh(weight)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        """Fake-quantized values [..., groups, dim] of the groups `group`; same shape and dtype.

        Differentiable: by default the gradient passes unchanged to the values, and the scale gets none.
        """
        return self.values_of(values, self.scale[group], group)

    def lookup_arguments(self, weight: Tensor, rows: int) -> LookupArguments:
        """Arguments for compiled code that looks up a number of rows in place of `fake_quantize`."""
        return self.scale, None, self.limits, None, None, False

    def mark_rows(self, rows: Tensor, first: int, tables: int) -> None:
        """A forward without compiled code looks up rows int64 [N]; position i is of table first + i % tables.

        `fake_quantize` of these rows, as the groups from `first` on, follows.
        """
        if self.training and (self.stochastic or self.marks_rows):
            self._rows[first] = rows

    def note_rows(self, rows: Tensor, weight: Tensor, sparse: bool) -> None:
        """This forward has looked up rows int64 [N] of the weight."""

    # Called by evaluation, state dicts and packing.

    def current_scale(self, weight: Tensor) -> Tensor:
        """The scales that a forward in evaluation uses: float32 [groups], without a gradient."""
        if not self._scale_known:
            self.refresh(weight)
        return self.scale.detach()

    def table_scales(self, weight: Tensor) -> list[TableScales]:
        """The scales of each table that a forward in evaluation uses, copied."""
        scale = self.current_scale(weight).clone()
        return [TableScales(each, None, self.groups.rows_per_group) for each in scale.split(self.groups.per_table)]

    @property
    def bytes_per_group(self) -> int:
        """What a group's scale takes when it is stored."""
        return 4

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        """Set the scales from the weight, by default from its largest magnitudes; `everything`: any row may be new."""
        self.scale.copy_(self.scale_of(self.groups.largest(weight)))
        self._scale_known = True

    def synchronize(self, weight: Tensor) -> None:
        """Before a state dict, a copy or a move: bring the scales up to date."""

    # Notifications of changes to the weight.

    def rows_changed(self, rows: Tensor, weight: Tensor) -> None:
        """An optimizer has changed these rows (int64 [U]), whichever process looked them up."""

    def ranges_to_raise(self, weight: Tensor) -> TableRanges | None:
        """For an optimizer that raises scales while it updates rows, and then says so (`raised`); None: need not."""
        return None

    def raised(self, weight: Tensor) -> None:
        """The scales cover all rows that have changed since the last forward."""

    def tables_redrawn(self, weight: Tensor, numbers: Sequence[int]) -> None:
        """These tables hold other weights now."""
        self.refresh(weight, everything=True)

    def only_looked_up_rows_change(self, weight: Tensor) -> None:
        """See `QuantizedTables.only_looked_up_rows_change`."""

    def same_step(self) -> None:
        """The next training forward belongs to the same step as the last one."""

    def weights_replaced(self, weight: Tensor, ticks: int) -> None:
        """Call after weights and scales were replaced; `ticks` is the new step count."""
        self.scale_ticks = ticks
        self._look_at_scale()

    def weight_moved(self, weight: Tensor, cast: bool) -> None:
        """The weight was moved to another device or, with `cast`, to another dtype."""

    def reset(self) -> None:
        """Weights without scales were loaded: reset the scales."""
        self.scale_ticks = 0
        self._rows.clear()
        if hasattr(self, "scale"):
            self.scale.detach().zero_()

    def _look_at_scale(self) -> None:
        self._scale_known = hasattr(self, "scale") and bool((self.scale.abs() > 0).all())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves but never casts: in FP16 the scale of small weights would be 0."""

        def moved(tensor: Tensor) -> Tensor:
            new: Tensor = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.keeps_ticks or self.stochastic:
            destination[prefix + "scale_ticks"] = torch.tensor(self.scale_ticks, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.keeps_ticks or self.stochastic:
            self.scale_ticks = int(state_dict.pop(prefix + "scale_ticks", 0))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._look_at_scale()


def new_quantizer(qat: QATConfig, bits: int, groups: Groups) -> WeightFakeQuantizer:
    """The quantizer that a configuration names, for a weight of `bits` bits."""
    name = "max" if bits == 32 else qat.quantizer
    quantizer: WeightFakeQuantizer = registered(name, QUANTIZERS)(qat, bits, groups)
    if groups.table_rows is not None and qat.grouped and not quantizer.grouped:
        qat.refuse_groups(f"the quantizer '{name}' has one scale per table and no zero point; use quantizer 'max'")
    if quantizer.uniform:
        return quantizer
    if groups.bits:
        raise ValueError(
            f"small_table_bits is {qat.small_table_bits}, but the quantizer '{name}' needs the same number of bits for "
            f"all tables; leave small_table_bits out, or use quantizer 'max'"
        )
    if quantizer.stochastic:
        raise ValueError(
            f"forward_rounding is 'stochastic', but the quantizer '{name}' rounds to the nearest; use quantizer 'max'"
        )
    return quantizer


class FakeQuantized(nn.Module):
    """Mixin of layers: their `weight` has a `weight_fake_quantizer`.

    A state dict without the quantizer's values (an unquantized model's) loads too: the next forward then sets scales.
    """

    weight: Any
    weight_fake_quantizer: WeightFakeQuantizer
    bits: int
    training_bits: int | None = None
    """Bits of forwards in training where they are not yet `bits`; see `train_with_bits`."""
    _training_bits: tuple[int, ...] = BITS

    @property
    def bits_in_use(self) -> int:
        """Bits of the weight in the next forward: `training_bits` in training, where they are set, else `bits`."""
        return self.bits if self.training_bits is None or not self.training else self.training_bits

    def train_with_bits(self, bits: int | None) -> None:
        """From now on, forwards in training have this number of bits, 32 for an unquantized weight; evaluation, state
        dicts, packing and export keep `bits`. None: training has `bits` too, on scales that are set now.

        Below 32, a linear layer is quantized on the scales of its largest magnitudes, to the nearest code, whatever its
        quantizer.

        Raises:
            ValueError: a number of bits that is not supported here, or a layer that is not quantized.
        """
        if bits is not None and self.bits == 32:
            raise ValueError(f"bits is {bits}, but the layer is not quantized; expected None")
        if bits is not None and bits not in self._training_bits:
            raise ValueError(f"bits is {bits!r}, expected None or one of {', '.join(map(str, self._training_bits))}")
        self.training_bits = bits
        if bits is None:
            self.weight_fake_quantizer.refresh(self.weight, everything=True)

    def _add_quantizer(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        self.qat, self.bits = qat, bits
        with self.weight.device:
            self.weight_fake_quantizer = new_quantizer(qat, bits, groups).train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        quantizer, dtype = self.weight_fake_quantizer, self.weight.dtype
        quantizer.synchronize(self.weight)
        super()._apply(fn, recurse)
        quantizer.weight_moved(self.weight, self.weight.dtype != dtype)
        return self

    def current_scale(self) -> Tensor:
        """The scales that a forward in evaluation uses: float32 [groups], without a gradient."""
        return self.weight_fake_quantizer.current_scale(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        self.weight_fake_quantizer.synchronize(self.weight)
        return {**self.__dict__}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.weight_fake_quantizer.synchronize(self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        quantizer, inside = self.weight_fake_quantizer, f"{prefix}{_NAME}."
        for name in _MOVED:
            if prefix + name in state_dict:
                state_dict[inside + name] = state_dict.pop(prefix + name)
        if not any(key.startswith(inside) for key in state_dict):
            if prefix + "weight" in state_dict:  # else a partial state dict, without this layer
                quantizer.reset()
            state_dict.update({inside + name: value for name, value in quantizer.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)
        quantizer.weights_replaced(self.weight, quantizer.scale_ticks)  # its own values come next
