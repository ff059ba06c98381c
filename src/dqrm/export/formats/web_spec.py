"""What a page needs besides the graph: how raw values become ids (`model.json`), and the vocabularies (`ids.bin`).

`ids.bin` holds, for each column with a vocabulary, arrays that a browser can search as they are, each at a multiple of
8 bytes, little-endian: the sorted keys (uint32 or uint64; of text: uint32 [K + 1], where each begins, and then their
UTF-8 bytes), and int32 [K], the table row of each.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from dqrm.artifact.file import Artifact
from dqrm.data.cells import KEY_VERSION
from dqrm.data.columns import CRITEO_CATEGORICAL, KeyColumn, Plan, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.hashing import HashedRows
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.models.registry import described_config, model_class, weight_count
from dqrm.options import build

_EXAMPLES = 8
_PIECE = 1 << 17
_JOINT = "\x1f"
_KEYS = {pl.UInt32: "uint32", pl.UInt64: "uint64", pl.String: "text"}


def require_pages(opened: Artifact) -> Plan:
    """How rows of an artifact's log are read, if a page can read them.

    Raises:
        UserError: the artifact has no vocabularies or no options, or keys of a version that pages do not know.
    """
    content = opened.content
    if content["vocabulary"]["mode"] == "none":
        raise UserError(
            "a folder for browsers maps raw ids to rows and needs the vocabularies, which --vocabulary none leaves out"
        )
    if content.get("options") is None:
        raise UserError(
            f"{opened.path} does not record how its log was read, since its dataset was missing at export; export the "
            "run with --data"
        )
    columns = content["schema"]["columns"]
    version = min((column.get("key_version", 1) for column in columns), default=KEY_VERSION)
    made = make_plan(build(PrepareConfig, content["options"], str(opened.path)))
    plan = dataclasses.replace(made, split=None, label=None, weight=None, group=None, key_version=version)
    if not plan.criteo and version < KEY_VERSION:
        raise UserError(
            f"the ids of this model have keys of version {version}, which pages do not read; prepare the log again "
            f"(version {KEY_VERSION}) and train"
        )
    return plan


def write_ids(opened: Artifact, plan: Plan, path: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Write `ids.bin` unless ids are hashed; its part of `model.json` for each column, and example values by column."""
    columns = opened.content["schema"]["columns"]
    hashed = HashedRows.of_columns(columns)
    if hashed is not None:
        entries = [{"hash": dataclasses.asdict(rows)} for rows in hashed]
        return [_column(plan, key, entry) for key, entry in zip(plan.keys, entries)], {}
    described: list[dict[str, Any]] = []
    examples: dict[str, list[str]] = {}
    with path.open("wb") as file:
        for number, key in enumerate(plan.keys):
            known = Vocabulary.read(opened.vocabulary(number), f"the vocabulary of {key.name}")
            described.append(_column(plan, key, {"vocabulary": _append(file, known)}))
            if plan.config.max_rows_per_table is None:
                for name, values in _examples(plan, key, known).items():
                    examples.setdefault(name, values)
    return described, examples


def _column(plan: Plan, key: KeyColumn, rows: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": key.name,
        "parts": list(key.parts),
        "kind": key.kind,
        "multi": key.multi,
        "lists": key.lists,
        "modulo": plan.config.max_rows_per_table,
        "hash": None,
        "vocabulary": None,
        **rows,
    }


def _append(file: IO[bytes], known: Vocabulary) -> dict[str, Any]:
    keys = known.keys
    described: dict[str, Any] = {"keys": _KEYS[type(keys.dtype)], "count": len(keys)}
    if keys.dtype == pl.String:
        ends = np.cumsum(keys.str.len_bytes().to_numpy(), dtype=np.uint64)
        described["text_bytes"] = int(ends[-1]) if len(ends) else 0
        if described["text_bytes"] >= 2**32:
            raise UserError(f"a vocabulary has {described['text_bytes']} bytes of text, a page can search 4294967295")
        described["keys_at"] = _align(file)
        file.write(np.concatenate([[0], ends]).astype("<u4").tobytes())
        described["text_at"] = _align(file)
        for piece in _pieces(keys):
            file.write("".join(piece.to_list()).encode())
    else:
        described["keys_at"] = _align(file)
        for piece in _pieces(keys):
            numbers = piece.to_numpy()
            file.write(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())
    described["rows_at"] = _align(file)
    file.write(np.ascontiguousarray(known.table_rows, "<i4").data)
    _align(file)
    return described


def _align(file: IO[bytes]) -> int:
    file.write(bytes(-file.tell() % 8))
    return file.tell()


def _pieces(keys: pl.Series) -> Iterator[pl.Series]:
    return (keys[at : at + _PIECE] for at in range(0, len(keys), _PIECE))


def _examples(plan: Plan, key: KeyColumn, known: Vocabulary) -> dict[str, list[str]]:
    """Values of the columns that a key is made of, as in the log: those that came first, which have the first rows."""
    first = np.sort(np.argsort(known.table_rows, kind="stable")[: _EXAMPLES + 1])
    order = first[np.argsort(known.table_rows[first])]
    values = [value for value in known.keys.gather(order).to_list() if value not in ("", 0)][:_EXAMPLES]
    if key.kind == "hex*hex":
        parts = [[value >> 32, value & (2**32 - 1)] for value in values]
    elif len(key.parts) > 1:
        parts = [value.split(_JOINT) for value in values]
    else:
        parts = [[value] for value in values]
    written = "{:08x}" if key.kind in ("hex", "hex*hex") else "{}"
    texts = [[written.format(part) for part in row] for row in parts if len(row) == len(key.parts)]
    if key.lists and len(texts) > 1:  # shows how several are written
        texts[0] = [texts[0][0] + plan.config.multi_separator + texts[1][0]]
    return {name: [row[at] for row in texts] for at, name in enumerate(key.parts)}


def reading(plan: Plan, columns: list[dict[str, Any]], examples: Mapping[str, list[str]]) -> dict[str, Any]:
    """The part of `model.json` that says how raw values become the model's inputs. columns: of `write_ids`."""
    config = plan.config
    return {
        "layout": "criteo" if plan.criteo else "ids" if plan.numbered else "named",
        "dense": list(plan.dense),
        "dense_transform": config.dense_transform,
        "markers": list(config.null_values if plan.criteo else plan.markers),
        "multi_separator": config.multi_separator,
        "hexadecimal": [name for name in plan.used if name in CRITEO_CATEGORICAL] if plan.criteo else [],
        "categorical": columns,
        "columns": [
            {"name": name, "kind": "dense" if name in plan.dense else "id", "examples": list(examples.get(name, []))}
            for name in plan.used
        ],
    }


def about(opened: Artifact, plan: Plan, told: list[str]) -> dict[str, Any]:
    """The part of `model.json` that says what the model is. told: sentences on the click rate of its probabilities."""
    tables = zip(opened.content["schema"]["columns"], plan.keys)
    config = described_config(opened.content["model"])
    return {
        "title": f"{model_class(config).__name__} click model",
        "summary": model_class(config).describe(config),
        "tables": [
            *({"name": name, "kind": "dense", "rows": None} for name in plan.dense),
            *({"name": key.name, "kind": _kind(key), "rows": column["rows"]} for column, key in tables),
        ],
        "about": _facts(opened, told),
    }


def _kind(key: KeyColumn) -> str:
    return "several ids" if key.lists else "cross" if len(key.parts) > 1 else "id"


def _facts(opened: Artifact, told: list[str]) -> dict[str, str]:
    content = opened.content
    model, run = content["model"], content["provenance"]["run"]
    bits = model["table_bits"] if isinstance(model["table_bits"], list) else [model["table_bits"]]
    shown = {
        "bits": f"tables {' and '.join(map(str, sorted({*bits})))}, MLP {model['mlp_bits']}",
        "table_rows": f"{sum(model['table_rows']):,} in {len(model['table_rows'])} tables",
        "weights_in_FP32": f"{4 * weight_count(model) / 1e6:,.1f} MB",
    }
    for split, metrics in run["metrics"].items():
        figures = [
            f"{name.replace('_', ' ')} {value:,}" if type(value) is int else f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in (metrics or {}).items()
            if value is not None
        ]
        if figures:
            shown[f"metrics_on_{split}"] = ", ".join(figures)
    if told:
        shown["probabilities"] = " ".join(told)
    data = content["provenance"]["data"]["fingerprint"][:16]
    shown["origin"] = f"{run['checkpoint']} checkpoint, step {run['step']:,}, of a run on data {data}"
    shown["written_by"] = f"dqrm {content['provenance']['dqrm']}"
    return shown
