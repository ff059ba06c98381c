"""Counts of the weights that were looked up in training, and of those that exceeded their table's range (clamped).

With `running_max` none is clamped. Between two periodic refreshes any may be: the forward pass then uses a smaller
magnitude than the master weight, whose further growth has no effect.
"""

import warnings

import torch
from torch import Tensor

MANY = 1e-3
"""Fraction of the weights looked up in an interval above which clamping is worth a warning."""
# Training forwards between two checks of the counts, unless the caller takes them.
_INTERVAL = 100


def advice(clamped: int, looked_up: int, flags: bool = False) -> str:
    """The warning's text: the fraction that was clamped and the remedy, in terms of flags or of Python arguments."""
    rule, period = ("--scale-refresh running_max", "--scale-period") if flags else (
        "scale_refresh='running_max'", "scale_period")  # fmt: skip
    return (
        f"{clamped / looked_up:.2%} of the weights that training looked up had outgrown their scale and "
        f"were clamped, which costs accuracy: use {rule}, or a shorter {period}"
    )


class Clamps:
    """Counts of one table, or of all tables of a model that share it; warns once if many weights are clamped.

    Attributes:
        quiet: whether the caller takes the counts and warns instead.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._looked_up = self._forwards = 0
        self._clamped: dict[torch.device, Tensor] = {}
        self._warned = False

    def counter(self, values: int, device: torch.device) -> Tensor:
        """Count `values` weights as looked up; returns int64 [1], to add the number of clamped ones to."""
        self._looked_up += values
        clamped = self._clamped.get(device)
        if clamped is None:
            clamped = self._clamped[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return clamped

    def forward_begins(self) -> None:
        """Count a training forward; at regular intervals, check the counts so far."""
        self._forwards += 1
        if self._forwards % _INTERVAL == 0:
            self.check()

    def check(self) -> None:
        """Warn, once, if many weights were clamped since the last check."""
        if self.quiet or self._warned or not self._looked_up:
            return
        clamped, looked_up = self.take()
        if clamped > MANY * looked_up:
            self._warned = True
            warnings.warn(advice(clamped, looked_up), stacklevel=2)

    def take(self) -> tuple[int, int]:
        """(clamped, looked up) since the last call."""
        counts = sum(int(count) for count in self._clamped.values()), self._looked_up
        for count in self._clamped.values():
            count.zero_()
        self._looked_up = 0
        return counts
