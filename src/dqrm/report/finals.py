"""The table of final figures, and sizes."""

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from dqrm.console import size
from dqrm.report.content import Plot, Section, Table, cell
from dqrm.report.plots import dots
from dqrm.report.records import Record, Series, Subject, number, table_of
from dqrm.training.metrics import METRICS, legend

_DIFFERENCES = ("auc", "log_loss", "ne", "gauc")


def final_figures(subject: Subject) -> Section:
    """Figures on test at the checkpoint that validation chose, and differences to the baseline."""
    section = Section("Final figures")
    found = {
        name
        for each in subject.series
        for record in each.records
        for name, value in table_of(record.summary.get("test")).items()
        if name != "rows" and number(value) is not None
    }
    names = [name for name in METRICS if name in found] + sorted(found - set(METRICS))
    base = subject.series[0] if subject.series else None
    if not names or base is None:
        section.missing.append("No run has figures on test: it is not finished, or its data has no test rows.")
        return section
    compared = (
        [name for name in names if name in _DIFFERENCES or name not in METRICS] if len(subject.series) > 1 else []
    )
    header = ["", "epoch", *names, *(f"Δ {name}" for name in compared)]
    rows = []
    for series in subject.series:
        chosen = [cell(record.figure("best", "epoch"), 0) for record in series.records]
        values = [_over(series, name) for name in names]
        deltas = ["" if series is base else _difference(series, base, name) for name in compared]
        rows.append([series.name, " ".join(chosen), *values, *deltas])
    what = "mean ± standard deviation over seeds" if subject.study else "at the checkpoint that validation chose"
    section.tables.append(Table(f"Test, {what}", header, rows))
    if compared:
        how = ", paired by seed: mean ± standard error" if subject.study else ""
        section.text.append(f"Δ: difference to {base.name}{how}.")
    if explained := legend(names):
        section.text.append(f"{explained}.")
    return section


def _over(series: Series, name: str) -> str:
    values = [value for record in series.records if (value := record.figure("test", name)) is not None]
    return _spread(values, lambda spread: spread) if series.seeds else cell(values[0] if values else None, 5)


def _difference(series: Series, base: Series, name: str) -> str:
    if not series.seeds:
        own, other = series.first.figure("test", name), base.first.figure("test", name)
        return cell(None) if own is None or other is None else f"{own - other:+.5f}"
    of_base = dict(zip(base.seeds, base.records))
    pairs = [
        (record.figure("test", name), of_base[seed].figure("test", name))
        for seed, record in zip(series.seeds, series.records)
        if seed in of_base
    ]
    values = [own - other for own, other in pairs if own is not None and other is not None]
    return _spread(values, lambda spread: spread / math.sqrt(len(values)), "+")


def _spread(values: list[float], scaled: Callable[[float], float], sign: str = "") -> str:
    if not values:
        return cell(None)
    middle = f"{mean(values):{sign}.5f}"
    return f"{middle} ± {scaled(stdev(values)):.5f}" if len(values) > 1 else f"{middle} (1 seed)"


# What the summary says of each run: a name, and where.
_SIZES: dict[str, tuple[str, ...]] = {
    "as stored": ("stored_bytes", "total"),
    "tables in training": ("table_bytes", "weights"),
    "their optimizer state": ("table_bytes", "optimizer"),
}


def sizes(subject: Subject) -> Section:
    """Bytes of weights: packed, and in training."""
    section = Section("Sizes")
    rows, cells = list[dict[str, Any]](), []
    for series in subject.series:
        record = next((each for each in series.records if each.summary), series.first)
        values = {name: record.figure(*keys) for name, keys in _SIZES.items()}
        rows += [
            {"series": name, "group": series.name, "x": v} for name, v in values.items() if v is not None and v > 0
        ]
        if any(value is not None for value in values.values()):
            told = (cell(None) if value is None else size(int(value)) for value in values.values())
            cells.append([series.name, *told, _speed(record)])
    if not rows:
        section.missing.append("No run has sizes: its summary.json says them when it is finished.")
        return section
    section.text.append("As stored: all weights at the bits they are trained in, with their scales.")
    table = Table("Sizes and speed", ["", *_SIZES, "samples/s"], cells)
    smallest = min((row for row in rows if row["series"] == "as stored"), key=lambda row: row["x"], default=rows[0])
    alternative = f"Sizes in bytes. Smallest as stored: {smallest['group']}, {size(int(smallest['x']))}."
    section.plots.append(Plot("Bytes of weights", alternative, dots(rows, list(_SIZES), subject.names, "bytes"), table))
    return section


def _speed(record: Record) -> str:
    speed = record.figure("samples_per_second")
    return cell(speed, 0) if speed is None or speed < 1 else f"{speed:,.0f}"
