"""LIBSVM's and libffm's text: lines of a label and features, `1 3:1 17:1` and `1 0:3:1 1:17:1`, as columns of lists.

libsvm: one multi-valued column, `features`, of the indices. libffm: one of each field, named by its number.
Features are ids here, so that each has the value 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.config import LIBSVM_COLUMN
from dqrm.data.lines import Block, TextReader
from dqrm.data.sources import Damaged

_SHAPES = {"libsvm": "index:1", "libffm": "field:index:1"}
# No line of such a file holds it, so that lines stay whole.
_NEVER = "\x1f"
_LINE, LABEL = "line", "label"


class SparseReader:
    """Read such text block by block, as `TextReader` reads tables.

    pieces: the bytes. layout: libsvm or libffm. fields: the columns of libffm that exist; others are passed over.
    """

    def __init__(self, pieces: Iterator[bytes], where: str, layout: str, fields: Sequence[str]) -> None:
        self._lines = TextReader(pieces, where, _NEVER, False, (_LINE,))
        self._ffm = layout == "libffm"
        self._shape = _SHAPES[layout]
        self.names = [LABEL, *(fields if self._ffm else (LIBSVM_COLUMN,))]

    def blocks(self, wanted: Sequence[str], start: int = 0) -> Iterator[Block]:
        """The `wanted` columns of all rows from line `start` on, in order: the label String (null without one),
        features List(String).

        Whatever the pieces raise at their end is raised at the end.
        """
        for block in self._lines.blocks((_LINE,), start):
            rows = _Features(block.fields.get_column(_LINE), self._ffm)
            good = np.ones(len(block.lines), bool)
            for row, reason in rows.problems(self._shape).items():
                good[row] = False
                block.bad.append((int(block.lines[row]), reason))
            chosen = pl.Series(good)
            columns = {name: rows.labels if name == LABEL else rows.of(name) for name in wanted}
            yield Block(pl.DataFrame(columns).filter(chosen), block.lines[good], block.bad, block.end)

    def fields(self) -> set[int]:
        """The numbers of all fields; reads to the end."""
        fields: set[int] = set()
        with suppress(Damaged):  # reading the rows will tell, or pass over it
            for block in self._lines.blocks((_LINE,)):
                numbers = _Features(block.fields.get_column(_LINE), True).fields
                fields |= set(numbers.drop_nulls().unique().to_list())
        return fields


class _Features:
    """The features of some lines, one after the other.

    labels: String, null where a line begins with a feature. fields: UInt64, null where a feature is none.
    """

    def __init__(self, lines: pl.Series, ffm: bool) -> None:
        pieces = lines.fill_null("").str.extract_all(r"[^ \t\r]+")
        first = pieces.list.first()
        labelled = (~first.str.contains(":", literal=True)).fill_null(False)
        self.labels = pl.DataFrame({"first": first, "is": labelled}).select(pl.when("is").then("first")).to_series()
        self._empty = pieces.list.len() == 0
        both = pl.DataFrame({"pieces": pieces, "skip": labelled.cast(pl.Int64)})
        texts = both.select(pl.col("pieces").list.slice("skip")).to_series()
        self._count = len(lines)
        self.rows: NDArray[Any] = np.repeat(np.arange(self._count), texts.list.len().to_numpy())
        self.texts = texts.explode(empty_as_null=False).cast(pl.String)
        field = r"(?<field>\d+):" if ffm else "(?<field>)"
        parts = self.texts.str.extract_groups(rf"^{field}(?<index>\d+):(?<value>[^:]+)$").struct
        self.fields = parts.field("field").cast(pl.UInt64, strict=False)
        self._index = parts.field("index").cast(pl.UInt64, strict=False)
        self._one = (parts.field("value").cast(pl.Float64, strict=False) == 1).fill_null(False)
        self._shaped = self._index.is_not_null() & (self.fields.is_not_null() if ffm else True)
        self._ffm = ffm

    def problems(self, shape: str) -> dict[int, str]:
        """Of each malformed line the first reason."""
        reasons = {int(row): f"an empty line, expected a label and features, {shape}" for row in self._empty.arg_true()}
        for at in (~(self._shaped & self._one)).arg_true():
            text = self.texts[at]
            shown = repr(text if len(text) <= 60 else text[:60] + "...")
            reason = f"the feature {shown}, expected {shape}"
            if self._shaped[at]:
                reason += ": features are ids, and weights other than 1 are not supported"
            reasons.setdefault(int(self.rows[at]), reason)
        return reasons

    def of(self, name: str) -> pl.Series:
        """List(String): the features of each line, of one field in libffm's."""
        frame = pl.DataFrame({"row": self.rows, "index": self._index.cast(pl.String)})
        if self._ffm:
            frame = frame.filter((self.fields == int(name)).fill_null(False))
        lists = frame.group_by("row", maintain_order=True).agg("index")
        every = pl.DataFrame({"row": np.arange(self._count)})
        return every.join(lists, on="row", how="left", maintain_order="left")["index"].fill_null([])


def fields(files: Sequence[tuple[str, Callable[[], Iterator[bytes]]]]) -> tuple[str, ...]:
    """The fields of libffm's files, each a name and what gives its bytes, by number."""
    numbers: set[int] = set()
    for where, pieces in files:
        numbers |= SparseReader(pieces(), where, "libffm", ()).fields()
    return tuple(map(str, sorted(numbers)))
