"""FuxiCTR's processed data: a folder with train, valid and test in Parquet, and feature_map.json, which names the
columns. Values are numbers of ids already; 0 pads sequences.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from dqrm.data import parquet_files
from dqrm.data.cells import is_list
from dqrm.data.config import PrepareConfig
from dqrm.data.formats.base import Format
from dqrm.data.lines import Block
from dqrm.data.sources import Source
from dqrm.errors import UserError
from dqrm.files import OBJECT, TEXT, problem

MAP = "feature_map.json"
_SHAPE = {"labels": [TEXT], "features": [OBJECT]}
# Splits by the name of a file, or of the folder of its parts.
_SPLITS = {"validation_values": "valid", "test_values": "test"}


class FuxiFormat(Format):
    """FuxiCTR's Parquet; a feature_map.json is in the folder of the files, or above them."""

    transformed = "FuxiCTR may have normalized already"

    def arrange(self, sources: Sequence[Source]) -> list[Source]:
        """As `Format.arrange`: the Parquet files, without what lies beside them."""
        files = [source for source in sources if source.parquet]
        if not files:
            raise UserError(f"{sources[0].where} is no Parquet file, expected FuxiCTR's train.parquet or its folder")
        return [replace(source, format=self, parquet=False) for source in files]

    def complete(self, sources: Sequence[Source], config: PrepareConfig) -> PrepareConfig:
        """As `Format.complete`: columns of the feature map and its split by file, where none is given."""
        fields: dict[str, Any] = {}
        if not (config.dense or config.categorical):
            fields = _columns(sources[0], config)
        if config.split_rule == "file" and not (config.validation_values or config.test_values):
            for field, name in _SPLITS.items():
                patterns = (f"{name}.parquet", f"{name}/*")
                fields[field] = tuple(p for p in patterns if any(source.matches(p) for source in sources))
        return replace(config, **fields)

    def schema(self, source: Source) -> pl.Schema:
        """As `Format.schema`."""
        return parquet_files.schema(source)

    def blocks(self, source: Source, wanted: Sequence[str], rows: int) -> Iterator[Block]:
        """As `Format.blocks`; without the zeros that pad sequences."""
        for block in parquet_files.blocks(source, wanted, rows):
            padded = [name for name, kind in block.fields.schema.items() if is_list(kind)]
            for name in padded:
                lists = block.fields[name].cast(pl.List(block.fields[name].dtype.inner))  # type: ignore[attr-defined]
                block.fields = block.fields.with_columns(lists.list.eval(pl.element().filter(pl.element() != 0)))
            yield block


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: damaged, or not written by FuxiCTR") from None
    if wrong := problem(content, _SHAPE):
        raise UserError(f"{path} {wrong}: damaged, or not written by FuxiCTR")
    return content


def _columns(source: Source, config: PrepareConfig) -> dict[str, Any]:
    """The fields of a configuration that a feature map decides."""
    folders = [folder / MAP for folder in list(source.path.absolute().parents)[:2]]
    path = next((path for path in folders if path.is_file()), None)
    if path is None:
        raise UserError(f"there is no {MAP} beside {source.where}; name its columns in categorical and dense")
    content = _read(path)
    kinds: dict[str, list[str]] = {}
    for entry in content["features"]:
        for name, spec in entry.items():
            kind = spec.get("type") if isinstance(spec, Mapping) else None
            kinds.setdefault(str(kind), []).append(name)
    known = {"numeric", "categorical", "sequence", "meta"}
    for kind, names in kinds.items():
        if kind not in known:
            raise UserError(
                f"{path} has the feature {names[0]} of type {kind}, expected {', '.join(sorted(known))}; name the "
                "columns to read in categorical and dense"
            )
    labels = content["labels"]
    if config.label not in labels and len(labels) != 1:
        raise UserError(f"{path} has the labels {', '.join(labels) or 'none'}; name one with --label")
    sequences = tuple(kinds.get("sequence", ()))
    return {
        "label": config.label if config.label in labels else labels[0],
        "dense": tuple(kinds.get("numeric", ())),
        "categorical": (*kinds.get("categorical", ()), *sequences),
        "multi": sequences,
    }
