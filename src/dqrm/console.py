"""Output of the command line: progress bars, tables, and one JSON object with --json."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dqrm.errors import printable

# Progress and messages go to standard error: standard output is for results, so that `--json` can be piped.
messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
# A pipe has no width of its own; a table must not lose columns there.
results = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Bars:
    """Progress as (stage, done, total) calls: one bar per stage, the previous one removed when the stage changes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._stage, self._shown_at = progress, "", 0.0
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._shown_at < 0.1 and done != total:
            return  # drawing costs more than a small training step
        self._shown_at = now
        if stage != self._stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total)
            self._stage = stage
        assert self._task is not None
        self._progress.update(self._task, completed=min(done, total) if total else done, total=total)

    def describe(self, text: str) -> None:
        """Show this beside the bar in place of its stage."""
        if self._task is not None:
            self._progress.update(self._task, description=text)

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line)


@contextmanager
def bars(quiet: bool = False) -> Iterator[Bars]:
    """Progress bars on standard error while inside; none if it is not a terminal."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, quiet=True) if quiet else messages,
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    with progress:
        yield Bars(progress)


def print_json(content: Any) -> None:
    """Exactly one JSON object on standard output."""
    print(json.dumps(content, indent=2, allow_nan=False))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; the first column is text, the others are aligned as numbers."""
    table = Table(
        title=printable(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(printable, row))
    results.print(table)


def figure(value: Any, digits: int = 4) -> str:
    """A number as a table shows it; '-' for None."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def size(count: int) -> str:
    """Bytes in decimal units (1 kB = 1000 B)."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{int(amount)} B" if unit == "B" else f"{amount:.3g} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """A character for each value, from the lowest to the highest of them."""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BLOCKS) - 1)
    return "".join(_BLOCKS[round((value - low) / step) if step else 0] for value in values)
