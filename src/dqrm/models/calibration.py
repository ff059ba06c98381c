"""Calibration of a trained model: an increasing function of its logit, piecewise linear.

Platt scaling (Platt 1999) is one line; isotonic regression (Zadrozny and Elkan, KDD 2002) a line from each knot to the
next, and lines of slope 1 beyond the first and the last, so that the order of rows outside them stays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

MOST_KNOTS = 1024
_FAR = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Calibration:
    """What maps logits to calibrated ones.

    Attributes:
        method: 'platt' or 'isotonic'.
        knots: logits, ascending; none with 'platt'.
        values: the calibrated logit at each knot, ascending; with 'platt' the one at logit 0.
        slope: of the only line ('platt'), or of both outer ones: above 0.
        rows: number of rows that it was fitted on. split: their split. fingerprint: of their dataset.

    Raises:
        ValueError or TypeError: these do not describe an increasing function.
    """

    method: str
    knots: tuple[float, ...]
    values: tuple[float, ...]
    slope: float
    rows: int
    split: str
    fingerprint: str

    def __post_init__(self) -> None:
        if self.method not in ("platt", "isotonic"):
            raise ValueError(f"calibration {str(self.method)[:40]!r}, expected 'platt' or 'isotonic'")
        if len(self.values) != (len(self.knots) if self.method == "isotonic" else 1) or len(self.knots) > MOST_KNOTS:
            raise ValueError("a calibration whose knots and values do not match")
        if not all(type(value) is float and abs(value) < 1e6 for value in (*self.knots, *self.values, self.slope)):
            raise ValueError("a calibration with values that are not finite numbers")
        if self.slope <= 0 or not _ascending(self.knots, True) or not _ascending(self.values, False):
            raise ValueError("a calibration that does not increase")
        if type(self.rows) is not int or not isinstance(self.split, str) or not isinstance(self.fingerprint, str):
            raise ValueError("a calibration without the rows that it was fitted on")

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Calibration | None":
        """As recorded in a header; None: the file is not calibrated.

        Raises:
            ValueError, TypeError or KeyError: the header holds something else.
        """
        described = content.get("calibration")
        if described is None:
            return None
        return cls(**{**described, "knots": tuple(described["knots"]), "values": tuple(described["values"])})

    def header(self) -> dict[str, Any]:
        """What `of` reads, ready for JSON."""
        return asdict(self)

    @cached_property
    def lines(self) -> tuple[list[float], list[float], list[float], list[float], float]:
        """Of each line: its lower and upper end, the logit from which it counts, and its slope; and the value there:

        calibrated = value + sum over lines of slope * (clamp(logit, lower, upper) - from)
        """
        first = self.knots[0] if self.knots else 0.0
        if not self.knots:
            return [-_FAR], [_FAR], [first], [self.slope], self.values[0]
        inner = [(high - low) / (after - before) for (before, after), (low, high) in self._pieces]
        knots = list(self.knots)
        return [-_FAR, *knots], [*knots, _FAR], [first, *knots], [self.slope, *inner, self.slope], self.values[0]

    @property
    def _pieces(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        return list(zip(pairwise(self.knots), pairwise(self.values)))

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits: float32 [B], of logits float32 [B]."""
        lower, upper, start, slope, value = self.lines
        lows, highs, starts, slopes = (logits.new_tensor(numbers) for numbers in (lower, upper, start, slope))
        inside = torch.minimum(torch.maximum(logits[:, None], lows), highs) - starts
        return (inside * slopes).sum(1) + value

    def tell(self) -> str:
        """One sentence about it."""
        what = (
            f"Platt scaling, {self.slope:.4g} times the logit {self.values[0]:+.4g}"
            if self.method == "platt"
            else f"isotonic regression, {len(self.knots)} knots"
        )
        return f"Probabilities are calibrated by {what}, fitted on {self.rows:,} {self.split} rows"


def _ascending(values: Sequence[float], strictly: bool) -> bool:
    return all(low < high or (low == high and not strictly) for low, high in pairwise(values)) and not any(
        map(math.isnan, values)
    )
