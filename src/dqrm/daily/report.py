"""What `dqrm daily` prints: a table of the days, and curves of the metrics before training."""

from collections.abc import Sequence
from typing import Any

from dqrm.console import figure, print_table, results, sparkline

CURVES = ("auc", "ne", "calibration")


def print_days(lines: Sequence[dict[str, Any]], current: str) -> None:
    """The table, the curves, and which model is published."""
    rows = [
        [
            line["day"],
            figure(sum(line["rows"].values())),
            figure((line["changes"] or {}).get("new")),
            *(figure((line["before"] or {}).get(name)) for name in CURVES),
            "yes" if line["published"] else "no",
        ]
        for line in lines
    ]
    header = ["day", "rows", "new table rows", "AUC", "NE", "calibration", "published"]
    print_table("Each day, before training on it (progressive validation)", header, rows)
    for name, title in zip(CURVES, ("AUC", "NE", "calibration")):
        values = [line["before"][name] for line in lines if line["before"] and line["before"][name] is not None]
        if len(values) > 1:
            mean = sum(values) / len(values)
            results.print(f"{title:<12}{sparkline(values)}  {min(values):.4f} to {max(values):.4f}, mean {mean:.4f}")
    day = next((line["day"] for line in reversed(lines) if line["published"]), None)
    if day is not None:
        results.print(f"{current} is the model of {day}.")
