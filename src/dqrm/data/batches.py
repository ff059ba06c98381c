"""One split of a dataset folder as batches of tensors, in a reproducible order, without loading it whole."""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dqrm.data import folder
from dqrm.errors import UserError

Shuffle = Literal["none", "block", "global"]
Array = NDArray[Any]

BLOCK_ROWS = 4096
# Blocks whose rows are shuffled together: enough to separate neighbours, few enough to gather at once.
_BLOCKS_PER_BUFFER = 32
# Rows gathered in one piece; batches are views of it. Large enough that indexing costs nothing per batch.
_GATHER_ROWS = 32_768
# Files of a split that stay mapped.
_MOST_MAPS = 64
# Bytes of the maps that may be resident in the process before they are given back.
_MOST_RESIDENT = 1 << 26


@dataclass(frozen=True)
class Batch:
    """B rows.

    Attributes:
        dense: float32 [B, D].
        ids: int32 [B, T], of the single-valued tables in order.
        bags: per multi-valued table (values int32 [L], offsets int64 [B]), each offset the first position of a row's
            ids, as in `nn.EmbeddingBag`.
        labels: float32 [B], 0 or 1.
        weights: weights of the rows in the loss, float32 [B]; None: all 1.
    """

    dense: torch.Tensor
    ids: torch.Tensor
    bags: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    labels: torch.Tensor
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def share(self, rank: int, ranks: int) -> "Batch":
        """The rows of one of several ranks, as `Split.batches(share=...)` gives them: views, possibly empty."""
        rows = len(self)
        begin, end = rows * rank // ranks, rows * (rank + 1) // ranks
        bags = []
        for values, offsets in self.bags:
            first = int(offsets[begin]) if begin < rows else len(values)
            last = int(offsets[end]) if end < rows else len(values)
            bags.append((values[first:last], offsets[begin:end] - first))
        return Batch(
            _aligned(self.dense[begin:end]),
            self.ids[begin:end],
            tuple(bags),
            self.labels[begin:end],
            None if self.weights is None else self.weights[begin:end],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            self.dense.to(device, non_blocking=non_blocking),
            self.ids.to(device, non_blocking=non_blocking),
            tuple(
                (values.to(device, non_blocking=non_blocking), offsets.to(device, non_blocking=non_blocking))
                for values, offsets in self.bags
            ),
            self.labels.to(device, non_blocking=non_blocking),
            None if self.weights is None else self.weights.to(device, non_blocking=non_blocking),
        )


class Split:
    """The rows of one split, memory-mapped."""

    def __init__(
        self, path: Path, name: str, info: dict[str, Any], known: Callable[[int], Array | None] | None = None
    ) -> None:
        """known: of a column, which ids are kept, bool [rows], None for all; in batches the others are 0."""
        self.name = name
        self.rows: int = info["rows"][name]
        self.arrays = _Arrays(path / name, folder.arrays(info, name))
        columns = info["schema"]["columns"]
        self._single = [number for number, column in enumerate(columns) if not column["multi"]]
        self._multi = [number for number, column in enumerate(columns) if column["multi"]]
        self._known_of = known

    @cached_property
    def _known(self) -> list[Array | None]:
        """Per column, which ids are kept; read when they are first used."""
        numbers = range(len(self._single) + len(self._multi))
        return [None if self._known_of is None else self._known_of(number) for number in numbers]

    def newer_ids(self) -> tuple[int, int]:
        """How many ids of the split are 0 in batches because a model of an earlier day has no row for them, and how
        many ids there are in all."""
        newer = total = 0
        for at in range(0, self.rows, _GATHER_ROWS):
            ids = self.arrays[folder.IDS][at : at + _GATHER_ROWS]
            total += ids.size
            newer += sum(_unknown(ids[:, n], self._known[number]) for n, number in enumerate(self._single))
        for number in self._multi:
            values = self.arrays[folder.values_file(number)]
            total += len(values)
            for at in range(0, len(values), _GATHER_ROWS):
                newer += _unknown(values[at : at + _GATHER_ROWS], self._known[number])
        return newer, total

    def __len__(self) -> int:
        return self.rows

    def labels(self) -> Array:
        """Labels, uint8 [rows], memory-mapped."""
        return self.arrays[folder.LABEL]

    def weights(self) -> Array | None:
        """Weights of the rows, float32 [rows], memory-mapped; None where the data has none."""
        return self.arrays.get(folder.WEIGHT)

    def groups(self) -> Array | None:
        """The group of each row, int32 [rows], -1 for none, memory-mapped; None where the data has no group column."""
        return self.arrays.get(folder.GROUP)

    def num_batches(self, batch_size: int, drop_last: bool = False) -> int:
        """How many batches `batches` yields from the start."""
        return self.rows // batch_size if drop_last else -(-self.rows // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: Shuffle = "none",
        seed: int = 0,
        epoch: int = 0,
        start_batch: int = 0,
        block_rows: int = BLOCK_ROWS,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Iterate over each row once. The last batch may be short, unless `drop_last`.

        The order depends on (shuffle, seed, epoch, rows, block_rows) only.

        Args:
            shuffle: "none", the order of the log; "global", a permutation of all rows; "block", blocks of `block_rows`
                consecutive rows in random order, shuffled within 32 blocks (for data larger than memory, since it reads
                whole blocks).
            start_batch: skip to this batch, without reading those before it.
            share: (rank, ranks): only the rank's shard of each batch, of its B rows those from rank * B // ranks to
                (rank + 1) * B // ranks. The shard of a short batch may be empty.

        Raises:
            UserError: batch_size or block_rows below 1, negative seed, epoch or start_batch, unknown shuffle.
        """
        for field, value, least in (
            ("batch_size", batch_size, 1),
            ("block_rows", block_rows, 1),
            ("seed", seed, 0),
            ("epoch", epoch, 0),
            ("start_batch", start_batch, 0),
        ):
            if value < least:
                raise UserError(f"{field}: got {value}, expected at least {least}")
        if shuffle not in ("none", "block", "global"):
            raise UserError(f"shuffle: got {shuffle!r}, expected one of none, block, global")
        first = start_batch * batch_size
        stop = self.rows - self.rows % batch_size if drop_last else self.rows
        if first >= stop:
            return iter(())
        # Whole batches, so that a batch never spans two pieces.
        piece = max(1, _GATHER_ROWS // batch_size) * batch_size
        if shuffle == "none":
            pieces: Iterator[Array | slice] = (slice(at, min(at + piece, stop)) for at in range(first, stop, piece))
        elif shuffle == "global":
            order = _generator(seed, epoch).permutation(_indices(self.rows))
            pieces = (order[at : min(at + piece, stop)] for at in range(first, stop, piece))
        else:
            pieces = _regroup(_block_order(self.rows, block_rows, seed, epoch, first), piece, stop - first)
        rank, ranks = share
        if ranks == 1:
            return (batch for rows in pieces for batch in self._cut(self._gather(rows), batch_size))
        return self._shares(pieces, batch_size, rank, ranks)

    def _shares(self, pieces: Iterator[Array | slice], size: int, rank: int, ranks: int) -> Iterator[Batch]:
        """A rank's part of each batch of the pieces."""
        for piece in pieces:
            rows = np.arange(piece.start, piece.stop) if isinstance(piece, slice) else piece
            begins = np.arange(0, len(rows), size)
            lengths = np.minimum(size, len(rows) - begins)
            starts, ends = begins + lengths * rank // ranks, begins + lengths * (rank + 1) // ranks
            gathered = self._gather(np.concatenate([rows[start:end] for start, end in zip(starts, ends)]))
            yield from self._cut(gathered, np.cumsum([0, *(ends - starts)]))

    def _gather(self, rows: Array | slice) -> "_Piece":
        """Copies of the given rows."""
        dense, ids = (np.array(self.arrays[file][rows]) for file in (folder.DENSE, folder.IDS))
        for n, number in enumerate(self._single):
            _forget(ids[:, n], self._known[number])
        labels = self.arrays[folder.LABEL][rows].astype(np.float32)
        weights = np.array(self.arrays[folder.WEIGHT][rows]) if folder.WEIGHT in self.arrays else None
        bags = []
        for number in self._multi:
            values, offsets = self.arrays[folder.values_file(number)], self.arrays[folder.offsets_file(number)]
            if isinstance(rows, slice):
                ends = np.array(offsets[rows.start : rows.stop + 1])
                gathered, ends = np.array(values[ends[0] : ends[-1]]), ends - ends[0]
            else:
                begins = offsets[rows]
                lengths = offsets[rows + 1] - begins
                ends = np.zeros(len(rows) + 1, np.int64)
                np.cumsum(lengths, out=ends[1:])
                gathered = values[np.repeat(begins - ends[:-1], lengths) + np.arange(ends[-1])]
            _forget(gathered, self._known[number])
            bags.append((gathered, ends))
        self.arrays.were_read(len(labels))
        return _Piece(dense, ids, labels, weights, bags)

    def _cut(self, piece: "_Piece", size: int | Array) -> Iterator[Batch]:
        """Batches of a piece: of `size` rows, or between the given bounds."""
        dense, ids, labels = (torch.from_numpy(np.asarray(array)) for array in piece[:3])
        weights = None if piece.weights is None else torch.from_numpy(piece.weights)
        bags = [(torch.from_numpy(np.asarray(values)), ends) for values, ends in piece.bags]
        bounds = [*range(0, len(labels), size), len(labels)] if isinstance(size, int) else size.tolist()
        for at, end in pairwise(bounds):
            yield Batch(
                _aligned(dense[at:end]),
                ids[at:end],
                tuple(
                    (values[ends[at] : ends[end]], torch.from_numpy(ends[at:end] - ends[at])) for values, ends in bags
                ),
                labels[at:end],
                None if weights is None else weights[at:end],
            )


def _forget(ids: Array, known: Array | None) -> None:
    """Set the ids that are not kept to 0, in place."""
    if known is not None:
        ids *= known[ids]


def _unknown(ids: Array, known: Array | None) -> int:
    return 0 if known is None else len(ids) - int(np.count_nonzero(known[ids]))


class _Piece(NamedTuple):
    """Rows in memory: bags as (values, offsets [n + 1]) for each multi-valued column."""

    dense: Array
    ids: Array
    labels: Array
    weights: Array | None
    bags: list[tuple[Array, Array]]


def _aligned(dense: torch.Tensor) -> torch.Tensor:
    """The same values where matrix products give the bits that they always give for them.

    For rows that begin at a different address modulo a cache line, some products sum in a different order: a batch's
    result would depend on its position in the gathered piece, and resumed runs or ranks' shards would differ from it.
    """
    return dense.clone() if dense.data_ptr() % 64 else dense


class _Arrays(Mapping[str, Array]):
    """The arrays of a split by file name, memory-mapped. Python keeps a descriptor per map, so where there are many
    arrays they are mapped again at each access.
    """

    def __init__(self, path: Path, described: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
        self._path, self._described = path, described
        kept = described if len(described) <= _MOST_MAPS else (folder.DENSE, folder.IDS, folder.LABEL)
        self._kept = {name: _map(path / name, *described[name]) for name in kept}
        self._read = 0

    def were_read(self, rows: int) -> None:
        """These many rows were read, anywhere: pages of the maps go back to the system before they are the whole split.

        They stay in its cache; a process that keeps them counts them as memory of its own.
        """
        self._read += rows * mmap.PAGESIZE * len(self._kept)
        if self._read > _MOST_RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            for array in self._kept.values():
                if isinstance(array, np.memmap):
                    array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def __getitem__(self, name: str) -> Array:
        if name not in self._kept:
            return _map(self._path / name, *self._described[name])
        array = self._kept[name]
        if isinstance(array, np.memmap):  # reading beyond the end of a file that was cut short ends the process
            _check_size(self._path / name, array._mmap.size(), array.nbytes)  # type: ignore[attr-defined]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    try:
        _check_size(path, path.stat().st_size, dtype.itemsize * math.prod(shape))
        return np.memmap(path, dtype, mode="r", shape=shape)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; prepare the data again") from None


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise UserError(
            f"{path} was changed while it was in use: it has {size:,} bytes, expected {expected:,}; prepare it again"
        )


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))


def _indices(count: int) -> Array:
    return np.arange(count, dtype=np.int32 if count < 2**31 - 1 else np.int64)


def _block_order(rows: int, block_rows: int, seed: int, epoch: int, first: int) -> Iterator[Array]:
    """Row numbers of the "block" order from position `first` on, one buffer of blocks after the other."""
    blocks = _generator(seed, epoch).permutation(-(-rows // block_rows))
    position = 0
    for number, at in enumerate(range(0, len(blocks), _BLOCKS_PER_BUFFER)):
        begins = blocks[at : at + _BLOCKS_PER_BUFFER] * block_rows
        lengths = np.minimum(block_rows, rows - begins)
        total = int(lengths.sum())
        if position + total > first:
            before = np.cumsum(lengths) - lengths
            order = np.repeat(begins - before, lengths) + np.arange(total)
            # Seeded per buffer, so that starting later needs none of the earlier ones.
            _generator(seed, epoch, 1 + number).shuffle(order)
            yield order[max(0, first - position) :]
        position += total


def _regroup(stream: Iterator[Array], size: int, total: int) -> Iterator[Array]:
    """The first `total` entries of the stream in arrays of exactly `size`; the last may be shorter."""
    held: list[Array] = []
    count = 0
    for array in stream:
        held.append(array[: total - count] if len(array) > total - count else array)
        count += len(held[-1])
        joined = np.concatenate(held)
        full = len(joined) // size * size
        yield from (joined[at : at + size] for at in range(0, full, size))
        held = [joined[full:]]
    if held and len(held[0]):
        yield held[0]
