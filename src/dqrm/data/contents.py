"""What dataset.json says of a dataset that has just been written."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dqrm import __version__
from dqrm.data import folder, numbering, splits
from dqrm.data.columns import Plan
from dqrm.data.config import PrepareConfig
from dqrm.data.encode import Writer
from dqrm.data.extension import Extended
from dqrm.data.sources import Source
from dqrm.errors import UserError

# Columns with one number for each row beside the model's.
_PER_ROW = ("weight", "group")
# Recorded where they are not the default: datasets without them stay what they were.
_OPTIONAL = {"weight": None, "group": None, "count_decay": 1.0, "evict_after": None, "rows": None,
             "column_rows": (), "hashes": 1}  # fmt: skip
# Of no effect on the result, or recorded in another way.
UNRECORDED = ("chunk_rows", "memory", "extend")
# Weights summed at a time: fixed, since the order of a sum shows in its last bit.
_BLOCK = 1 << 20


def describe(
    path: Path,
    plan: Plan,
    files: Sequence[Source],
    made: numbering.Numbering,
    parts: Sequence[Sequence[Writer]],
    extended: Extended | None,
) -> dict[str, Any]:
    """The content of dataset.json for the folder `path`, but for checksums.

    parts: of each part the writers of the splits.

    Raises:
        UserError: the weights of all training rows are 0.
    """
    by_split = dict(zip(folder.SPLITS, zip(*parts)))
    writers = [writer for part in parts for writer in part]
    multi = parts[0][0].values
    info: dict[str, Any] = {
        "format_version": folder.GROWING_VERSION if extended or plan.hashing else folder.FORMAT_VERSION,
        "schema": _schema(plan, made.columns),
        "split": splits.describe(plan.config),
        "rows": {name: sum(writer.rows for writer in each) for name, each in by_split.items()},
        "clicks": {name: sum(writer.clicks for writer in each) for name, each in by_split.items()},
        "values": {
            name: {made.columns[number]["name"]: sum(writer.values[number] for writer in each) for number in multi}
            for name, each in by_split.items()
        },
        "dense_largest": np.max([w.largest for w in writers if w.largest is not None], axis=0).tolist(),
        "negatives_dropped": sum(file.dropped for file in files),
        "lines_skipped": sum(file.skipped for file in files),
        "sources": [file.describe() for file in files],
        "options": options(plan.config),
    }
    if plan.weight is not None:
        info["weights"] = {name: _sum(path / name / folder.WEIGHT) for name in folder.SPLITS}
        if info["weights"][folder.SPLITS[splits.TRAIN]] == 0:
            raise UserError(f"the weights in column {plan.weight} of all training rows are 0: nothing to train on")
    if extended is not None:
        info["lineage"] = extended.lineage(made.tables)
    # Names of files may change without the data changing.
    hashed = {**info, "sources": [{k: v for k, v in file.describe().items() if k != "name"} for file in files]}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {
        "format_version": info.pop("format_version"),
        "dqrm_version": __version__,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "vocabulary_digest": made.digest(),
        **info,
    }


def options(config: PrepareConfig) -> dict[str, Any]:
    """The options that decide the result."""
    recorded = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNRECORDED}
    return {name: value for name, value in recorded.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}


def _schema(plan: Plan, columns: list[dict[str, Any]]) -> dict[str, Any]:
    config = plan.config
    return {
        "layout": config.layout,
        "label": plan.needed[0],
        "dense": list(plan.dense),
        "dense_transform": config.dense_transform,
        "columns": columns,
        "vocabulary": config.vocabulary,
        "min_count": config.min_count,
        "max_rows_per_table": config.max_rows_per_table,
        "multi_separator": config.multi_separator if config.multi else None,
        **_given(config),
    }


def _given(config: PrepareConfig) -> dict[str, str]:
    """The columns of weights and groups, where there are any: other datasets stay what they were."""
    return {name: value for name in _PER_ROW if (value := getattr(config, name)) is not None}


def _sum(path: Path) -> float:
    total = 0.0
    with path.open("rb") as file:
        while data := file.read(4 * _BLOCK):
            total += float(np.frombuffer(data, np.float32).sum(dtype=np.float64))
    return total
