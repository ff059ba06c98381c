"""Counts of the table weights that were clamped in a run (`quant/clamping.py`)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dqrm.quant.clamping import MANY, advice


@dataclass
class Clamping:
    """Weights that were clamped and that were looked up: in the run so far, and at its last evaluation."""

    clamped: int = 0
    looked_up: int = 0
    clamped_before: int = 0
    looked_up_before: int = 0
    told: bool = False

    def add(self, counts: Iterable[tuple[int, int]]) -> None:
        """(clamped, looked up) of each rank since the last call."""
        for clamped, looked_up in counts:
            self.clamped += clamped
            self.looked_up += looked_up

    @property
    def share(self) -> float | None:
        """The fraction over the run so far; None if no table is quantized."""
        return self.clamped / self.looked_up if self.looked_up else None

    def figures(self) -> dict[str, float]:
        """The fraction since the last evaluation, for metrics.jsonl."""
        looked_up = self.looked_up - self.looked_up_before
        return {"clamped_weights": (self.clamped - self.clamped_before) / looked_up} if looked_up else {}

    def evaluated(self, warn: Callable[[str], None], meant: bool = False) -> None:
        """Called at each evaluation: warn, once per run, if many weights were clamped since the one before.

        Args:
            meant: the quantizer clips on purpose; then it is no reason to warn.
        """
        if not meant and not self.told and self.figures().get("clamped_weights", 0.0) > MANY:
            self.told = True
            warn(advice(self.clamped - self.clamped_before, self.looked_up - self.looked_up_before, flags=True))
        self.clamped_before, self.looked_up_before = self.clamped, self.looked_up
