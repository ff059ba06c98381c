"""Criteo's logs as other programs have processed them: arrays of labels, 13 dense values and 26 ids."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE
from dqrm.data.formats.arrays import Stored, Unreadable, npy, npz, require
from dqrm.data.formats.base import COLUMNS, Format, criteo_block, criteo_schema
from dqrm.data.lines import Block
from dqrm.data.sources import Damaged, Source, read_bytes
from dqrm.errors import UserError

_DENSE, _IDS = len(CRITEO_DENSE), len(CRITEO_CATEGORICAL)
_RECORD = 4 * len(COLUMNS)
_PARTS = re.compile(r"(?P<day>.+?)_(?P<part>dense|sparse(?:_contig_freq)?|labels?)\.npy")


class NpzFormat(Format):
    """DLRM's .npz, of a whole log or a day: X_cat [N, 26], X_int [N, 13] and y [N]; perhaps counts [26]."""

    def schema(self, source: Source) -> pl.Schema:
        """As `Format.schema`."""
        with _reading(source), npz(source.path) as arrays:
            label, dense, categorical, _ = _members(arrays, source.where)
            return criteo_schema(label.dtype, dense.dtype, categorical.dtype)

    def blocks(self, source: Source, wanted: Sequence[str], rows: int) -> Iterator[Block]:
        """As `Format.blocks`; ids that are not below their column's count are malformed rows."""
        first = 1
        with _reading(source), npz(source.path) as arrays:
            *members, counts = _members(arrays, source.where)
            for label, dense, categorical in zip(*(member.blocks(rows) for member in members), strict=True):
                block = criteo_block(wanted, first, label, dense, categorical)
                yield block if counts is None else _within(block, categorical, counts)
                first += len(label)


def _members(arrays: dict[str, Stored], where: str) -> tuple[Stored, Stored, Stored, NDArray[np.int64] | None]:
    """y, X_int, X_cat and counts."""
    missing = [name for name in ("X_cat", "X_int", "y") if name not in arrays]
    if missing:
        held = ", ".join(arrays) or "no array"
        raise UserError(f"{where} holds {held}, expected X_cat, X_int and y, as DLRM writes them")
    label, dense, categorical = arrays["y"], arrays["X_int"], arrays["X_cat"]
    _require_log(where, label, dense, categorical)
    if "counts" not in arrays:
        return label, dense, categorical, None
    counts = arrays["counts"]
    if counts.shape != (_IDS,) or counts.dtype.kind not in "iu":
        raise UserError(
            f"{where}: counts has the shape {list(counts.shape)} and holds {counts.dtype}, expected [{_IDS}] integers"
        )
    return label, dense, categorical, counts.whole().astype(np.int64)


def _require_log(where: str, label: Stored, dense: Stored, categorical: Stored) -> None:
    require(label, where, None, "iufb")
    require(dense, where, _DENSE)
    require(categorical, where, _IDS)
    if len({array.shape[0] for array in (label, dense, categorical)}) != 1:
        rows = ", ".join(f"{array.name} has {array.shape[0]} rows" for array in (label, dense, categorical))
        raise UserError(f"{where}: {rows}, expected as many in each")


def _within(block: Block, categorical: NDArray[Any], counts: NDArray[np.int64]) -> Block:
    beyond = categorical >= counts
    if not beyond.any():
        return block
    for row in np.flatnonzero(beyond.any(axis=1)):
        column = int(np.argmax(beyond[row]))
        got = f"column {CRITEO_CATEGORICAL[column]} holds {categorical[row, column]:g}"
        block.bad.append((int(block.lines[row]), f"{got}, expected an id below its count, {counts[column]}"))
    good = ~beyond.any(axis=1)
    return Block(block.fields.filter(pl.Series(good)), block.lines[good], block.bad, block.end)


class RecordFormat(Format):
    """MLPerf's binary: records of 40 little-endian int32, the label, 13 integers before the logarithm, 26 ids."""

    streamed = True

    def schema(self, source: Source) -> pl.Schema:
        """As `Format.schema`."""
        if source.state is not None:
            head = next(source.again().pieces(), b"")[:4]
            # The first four bytes are a label; compressed files begin otherwise.
            if head in (b"\0\0\0\0", b"\1\0\0\0") and source.state.size % _RECORD:
                raise UserError(f"{source.where} has {source.state.size} bytes, {_WHOLE}")
        return criteo_schema(*[np.dtype(np.int32)] * 3)

    def blocks(self, source: Source, wanted: Sequence[str], rows: int) -> Iterator[Block]:
        """As `Format.blocks`."""
        first, held, size, damage = 1, [b""], 0, None
        try:
            for piece in read_bytes(source):
                held.append(piece)
                size += len(piece)
                if size >= rows * _RECORD:
                    data = b"".join(held)
                    cut = len(data) - len(data) % _RECORD
                    yield _records(data[:cut], wanted, first)
                    first, held, size = first + cut // _RECORD, [data[cut:]], len(data) - cut
        except Damaged as error:  # after the records that could be read
            damage = error
        data = b"".join(held)
        cut = len(data) - len(data) % _RECORD
        if cut:
            yield _records(data[:cut], wanted, first)
        if damage is not None:
            raise damage
        if first == 1 and not data:
            raise Damaged("it is empty, expected rows")
        if cut < len(data):
            raise Damaged(f"it ends with {len(data) - cut} bytes of a record, {_WHOLE}")


_WHOLE = f"expected records of {_RECORD} bytes (40 int32: label, 13 integers, 26 ids)"


def _records(data: bytes, wanted: Sequence[str], first: int) -> Block:
    numbers = np.frombuffer(data, "<i4").reshape(-1, len(COLUMNS))
    return criteo_block(wanted, first, numbers[:, 0], numbers[:, 1 : 1 + _DENSE], numbers[:, 1 + _DENSE :])


class NpyFormat(Format):
    """TorchRec's and HugeCTR's folders: of each day X three files, X_dense.npy [N, 13], X_sparse.npy [N, 26] (or
    X_sparse_contig_freq.npy) and X_labels.npy [N] or [N, 1].

    Raw 32-bit ids are stored as int32, so negative int32 mean the number 2^32 above.
    """

    transformed = "TorchRec's scripts have transformed already (the logarithm of the integer + 3)"

    def arrange(self, sources: Sequence[Source]) -> list[Source]:
        """As `Format.arrange`: the three files of a day become one source, named as they begin."""
        days: dict[Path, dict[str, Source]] = {}
        for source in sources:
            match = _PARTS.fullmatch(source.path.name)
            if match is None or source.stream:
                raise UserError(
                    f"{source.where} is none of the files of layout criteo-npy, expected day_0_dense.npy, "
                    "day_0_sparse.npy, day_0_labels.npy"
                )
            part = match["part"].split("_")[0].removesuffix("s")
            parts = days.setdefault(source.path.with_name(match["day"]), {})
            if part in parts:
                raise UserError(
                    f"{parts[part].where} and {source.where} are two files of the same rows, expected one of them"
                )
            parts[part] = source
        return [self._day(day, parts) for day, parts in days.items()]

    def _day(self, day: Path, parts: dict[str, Source]) -> Source:
        for part, name in (("dense", "dense"), ("sparse", "sparse"), ("label", "labels")):
            if part not in parts:
                raise UserError(f"{next(iter(parts.values())).where} has no {day.name}_{name}.npy beside it")
        dense = parts["dense"]
        name = dense.name.removesuffix("_dense.npy")
        ordered = (parts["label"], dense, parts["sparse"])
        return Source(day, False, name=name, partitions=dense.partitions, parts=ordered, format=self)

    def schema(self, source: Source) -> pl.Schema:
        """As `Format.schema`."""
        with self._open(source) as (label, dense, sparse):
            kind = np.dtype(np.uint32) if sparse.dtype.kind == "i" and sparse.dtype.itemsize == 4 else sparse.dtype
            return criteo_schema(label.dtype, dense.dtype, kind)

    def blocks(self, source: Source, wanted: Sequence[str], rows: int) -> Iterator[Block]:
        """As `Format.blocks`."""
        first = 1
        with self._open(source) as arrays:
            for label, dense, sparse in zip(*(array.blocks(rows) for array in arrays), strict=True):
                ids = sparse
                if sparse.dtype.kind == "i" and sparse.dtype.itemsize == 4:
                    ids = sparse.astype("=i4", copy=False).view(np.uint32)
                yield criteo_block(wanted, first, label, dense, ids)
                first += len(label)

    @contextmanager
    def _open(self, source: Source) -> Iterator[tuple[Stored, Stored, Stored]]:
        with _reading(source), ExitStack() as stack:
            label, dense, sparse = (stack.enter_context(npy(part.path)) for part in source.parts)
            _require_log(source.where, label, dense, sparse)
            yield label, dense, sparse


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        source.require_unchanged()
        raise UserError(f"{source.where} {error}") from None
    except OSError as error:
        source.require_unchanged()
        raise UserError(f"cannot read {source.where}: {error.strerror}") from None
