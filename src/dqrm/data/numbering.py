"""The table rows of a log's ids: each column's vocabulary is built, written and applied."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqrm.data import folder, growth
from dqrm.data.columns import KeyColumn, Plan
from dqrm.data.encode import Translations, count
from dqrm.data.extension import Extended
from dqrm.data.splits import Splits
from dqrm.data.staging import Staging


@dataclass
class Numbering:
    """The numbered columns, in the order of the schema.

    Attributes:
        columns: their entries in dataset.json. files: written, as paths in the folder. tables: what changed in each
            table, for a dataset that extends another. translated: their ids as table rows.
    """

    translated: Translations
    columns: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tables: list[dict[str, int]] = field(default_factory=list)
    digests: list[str | None] = field(default_factory=list)

    def digest(self, plan: Plan) -> str:
        """SHA-256 of what decides how a row of a log becomes a model's input: equal where models can be exchanged."""
        content = {
            "dense": list(plan.dense),
            "dense_transform": plan.config.dense_transform,
            "null_values": list(plan.config.null_values),
            "subsample_negatives": plan.config.subsample_negatives,
            "columns": [{**entry, "vocabulary": digest} for entry, digest in zip(self.columns, self.digests)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def number(
    staged: Staging, splits: Splits, plan: Plan, path: Path, work: Path, extended: Extended | None, tell: Any
) -> Numbering:
    """Count the ids of each column, give them rows, and write the vocabularies into the folder `path`; where ids are
    hashed, only record how.

    extended: the dataset whose vocabularies are continued; None: they begin here. work: for temporary files.
    """
    made = Numbering(Translations(work / "rows.i32"))
    if plan.hashing is not None:
        for key, hashed in zip(plan.keys, plan.hashing):
            made.translated.add_hashed()
            made.columns.append({**_entry(plan, key, hashed.rows, None), **hashed.describe()})
            made.digests.append(None)
    else:
        _count(made, staged, splits, plan, path, extended, tell)
    if plan.group is not None:
        made.translated.add_groups(staged)
    return made


def _count(
    made: Numbering, staged: Staging, splits: Splits, plan: Plan, path: Path, extended: Extended | None, tell: Any
) -> None:
    for name in ("vocabulary", "rare"):
        (path / name).mkdir()
    for at, key in enumerate(plan.keys):
        tell("counting ids", at, len(plan.keys))
        run = count(staged, at, splits, plan.config.vocabulary == "train")
        grown = extended.grow(at, run) if extended else growth.first_day(run, plan.config.min_count)
        file = folder.vocabulary_file(at, key.name)
        grown.vocabulary.write(path / file)
        made.files.append(file)
        if grown.rare.height:
            growth.write_rare(grown.rare, path / folder.rare_file(file))
            made.files.append(folder.rare_file(file))
        made.translated.add(staged, at, grown.vocabulary)
        made.columns.append(_entry(plan, key, grown.vocabulary.rows, file))
        made.digests.append(grown.vocabulary.digest())
        made.tables.append(grown.counts())
    tell("counting ids", len(plan.keys), len(plan.keys))
    if not any((path / "rare").iterdir()):
        (path / "rare").rmdir()


def _entry(plan: Plan, key: KeyColumn, rows: int, file: str | None) -> dict[str, Any]:
    return {
        "name": key.name,
        "rows": rows,
        "multi": key.multi,
        "parts": list(key.parts),
        "key": key.kind,
        "key_version": plan.key_version,
        "hash": key.hash_name() if plan.config.max_rows_per_table is not None else None,
        "vocabulary": file,
    }
