"""How many of the weights that training looked up had outgrown their table's scale and were clamped.

Under `running_max` none is. Between two periodic refreshes any may be: codes then stand for less than the weights say,
and the model learns past what it computes.
"""

import warnings

import torch
from torch import Tensor

MANY = 1e-3
"""Share of the weights looked up in an interval from which on clamping costs accuracy that is worth a warning."""
# Training forwards between two looks at the counts, where nobody else takes them.
_INTERVAL = 100


def advice(clamped: int, looked_up: int, flags: bool = False) -> str:
    """The sentence that says what share was clamped and what helps, in names of flags or of arguments."""
    rule, period = ("--scale-refresh running_max", "--scale-period") if flags else (
        "scale_refresh='running_max'", "scale_period")  # fmt: skip
    return (
        f"{clamped / looked_up:.2%} of the weights that training looked up had outgrown the scale of their table and "
        f"were clamped, which costs accuracy: use {rule}, or a shorter {period}"
    )


class Clamps:
    """Counts of one table, or of all tables of a model that share it; on many clamped weights, one warning.

    Attributes:
        quiet: whether somebody else takes the counts and warns.
    """

    def __init__(self) -> None:
        self.quiet = False
        self._looked_up = self._forwards = 0
        self._clamped: dict[torch.device, Tensor] = {}
        self._warned = False

    def counter(self, values: int, device: torch.device) -> Tensor:
        """Counts `values` weights as looked up; returns int64 [1], to which those that are clamped are added."""
        self._looked_up += values
        clamped = self._clamped.get(device)
        if clamped is None:
            clamped = self._clamped[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return clamped

    def forward_begins(self) -> None:
        """A training forward: from time to time, look at the counts of those before it."""
        self._forwards += 1
        if self._forwards % _INTERVAL == 0:
            self.check()

    def check(self) -> None:
        """Warn if many weights were clamped since the last look, unless that was done before."""
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
