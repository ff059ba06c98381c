"""The parts of a training step, and which rows are looked up."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dqrm.data import folder
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.files import read_json
from dqrm.report.content import Plot, Section, Table, cell
from dqrm.report.plots import dots, lines
from dqrm.report.records import Subject, number, shown, table_of

_ROWS = 1 << 20
_SHARES = (0.001, 0.01, 0.1, 0.5)
_LARGEST = 3


def step_parts(bench: str | None) -> Section:
    """Milliseconds of each part of a step, as `dqrm bench step --json` measured them.

    Raises:
        UserError: the file is not that.
    """
    section = Section("Parts of a step")
    if bench is None:
        section.missing.append(
            "Not measured: `dqrm bench step --json > step.json`, then `dqrm report --bench step.json`."
        )
        return section
    content = table_of(read_json(Path(bench)))
    variants = content.get("variants")
    names, groups = list[str](), list[str]()
    rows, cells = list[dict[str, Any]](), list[tuple[str, dict[str, float]]]()
    for variant in variants if isinstance(variants, list) else []:
        found = {shown(name): number(took) for name, took in table_of(table_of(variant).get("parts")).items()}
        parts = {name: took for name, took in found.items() if took is not None}
        if not parts:
            continue
        name = f"{shown(variant.get('name'))}, batch {shown(variant.get('batch_size'))}"
        parts["whole step"] = sum(parts.values())
        groups += [part for part in parts if part not in groups]
        names.append(name)
        rows += [{"series": name, "group": part, "x": took} for part, took in parts.items()]
        cells.append((name, parts))
    if not rows:
        raise UserError(f"{bench} has no parts of a step, expected the output of `dqrm bench step --json`")
    groups = [*(group for group in groups if group != "whole step"), "whole step"]
    table = Table("ms per step", ["", *groups], [[n, *(cell(p.get(group), 3) for group in groups)] for n, p in cells])
    told = "; ".join(f"{name} {cell(parts['whole step'], 3)} ms" for name, parts in cells)
    machine = table_of(content.get("machine"))
    facts = ", ".join(f"{key} {shown(machine[key])}" for key in ("processor", "threads", "torch") if key in machine)
    section.text.append(f"Medians of the parts; measured on: {facts or 'unknown'}.")
    plot = dots(rows, names, groups, "ms")
    section.plots.append(
        Plot("Time of each part", f"Milliseconds of the parts of a training step. Whole: {told}.", plot, table)
    )
    return section


def lookups(subject: Subject, data: str | None, progress: Callable[[str, int, int | None], None]) -> Section:
    """Share of the lookups of an epoch that go to the most looked up rows.

    Raises:
        UserError: `data` is no dataset.
    """
    section = Section("Lookups by the hottest rows")
    recorded = subject.series[0].first.data.get("path") if subject.series else None
    if not (data or recorded):
        section.missing.append("The run does not record where its data is: `--data DATA` names it.")
        return section
    try:
        dataset = Dataset(data or str(recorded))
    except (UserError, ValueError, OSError) as error:
        if data:
            raise
        section.missing.append(f"The data of the run was not found ({shown(error)}): `--data DATA` names it.")
        return section
    fingerprint = subject.series[0].first.data.get("fingerprint") if subject.series else None
    if fingerprint and dataset.fingerprint != fingerprint:
        section.text.append(f"{shown(dataset.path)} is not the data that {subject.names[0]} was trained on.")
    counts = count_lookups(dataset, progress)
    if not counts or not sum(int(each.sum()) for each in counts.values()):
        section.missing.append(f"{shown(dataset.path)} has no lookups in training.")
        return section
    largest = sorted(counts, key=lambda name: -len(counts[name]))[:_LARGEST]
    every = np.concatenate(list(counts.values()))
    curves = {"all tables": every, **{f"table {shown(name)}": counts[name] for name in largest}}
    rows, cells = [], []
    for name, each in curves.items():
        share = np.cumsum(np.sort(each)[::-1]) / max(1, each.sum())
        places = np.unique(np.geomspace(1, len(share), 40).astype(np.int64))
        rows += [{"series": name, "x": float(at / len(share)), "y": float(share[at - 1])} for at in places]
        told = (share[min(len(share), max(1, round(part * len(share)))) - 1] for part in _SHARES)
        cells.append([name, f"{len(share):,}", *(f"{value:.1%}" for value in told)])
    header = ["", "rows", *(f"hottest {part:.1%}" for part in _SHARES)]
    section.text.append("One pass over the training split; a row looked up twice counts twice.")
    section.plots.append(Plot(
        "Share of lookups over share of rows, hottest first",
        f"All tables: the hottest {_SHARES[1]:.0%} of the rows take {cells[0][3]} of the lookups, the hottest "
        f"{_SHARES[2]:.0%} take {cells[0][4]}.",
        lines(rows, list(curves), "share of rows", "share of lookups", log_x=True, points=False),
        Table("Share of lookups", header, cells),
    ))  # fmt: skip
    return section


def count_lookups(dataset: Dataset, progress: Callable[[str, int, int | None], None]) -> Mapping[str, Any]:
    """How often each table's rows are looked up in an epoch: int64 [rows] by column."""
    split = dataset.split("train")
    counts = {column.name: np.zeros(column.rows, np.int64) for column in dataset.columns}
    single = [column.name for column in dataset.columns if not column.multi]
    for at in range(0, split.rows, _ROWS):
        ids = np.asarray(split.arrays[folder.IDS][at : at + _ROWS])
        for at_column, name in enumerate(single):
            np.add.at(counts[name], ids[:, at_column], 1)
        progress("counting lookups", min(at + _ROWS, split.rows), split.rows)
    for at_column, column in enumerate(dataset.columns):
        if column.multi:
            values = split.arrays[folder.values_file(at_column)]
            for at in range(0, len(values), _ROWS):
                np.add.at(counts[column.name], values[at : at + _ROWS], 1)
    return counts
