"""When a table's scale is refreshed.

A scale comes from the whole table, and reading a table of ten million rows costs more than the rest of a training step.
So it is refreshed at training forwards 0, P, 2P, ... (P: the scale period; DQRM paper) and reused between
them, in evaluation, and in whatever is exported: the loss that a checkpoint reports is the loss that its codes give.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqrm.quant.uniform import check_bits, scale_from_max


def max_abs(weight: Tensor) -> Tensor:
    """max|weight| as a float32 scalar tensor, in one pass and without a copy of `weight`."""
    if weight.numel() == 0:
        return torch.zeros((), device=weight.device)
    low, high = torch.aminmax(weight)
    return torch.maximum(-low, high).float()


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

    def _init_scales(self, tables: int, bits: int, scale_period: int) -> None:
        if not isinstance(scale_period, int) or scale_period < 1:
            raise ValueError(f"scale_period is {scale_period!r}, expected a whole number of training steps, 1 or more")
        check_bits("bits", bits)
        self.bits, self.scale_period = bits, scale_period
        self.register_buffer("scale", torch.zeros(tables, dtype=torch.float32, device=self.weight.device))
        self.scale_ticks = 0
        self._scale_known = False

    def _tables(self) -> list[Tensor]:
        return [self.weight.detach()]

    @torch.no_grad()
    def refresh_scale(self) -> None:
        """Compute every table's scale from all of its rows."""
        if len(self.scale):
            self.scale.copy_(scale_from_max(torch.stack([max_abs(table) for table in self._tables()]), self.bits))
        self._scale_known = True

    def _tick(self) -> Tensor:
        """The scales that this forward uses [tables]; in training, one tick of the clock."""
        if not self._scale_known or (self.training and self.scale_ticks % self.scale_period == 0):
            self.refresh_scale()
        if self.training:
            self.scale_ticks += 1
        return self.scale

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the scale with the module, but never casts it: in FP16 the scale of small weights would be 0."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = self.scale.float() if scale.is_meta else scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale_ticks"] = torch.tensor(self.scale_ticks, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing = rest[2]  # (local_metadata, strict, missing_keys, ...)
        ticks = state_dict.pop(prefix + "scale_ticks", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "scale" in missing:
            missing.remove(prefix + "scale")
            if prefix + "weight" in missing:  # a partial state dict that is not about this module
                return
            self.scale.zero_()
        self.scale_ticks = 0 if ticks is None else int(ticks)
        self._scale_known = bool((self.scale > 0).all())
