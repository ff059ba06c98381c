"""The page at /: what the models are, and a form that scores a row. One file without any request to another host."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dqrm.data.columns import KeyColumn
from dqrm.data.hashing import HashedRows
from dqrm.data.raw import RawEncoder
from dqrm.data.vocabulary import Vocabulary
from dqrm.server.version import Version

# Ids of a column that the form offers.
_EXAMPLES = 20


@cache
def html() -> bytes:
    """The page."""
    return Path(__file__).with_name("page.html").read_bytes()


def _policy() -> bytes:
    """Only what is in the page itself may run, and only this server may be asked."""
    text = html().decode()
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; connect-src 'self'; img-src data:; {'; '.join(sources)}".encode()


POLICY = (b"content-security-policy", _policy())


def describe(version: Version) -> dict[str, Any]:
    """A model for the page: columns, sizes, metrics, provenance, and the fields of a row with ids."""
    opened = version.opened
    content = opened.content
    described, origin = content["model"], content["provenance"]
    run = origin["run"]
    return {
        "name": version.name,
        "version": version.id,
        "failed": version.failed,
        "model": type(version.model).__name__,
        "bits": {key: described[key] for key in ("table_bits", "mlp_bits", "activation_bits")},
        "method": content["quantization"]["method"],
        "dim": described["config"]["embedding_dim"],
        "dense": content["schema"]["dense"],
        "columns": [
            {"name": column["name"], "rows": column["rows"], "multi": column["multi"]}
            for column in content["schema"]["columns"]
        ],
        "sizes": opened.sizes(),
        "bits_per_weight": round(opened.bits_per_weight(), 3),
        "base_rate": opened.base_rate.header(),
        "metrics": {split: metrics for split, metrics in run["metrics"].items() if metrics},
        "provenance": {
            "dqrm": origin["dqrm"],
            "dataset": origin["data"]["fingerprint"][:16],
            "checkpoint": run["checkpoint"],
            "step": run["step"],
        },
        "inputs": [port.describe() for port in version.inputs],
        "fields": _fields(version),
    }


def _fields(version: Version) -> list[dict[str, Any]] | None:
    """The columns of a raw row, each with ids as a log writes them; None without vocabularies."""
    encoder = version.encoder
    if not isinstance(encoder, RawEncoder):
        return None
    alone = {key.parts[0]: (key, vocabulary) for key, vocabulary in zip(encoder.plan.keys, encoder.vocabularies)
             if len(key.parts) == 1}  # fmt: skip
    fields = []
    for name, number in version.raw_columns.items():
        key, vocabulary = alone.get(name, (None, None))
        examples = _examples(encoder, key, vocabulary) if key else []
        fields.append({"name": name, "number": number, "lists": bool(key and key.lists), "examples": examples})
    return fields


def _examples(encoder: RawEncoder, key: KeyColumn, vocabulary: Vocabulary | HashedRows | None) -> list[str]:
    """The ids that the log had first; none where they are hashed."""
    if not isinstance(vocabulary, Vocabulary) or encoder.plan.config.max_rows_per_table is not None:
        return []
    keys = vocabulary.keys.gather(pl.Series(np.argsort(vocabulary.table_rows)[:_EXAMPLES]))
    return [format(value, "08x") if key.kind == "hex" else str(value) for value in keys.to_list()]
