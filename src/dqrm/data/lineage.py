"""Datasets that extend the vocabularies of earlier ones: which models they go with, and which rows changed since.

Rows of known ids keep their numbers from day to day, so a model of an earlier day has every id that had a row then.
Ids whose row was appended or given to another id since are row 0 to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.data.dataset import Dataset
from dqrm.errors import UserError


@dataclass(frozen=True)
class RowChanges:
    """The rows of a table, against the table of an earlier day. All int32, ascending; each row is in one of them.

    Attributes:
        kept: row 0, and those with the id that they had: their weights carry over.
        new: appended since. reused: with the id of another one than then; both are to be drawn.
        vacant: without an id now, where then there was one (or none): no sample has them.
    """

    kept: NDArray[np.int32]
    new: NDArray[np.int32]
    reused: NDArray[np.int32]
    vacant: NDArray[np.int32]


def as_seen_by(dataset: Dataset, trained_on: Mapping[str, Any], owner: Path) -> Dataset:
    """The dataset as a model reads it: itself if its vocabularies are the model's, and if it extends them, with row 0
    for the ids that the model has no row for.

    Args:
        trained_on: fingerprint, and vocabulary digest (None or absent: unknown), of the model's dataset, as a run or an
            artifact records them.
        owner: the run or file, for the message.

    Raises:
        UserError: other vocabularies.
    """
    if dataset.fingerprint == trained_on["fingerprint"] or _same(dataset.vocabulary_digest, trained_on):
        return dataset
    ancestor = _ancestor(dataset, trained_on, owner)
    return dataset.as_of(ancestor["day"], ancestor["table_rows"])


def row_changes(dataset: Dataset, trained_on: Mapping[str, Any], owner: Path) -> list[RowChanges]:
    """For each table, what became of the rows that a model has: for a run that starts from another.

    Args:
        trained_on, owner: as for `as_seen_by`.

    Raises:
        UserError: other vocabularies; a vocabulary file is damaged.
    """
    if dataset.fingerprint == trained_on["fingerprint"] or _same(dataset.vocabulary_digest, trained_on):
        day, before = dataset.day, list(dataset.table_rows)
    else:
        ancestor = _ancestor(dataset, trained_on, owner)
        day, before = ancestor["day"], ancestor["table_rows"]
    return [_changes(dataset, number, day, rows) for number, rows in enumerate(before)]


def _same(digest: str | None, trained_on: Mapping[str, Any]) -> bool:
    return digest is not None and digest == trained_on.get("vocabulary_digest")


def _ancestor(dataset: Dataset, trained_on: Mapping[str, Any], owner: Path) -> dict[str, Any]:
    """The youngest of the extended datasets whose vocabularies are the model's."""
    for ancestor in reversed(dataset.ancestors):
        if ancestor["fingerprint"] == trained_on["fingerprint"] or _same(ancestor["vocabulary_digest"], trained_on):
            return ancestor
    raise UserError(
        f"{dataset.path} is not the dataset that {owner} was trained on, nor does it have or extend its vocabularies: "
        f"fingerprint {dataset.fingerprint[:16]}, expected {trained_on['fingerprint'][:16]}"
    )


def _changes(dataset: Dataset, number: int, day: int, before: int) -> RowChanges:
    rows = dataset.table_rows[number]
    everything = np.arange(rows, dtype=np.int32)
    new, nothing = everything[before:], everything[:0]
    if dataset.hashed:
        return RowChanges(everything[:before], new, nothing, nothing)
    vocabulary = dataset.vocabulary(number)
    vacant = np.ones(rows, bool)
    vacant[0] = False
    vacant[vocabulary.table_rows] = False
    since = np.zeros(rows, np.int32)
    if vocabulary.since is not None:
        since[vocabulary.table_rows] = vocabulary.since
    other = since[:before] > day
    kept = ~vacant[:before] & ~other
    first = everything[:before]
    return RowChanges(first[kept], new, first[other], first[vacant[:before]])
