"""The two kinds of requests that share batches: tensors of the protocol, and raw rows of a log."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqrm.data.raw import RawEncoder
from dqrm.errors import UserError
from dqrm.server.errors import Refusal
from dqrm.server.version import Scores, Tensors, Version, joined
from dqrm.serving.loaded import encoded_rows

Rows = list[dict[str, Any]]
Unknown = Callable[[str, int], None]
"""Told the name of a categorical column and how many ids are in no row of its vocabulary."""


@dataclass(frozen=True)
class TensorGroup:
    """Requests by table rows; all requests of a version may share a batch."""

    version: Version

    @property
    def key(self) -> Hashable:
        """See `batching.Group`."""
        return id(self.version), "tensors"

    def run(self, payloads: Sequence[Tensors]) -> list[Scores]:
        """See `batching.Group`."""
        scores = _scored(self.version, joined(payloads))
        return _split(scores, [len(payload) for payload in payloads])


@dataclass(frozen=True)
class RowGroup:
    """Requests of raw rows. Those whose columns hold values of the same types share a batch.

    A value of another type in the same column can change how all of them are read (numbers beside text become text),
    and no request may change the result of another one.
    """

    version: Version
    types: Hashable
    unknown: Unknown

    @property
    def key(self) -> Hashable:
        """See `batching.Group`."""
        return id(self.version), self.types

    def run(self, payloads: Sequence[Rows]) -> list[Scores]:
        """See `batching.Group`."""
        encoder = self.version.encoder
        assert isinstance(encoder, RawEncoder)
        parts = []
        for block in encoded_rows(encoder, [row for rows in payloads for row in rows]):
            parts.append(_scored(self.version, block.batch))
            for key, count in zip(encoder.plan.keys, block.unseen):
                if count:
                    self.unknown(key.name, count)
        scores = Scores(*map(np.concatenate, zip(*parts)))
        return _split(scores, [len(rows) for rows in payloads])


def row_group(version: Version, rows: Rows, unknown: Unknown) -> RowGroup:
    """The group of a request of raw rows.

    Raises:
        Refusal: the model has no vocabularies.
    """
    encoder = version.encoder
    if isinstance(encoder, UserError):
        raise Refusal(404, f"{version.name} has no vocabularies to score raw rows with; {encoder}")
    types: Hashable = column_types(rows, version)
    return RowGroup(version, object() if types is None else types, unknown)


def column_types(rows: Rows, version: Version) -> tuple[Any, ...] | None:
    """The type of each column's values; None for rows that share no batch: a column of mixed types or missing, whole
    numbers that a float cannot hold.

    A column of nulls has the type that it had last: nulls are missing values in a column of any type.
    """
    found = []
    for name, numeric in version.raw_columns.items():
        kind, seen = None, None
        for row in rows:
            if name not in row:
                return None
            if (value := row[name]) is None:
                continue
            seen = _type(value, numeric)
            if seen is None or kind not in (None, seen):
                return None
            kind = seen
        if kind is None:
            kind = version.types.get(name)
        else:
            version.types[name] = kind
        found.append(kind)
    return tuple(found)


def _type(value: Any, numeric: bool) -> Any:
    """numeric: whether whole numbers and others are alike, as they are in a dense column. None: shares no batch."""
    kind = type(value)
    if kind is list:
        kinds = {_type(entry, False) for entry in value}
        return ("list", kinds.pop()) if len(kinds) == 1 and None not in kinds else None
    if kind is int:
        return (float if numeric else int) if -(2**53) <= value <= 2**53 else None
    return kind if kind in (str, float, bool) else None


def _scored(version: Version, batch: Any) -> Scores:
    try:
        return version.score(batch)
    except UserError as error:
        if version.works():
            raise Refusal(400, "these values have no finite probability: they are too large for the model") from None
        version.failed = str(error)  # for good: the file was changed in place
        raise Refusal(503, f"{version.name} cannot score at present: {error}") from None


def _split(scores: Scores, counts: Sequence[int]) -> list[Scores]:
    if len(counts) == 1:
        return [scores]
    ends = np.cumsum(counts)[:-1]
    return [Scores(*pair) for pair in zip(np.split(scores.logit, ends), np.split(scores.probability, ends))]


def check_rows(given: Any) -> Rows:
    """The rows of a body: one object or a list of them.

    Raises:
        Refusal: it is something else, or holds none.
    """
    rows = [given] if isinstance(given, Mapping) else given
    if not isinstance(rows, list) or not rows:
        raise Refusal(400, f"got {_named(given)}, expected a JSON object with the columns of a row, or a list of them")
    odd = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise Refusal(400, f"row {odd} is {_named(rows[odd - 1])}, expected a JSON object with the columns of a row")
    return rows


def _named(value: Any) -> str:
    if value == [] and isinstance(value, list):
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
