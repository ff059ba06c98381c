"""Vega-Lite specifications of the page's plots.

Fields have fixed names; what comes from files is data, never a field or an expression. Series differ in colour, dashes
and shape. Colours and fonts are the page's (page.js), for light and dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_DASHES = [[1, 0], [6, 3], [2, 2], [10, 3, 2, 3], [12, 4], [4, 1, 1, 1], [8, 2, 2, 2, 2, 2], [1, 4], [5, 5], [14, 2]]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left",
           "stroke", "arrow"]  # fmt: skip
# Of axes, by their titles.
_FORMATS = {"step": ",d", "bytes": "~s"}
# Points with a shape, per series at most, on average.
_POINTS = 20
# Pixels of a distribution, its label above it.
_LANE = 72
Row = dict[str, Any]


def lines(
    rows: Sequence[Row],
    names: Sequence[str],
    x: str,
    y: str,
    marks: Mapping[int, int] | None = None,
    band: bool = False,
    diagonal: bool = False,
    log_x: bool = False,
    points: bool = True,
) -> dict[str, Any]:
    """Lines of {series, x, y}, with {low, high} if `band`.

    Args:
        names: of the series, in the order of the legend. x, y: titles of the axes.
        marks: number to x of vertical lines, as the ends of epochs.
        diagonal: a line of equal x and y.
    """
    layers: list[dict[str, Any]] = []
    if marks:
        layers.append(_marks(marks))
    if diagonal:
        most = max((max(row["x"], row["y"]) for row in rows), default=1)
        layers.append({
            "data": {"values": [{"x": 0, "y": 0, "end": most}]},
            "mark": {"type": "rule", "strokeDash": [3, 3]},
            "encoding": {"x": {"field": "x", "type": "quantitative"}, "x2": {"field": "end"},
                         "y": {"field": "y", "type": "quantitative"}, "y2": {"field": "end"}},
        })  # fmt: skip
    if band:
        both = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
        layers.append(
            {"mark": {"type": "area", "opacity": 0.15}, "encoding": {**_x(x, log_x), **both, **_color(names)}}
        )
    dash = {"strokeDash": _by_name(names, _DASHES)}
    shape = {"shape": _by_name(names, _SHAPES)}
    common = {**_x(x, log_x), **_y(y), **_color(names)}
    layers.append({"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**common, **dash}})
    if points:
        tip = [{"field": "series", "title": "name"}, {"field": "x", "title": x}, {"field": "y", "title": y}]
        mark = {"type": "point", "filled": True, "size": 36, "opacity": 1}
        # Shapes tell lines apart; one on each of hundreds of points would hide them, and take long to draw.
        every = 1 + len(rows) // (_POINTS * max(1, len(names)))
        some = {"data": {"values": [row for at, row in enumerate(rows) if at % every == 0]}}
        layers.append({**some, "mark": mark, "encoding": {**common, **shape, "tooltip": tip}})
    return _plot(rows, 230, {"layer": layers})


def dots(rows: Sequence[Row], names: Sequence[str], groups: Sequence[str], x: str) -> dict[str, Any]:
    """Points of {series, group, x}: a line per group, a shape per series."""
    encoding = {
        "y": {"field": "group", "type": "nominal", "sort": list(groups), "title": None,
              "axis": {"grid": True, "labelLimit": 130}},
        **_x(x, False), **_color(names), "shape": _by_name(names, _SHAPES),
        "tooltip": [{"field": "series", "title": "name"}, {"field": "group", "title": " "}, {"field": "x", "title": x}],
    }  # fmt: skip
    mark = {"type": "point", "size": 90, "strokeWidth": 2}
    return _plot(rows, 34 * max(2, len(groups)), {"mark": mark, "encoding": encoding})


def ridges(rows: Sequence[Row], lanes: Sequence[str], x: str) -> dict[str, Any]:
    """Distributions one above the other: rows {lane, x, top, kind}; 'master' as areas, 'quantized' as stems.

    Args:
        lanes: the labels, from the bottom. `top` is the height within the lane; its label is above 0.7.
    """
    numbers = list(range(len(lanes)))
    kinds = [kind for kind in ("master", "quantized") if any(row["kind"] == kind for row in rows)]
    color = {"field": "kind", "type": "nominal", "title": None, "scale": {"domain": kinds}}
    labels = [{"lane": number, "text": text, "edge": 0} for number, text in zip(numbers, lanes)]
    base = {"y": {"field": "lane", "type": "quantitative", "scale": {"domain": [0, len(lanes)], "nice": False},
                  "axis": None}}  # fmt: skip
    area = {
        "transform": [{"filter": "datum.kind == 'master'"}],
        "mark": {"type": "area", "opacity": 0.45, "interpolate": "step"},
        "encoding": {**_x(x, False), **base, "y2": {"field": "upper"}, "detail": {"field": "lane"}, "color": color},
    }  # fmt: skip
    stems = {
        "transform": [{"filter": "datum.kind == 'quantized'"}],
        "encoding": {**_x(x, False), **base, "color": color},
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {"y2": {"field": "upper"}}},
            {"mark": {"type": "point", "filled": True, "size": 22, "opacity": 1},
             "encoding": {"y": {"field": "upper", "type": "quantitative"},
                          "tooltip": [{"field": "x", "title": x}, {"field": "share", "format": ".2%"}]}},
        ],
    }  # fmt: skip
    named = {
        "data": {"values": labels},
        "mark": {"type": "text", "align": "left", "dx": 2, "dy": 11 - _LANE, "baseline": "middle"},
        "encoding": {"x": {"value": 0}, "y": {"field": "lane", "type": "quantitative"}, "text": {"field": "text"}},
    }
    found = [{**row, "upper": row["lane"] + row["top"]} for row in rows]
    layers = [area, *([stems] if "quantized" in kinds else []), named]
    return _plot(found, _LANE * max(2, len(lanes)), {"layer": layers})


def _plot(rows: Sequence[Row], height: int, rest: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        **rest,
    }


def _x(title: str, log: bool) -> dict[str, Any]:
    scale = {"type": "log"} if log else {"zero": False}
    axis = {"format": "~%" if log else _FORMATS.get(title, "~g"), "labelOverlap": True, "tickCount": 5}
    return {"x": {"field": "x", "type": "quantitative", "title": title, "scale": scale, "axis": axis}}


def _y(title: str) -> dict[str, Any]:
    return {"y": {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False},
                  "axis": {"tickCount": 5}}}  # fmt: skip


def _by_name(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    kept = [values[number % len(values)] for number in range(len(names))]
    return {"field": "series", "type": "nominal", "title": None, "scale": {"domain": list(names), "range": kept}}


def _color(names: Sequence[str]) -> dict[str, Any]:
    # The range is the page's, by the reader's light or dark.
    return {"color": {"field": "series", "type": "nominal", "title": None, "scale": {"domain": list(names)}}}


def _marks(marks: Mapping[int, int]) -> dict[str, Any]:
    every = -(-len(marks) // 8)
    values = [
        {"x": step, "text": str(epoch) if at % every == 0 else ""} for at, (epoch, step) in enumerate(marks.items())
    ]
    position = {"x": {"field": "x", "type": "quantitative"}}
    return {
        "data": {"values": values},
        "encoding": position,
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [1, 3]}},
            {
                "mark": {"type": "text", "align": "right", "dx": -2, "baseline": "top"},
                "encoding": {"y": {"value": 0}, "text": {"field": "text"}},
            },
        ],
    }
