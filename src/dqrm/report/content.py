"""The parts of a page: sections of text, plots and tables. Names and texts are plain; the template escapes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A Vega-Lite specification.

    Attributes:
        alternative: what a reader who does not see it needs to know. table: the data.
    """

    title: str
    alternative: str
    spec: dict[str, Any]
    table: Table


@dataclass
class Section:
    """A part of the page. `missing`: what it cannot show, and which flag would give it."""

    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def cell(value: float | None, digits: int = 4) -> str:
    """A number as a table shows it."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15 and digits == 0:
        return f"{int(value):,}"
    text = f"{value:.{digits}f}"
    return text if abs(value) < 1e9 and (float(text) or not value) else f"{value:.3g}"


def thinned(points: Sequence[Any], limit: int = 400) -> list[Any]:
    """At most about `limit` of the points, evenly, and the last."""
    every = -(-len(points) // limit)
    kept = list(points[::every]) if every > 1 else list(points)
    return [*kept, points[-1]] if every > 1 and kept[-1] != points[-1] else kept
