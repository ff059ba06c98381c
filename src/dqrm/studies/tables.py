"""The tables of a study: means over seeds, paired differences to the baseline, and validation figures by epoch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from dqrm import __version__
from dqrm.console import print_table, results, size, sparkline
from dqrm.errors import printable
from dqrm.studies.folder import Folder, Result
from dqrm.training.metrics import METRICS, legend

COMPARED = ("auc", "log_loss")
"""Metrics whose differences to the baseline are shown."""
SHOWN = ("auc", "log_loss", "gauc")
"""Metrics in the table of a terminal, which is narrow."""
_WIDEST = 44
Runs = Mapping[int, Result]


def summarize(study: Mapping[str, Runs], baseline: str) -> dict[str, dict[str, Any]]:
    """Each variant's figures on test over its finished seeds.

    Returns:
        {variant: {'seeds', 'epochs' (of the chosen checkpoints), 'test': {metric: {'mean', 'stdev' (None of one seed),
        'values'}}, 'difference': {metric: {'mean', 'standard_error' (None of one seed), 'values'}} (to the baseline's
        run of the same seed; empty for the baseline), 'weight_bytes', 'payload_bytes' (of ranks; else None),
        'samples_per_second', 'validation_auc' (by evaluation, mean over seeds)}}.
    """
    return {name: _summary(runs, None if name == baseline else study.get(baseline)) for name, runs in study.items()}


def _summary(runs: Runs, baseline: Runs | None) -> dict[str, Any]:
    done = {seed: run for seed, run in runs.items() if run.summary is not None}
    finished: list[dict[str, Any]] = [run.summary for run in done.values() if run.summary is not None]
    test, difference = {}, {}
    for metric in METRICS:
        values = {seed: value for seed, run in done.items() if (value := run.test(metric)) is not None}
        if values:
            test[metric] = _spread(list(values.values()), "stdev")
        paired = [value - other for seed, value in values.items()
                  if baseline and seed in baseline and (other := baseline[seed].test(metric)) is not None]  # fmt: skip
        if paired:
            difference[metric] = _spread(paired, "standard_error")
    speeds = [each["samples_per_second"] for each in finished if each.get("samples_per_second")]
    payloads = [each["exchange"]["payload_bytes"] for each in finished if "exchange" in each]
    return {
        "seeds": list(done),
        "epochs": [run.best.get("epoch") for run in done.values()],
        "test": test,
        "difference": difference,
        "weight_bytes": finished[0]["stored_bytes"]["total"] if finished else None,
        "payload_bytes": mean(payloads) if payloads else None,
        "samples_per_second": mean(speeds) if speeds else None,
        "validation_auc": _mean_curve([run.curve("auc") for run in runs.values()]),
    }


def _spread(values: Sequence[float], name: str) -> dict[str, Any]:
    spread = stdev(values) if len(values) > 1 else None
    if spread is not None and name == "standard_error":
        spread /= math.sqrt(len(values))
    return {"mean": mean(values), name: spread, "values": list(values)}


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean by position, of those curves that reach it."""
    longest = max(map(len, curves), default=0)
    return [mean(curve[at] for curve in curves if len(curve) > at) for at in range(longest)]


def table(
    summaries: Mapping[str, Mapping[str, Any]], shown: Iterable[str] = METRICS, compared: Iterable[str] = COMPARED
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of test figures: `shown` metrics, and differences of those `compared`."""
    metrics = [name for name in shown if any(name in each["test"] for each in summaries.values())]
    compared = [name for name in compared if any(name in each["difference"] for each in summaries.values())]
    payload = any(each["payload_bytes"] for each in summaries.values())
    header = ["", "epoch"]
    for name in metrics:
        header += [_title(name)] + [f"Δ {_title(name)}"] * (name in compared)
    rows = []
    for name, each in summaries.items():
        row = [name, " ".join(str(epoch or "-") for epoch in each["epochs"]) or "-"]
        for metric in metrics:
            row.append(_plus_minus(each["test"].get(metric), "stdev", ".4f"))
            if metric in compared:
                row.append(_plus_minus(each["difference"].get(metric), "standard_error", "+.5f"))
        row.append("-" if each["weight_bytes"] is None else size(each["weight_bytes"]))
        if payload:
            row.append("-" if each["payload_bytes"] is None else size(round(each["payload_bytes"])))
        rows.append(row)
    return [*header, "weights", *["payload"] * payload], rows


def _title(metric: str) -> str:
    return {"auc": "AUC", "ne": "NE", "gauc": "GAUC"}.get(metric, printable(metric).replace("_", " "))


def _plus_minus(spread: Mapping[str, Any] | None, name: str, form: str) -> str:
    if spread is None:
        return "-"
    text = f"{spread['mean']:{form}}"
    return text if spread[name] is None else f"{text} ± {spread[name]:{form.lstrip('+')}}"


def epochs_table(study: Mapping[str, Runs]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the validation AUC at the end of each epoch, mean over seeds."""
    by_variant = {}
    for name, runs in study.items():
        curves = []
        for run in runs.values():
            ends = {line.get("epoch"): line.get("auc") for line in run.evaluations}  # the last of each epoch
            values = [ends.get(epoch) for epoch in range(1, len(ends) + 1)]
            curves.append([value for value in values if isinstance(value, float) and math.isfinite(value)])
        by_variant[name] = [] if (runs and _is_ptq(runs)) else _mean_curve(curves)
    longest = max(map(len, by_variant.values()), default=0)
    header = ["", *map(str, range(1, longest + 1))]
    rows = [[name, *(f"{v:.4f}" for v in curve), *[""] * (longest - len(curve))]
            for name, curve in by_variant.items() if curve]  # fmt: skip
    return header, rows


def _is_ptq(runs: Runs) -> bool:
    return any("ptq" in (run.summary or {}) for run in runs.values())


def markdown(folder: Folder, study: Mapping[str, Runs]) -> str:
    """The text of results.md."""
    summaries = summarize(study, folder.baseline)
    parts = [f"# {_escaped(folder.title)}", _note(folder, summaries), _lines(*table(summaries))]
    header, rows = epochs_table(study)
    if rows:
        parts += ["Validation AUC after each epoch, mean over seeds:", _lines(header, rows)]
    if fields := {each["name"]: each["fields"] for each in folder.variants if "fields" in each}:  # of `dqrm tune`
        names = list(next(iter(fields.values())))
        rows = [[name, *(_value(values.get(field)) for field in names)] for name, values in fields.items()]
        parts += ["What was tried:", _lines(["", *names], rows)]
    if folder.failures:
        told = [f"* {_escaped(each['variant'])}, seed {each['seed']}: {_escaped(each['error'])}"
                for each in folder.failures]  # fmt: skip
        parts.append("\n".join(["Failed:", "", *told]))
    return "\n\n".join(parts) + "\n"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _note(folder: Folder, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    import torch

    names = [name for name in METRICS if any(name in each["test"] for each in summaries.values())]
    text = (
        "Test figures at the checkpoint that validation chose, mean ± standard deviation over seeds "
        f"{', '.join(map(str, folder.seeds))}; Δ: difference to {_escaped(folder.baseline)}, mean of the paired "
        f"differences ± its standard error. dqrm {__version__}, torch {torch.__version__}, data "
        f"{folder.data['fingerprint'][:12]}."
    )
    explained = legend(names)
    return text + (f" {_escaped(explained)}." if explained else "")


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in (header, ruler, *rows))


def _escaped(text: str) -> str:
    """Text without control characters or markup of Markdown and HTML."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", printable(text))


def show(comparison: Mapping[str, Any]) -> None:
    """The table of what `compare.compare` returns on standard output, with the validation AUC as a sparkline."""
    variants = comparison["variants"]
    header, rows = table(variants, SHOWN, SHOWN[:1])
    rows = [[_short(name), *rest] for name, *rest in rows]
    curves = [each["validation_auc"] for each in variants.values()]
    if any(len(curve) > 1 for curve in curves):
        header.append("val. AUC")
        rows = [[*row, sparkline(curve) if curve else "-"] for row, curve in zip(rows, curves)]
    print_table(comparison["title"], header, rows)
    several = any(len(each["seeds"]) > 1 for each in variants.values())
    spread = ("mean ± standard deviation on test", ", paired, ± standard error") if several else ("on test", "")
    results.print(printable(f"{spread[0]}; Δ: to {comparison['baseline']}{spread[1]}"))
    for each in comparison["failures"]:
        results.print(printable(f"Failed: {each['variant']}, seed {each['seed']}: {each['error']}"))
    if not comparison["same_data"]:
        results.print("These runs are of different data, and their figures do not compare.")


def _short(name: str) -> str:
    """A name that leaves space for the columns beside it."""
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST // 2]}…{name[1 - _WIDEST // 2 :]}"
