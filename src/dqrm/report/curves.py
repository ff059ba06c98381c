"""Figures over steps, and calibration."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from dqrm.report.content import Plot, Section, Table, cell, thinned
from dqrm.report.plots import lines
from dqrm.report.records import Record, Subject, number
from dqrm.training.metrics import METRICS

# What evaluations hold besides metrics, and metrics that say little over steps.
_OTHER = {"kind", "step", "epoch", "rows", "train_loss", "best", "learning_rate", "train_seconds", "clamped_weights",
          "accuracy", "calibration", "gauc_coverage", "split"}  # fmt: skip
_NAMES = {"auc": "AUC", "log_loss": "log loss", "ne": "normalized entropy", "gauc": "GAUC"}
_MOST = 8


def metric_names(subject: Subject) -> list[str]:
    """Metrics that any evaluation has a number for."""
    found = {
        name
        for each in subject.series
        for record in each.records
        for line in record.lines.get("evaluation", [])
        for name, value in line.items()
        if name not in _OTHER and number(value) is not None
    }
    known = [name for name in METRICS if name in found]
    return [*known, *sorted(found - set(known))]


def over_steps(subject: Subject) -> Section:
    """Validation metrics and training loss."""
    section = Section("Over steps")
    marks = subject.series[0].first.epoch_ends() if subject.series else {}
    if marks:
        section.text.append(
            f"Dotted vertical lines are the ends of the epochs of {subject.names[0]}, with their numbers."
        )
    if subject.study:
        section.text.append("Lines are means over the seeds that have the step; bands are one standard deviation.")
    metrics = metric_names(subject)
    for name in metrics[:_MOST]:
        title = f"Validation {_NAMES.get(name, name)}"
        section.plots.append(_curve(subject, title, [("evaluation", name)], marks, _higher(name)))
    if len(metrics) > _MOST:
        section.text.append(f"Not drawn: {len(metrics) - _MOST} more metrics of the evaluations.")
    if not metrics:
        section.missing.append("No run has an evaluation with a figure: validation metrics are not shown.")
    loss = _curve(subject, "Training loss", [("train", "loss"), ("evaluation", "train_loss")], marks, False)
    if loss.table.rows:
        section.plots.append(loss)
        section.text.append(
            "Training loss is the mean since the epoch began; --log-every says how often it is recorded."
        )
    else:
        section.missing.append("No training loss was recorded.")
    return section


def _higher(name: str) -> bool:
    return bool(name in METRICS and METRICS[name].higher_is_better)


def _curve(
    subject: Subject, title: str, sources: Sequence[tuple[str, str]], marks: dict[int, int], higher: bool
) -> Plot:
    """A figure over steps, of each series."""
    rows: list[dict[str, Any]] = []
    by_step: dict[int, dict[str, float]] = {}
    told = []
    for series in subject.series:
        curves = [
            {step: value for kind, name in sources for step, value in record.points(kind, name).items()}
            for record in series.records
        ]
        found: list[dict[str, Any]] = []
        for step in sorted({step for curve in curves for step in curve}):
            values = [curve[step] for curve in curves if step in curve]
            spread = stdev(values) if len(values) > 1 else 0.0
            middle = mean(values)
            found.append(
                {"series": series.name, "x": step, "y": middle, "low": middle - spread, "high": middle + spread}
            )
        found = thinned(found)
        rows += found
        for row in found:
            by_step.setdefault(row["x"], {})[series.name] = row["y"]
        if found:
            best = (max if higher else min)(found, key=lambda row: row["y"])
            word = "highest" if higher else "lowest"
            told.append(
                f"{series.name}: {cell(found[0]['y'])} at step {found[0]['x']:,}, {word} {cell(best['y'])} at step "
                f"{best['x']:,}, {cell(found[-1]['y'])} at step {found[-1]['x']:,}"
            )
    header = ["step", *subject.names]
    cells = [[f"{step:,}", *(cell(at.get(name), 5) for name in subject.names)] for step, at in sorted(by_step.items())]
    shown = {epoch: step for epoch, step in marks.items() if rows and step <= max(row["x"] for row in rows)}
    return Plot(
        title,
        f"{title} over steps. {'. '.join(told)}.",
        lines(rows, subject.names, "step", title, shown, band=subject.study),
        Table(f"{title} by step", header, cells),
    )


def calibration(subject: Subject) -> Section:
    """Predicted against observed click rates."""
    section = Section("Calibration")
    rows: list[dict[str, Any]] = []
    cells, told, without = [], [], []
    for series in subject.series:
        curve, where = _reliability(series.first)
        if not curve:
            without.append(series.name)
            continue
        rows += [{"series": series.name, "x": predicted, "y": clicked} for _, predicted, clicked in curve]
        cells += [[series.name, where, cell(weight, 0), cell(p, 5), cell(c, 5)] for weight, p, c in curve]
        total = sum(weight for weight, *_ in curve)
        off = sum(weight * abs(p - c) for weight, p, c in curve) / total
        told.append(f"{series.name}, {where}: on average {cell(off)} from the diagonal")
    if rows:
        section.text.append(
            "Each point is a bin of about as many rows each, by their predictions; on the diagonal as many click as "
            "were predicted." + (" Of each variant the first seed." if subject.study else "")
        )
        section.plots.append(
            Plot(
                "Observed click rate over predicted",
                f"Observed over predicted click rates. {'. '.join(told)}.",
                lines(rows, subject.names, "predicted", "observed click rate", diagonal=True),
                Table("Calibration by bin", ["name", "split", "rows", "predicted", "clicked"], cells),
            )
        )
    if without:
        section.missing.append(
            f"No calibration curve: {', '.join(without)}. A run records one at each evaluation that has rows; an older "
            "dqrm did not."
        )
    return section


def _reliability(record: Record) -> tuple[list[tuple[float, float, float]], str]:
    """Bins (rows, predicted, clicked) of the chosen checkpoint on test; else of the last validation."""
    candidates = [(record.summary.get("test_calibration"), "test")]
    validation = record.lines.get("calibration", [])
    best = record.figure("best", "step")
    chosen = [line for line in validation if line["step"] == best] or validation
    candidates += [(line, f"validation, step {int(line['step']):,}") for line in chosen[-1:]]
    for found, where in candidates:
        columns = [found.get(name) for name in ("rows", "predicted", "clicked")] if isinstance(found, dict) else []
        if columns and all(isinstance(each, list) for each in columns):
            bins = [tuple(map(number, each)) for each in zip(*columns)]
            kept = [(r, p, c) for r, p, c in bins if r is not None and r > 0 and p is not None and c is not None]
            if kept:
                return kept, where
    return [], ""
