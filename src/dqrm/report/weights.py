"""Histograms of tables' weights over the epochs: Figures 6 and 7 of the DQRM paper."""

from typing import Any

from dqrm.report.content import Plot, Section, Table, cell
from dqrm.report.plots import ridges
from dqrm.report.records import Line, Series, Subject, number, shown, table_of

_LANES, _TABLES, _SERIES, _BINS = 5, 4, 10, 64


def histograms(subject: Subject) -> Section:
    """Master weights beside quantized ones, of the tables that each run recorded."""
    section, without = Section("Weights of the tables"), []
    for series in subject.series[:_SERIES]:
        tables: dict[str, list[Line]] = {}
        for line in series.first.lines.get("histogram", []):
            if _bars(line.get("master")):
                tables.setdefault(str(line.get("table")), []).append(line)
        if not tables:
            without.append(series.name)
        for name, lines in list(tables.items())[:_TABLES]:
            section.plots.append(_plot(series, shown(name), lines))
        if len(tables) > _TABLES:
            section.text.append(f"{series.name}: {len(tables) - _TABLES} more tables were recorded.")
    if section.plots:
        section.text.insert(0, (
            "Areas: master weights, which the optimizer updates. Stems: the values of their codes, which the forward "
            "pass computes with. Each lane is scaled to its own highest bar."
            + (" Of each variant the first seed." if subject.study else "")
        ))  # fmt: skip
    if without:
        section.missing.append(
            f"No histograms: {', '.join(without)}. `dqrm train --record-histograms largest` records them."
        )
    return section


def _bars(found: Any) -> list[tuple[float, float]]:
    """(value, share) of a recorded histogram; empty if it is none."""
    found = table_of(found)
    counts = [number(each) for each in found["counts"]] if isinstance(found.get("counts"), list) else []
    values = found.get("values")
    low, high = number(found.get("low")), number(found.get("high"))
    if isinstance(values, list):
        places = [number(each) for each in values]
    elif low is not None and high is not None and counts:
        places = [low + (high - low) * (at + 0.5) / len(counts) for at in range(len(counts))]
    else:
        return []
    pairs = [(place, count) for place, count in zip(places, counts) if place is not None and count is not None]
    total = sum(count for _, count in pairs)
    return [(place, count / total) for place, count in pairs] if total > 0 else []


def _few(bars: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same in bins of equal width, where there are too many values to see: of 8 bits."""
    if len(bars) <= _BINS:
        return bars
    edge = max(abs(place) for place, _ in bars) or 1.0
    sums = [0.0] * _BINS
    for place, share in bars:
        sums[min(_BINS - 1, int((place + edge) / (2 * edge) * _BINS))] += share
    return [((at + 0.5) / _BINS * 2 * edge - edge, share) for at, share in enumerate(sums) if share]


def _plot(series: Series, table: str, lines: list[Line]) -> Plot:
    """A table's lanes, first evaluation on top."""
    last = len(lines) - 1
    evenly = {round(at * last / (_LANES - 1)) for at in range(_LANES)}
    picked = [lines[at] for at in sorted(evenly, reverse=True)]
    rows, cells, lanes = [], [], []
    for lane, line in enumerate(picked):
        lanes.append(f"epoch {cell(number(line.get('epoch')), 0)}, step {int(line['step']):,}")
        for kind in ("master", "quantized"):
            bars = _few(_bars(line.get(kind)))
            most = max((share for _, share in bars), default=1)
            for place, share in bars:
                rows.append({"lane": lane, "x": place, "top": 0.7 * share / most, "kind": kind, "share": share})
                if share:
                    cells.append([lanes[-1], kind, cell(place, 5), f"{share:.2%}"])
    bits = number(picked[0].get("bits"))
    widths = [max((abs(place) for place, share in _bars(line.get("master")) if share), default=0.0) for line in lines]
    kept = "not quantized" if bits == 32 else f"{cell(bits, 0)} bits"
    return Plot(
        f"{series.name}: {table}",
        f"Histograms of the weights of table {table} of {series.name}, {kept}: the largest magnitude is about "
        f"{cell(widths[0])} at the first evaluation and {cell(widths[-1])} at the last.",
        ridges(rows, lanes, "weight"),
        Table(f"Share of weights, {table}", ["evaluation", "weights", "value", "share"], cells),
    )
