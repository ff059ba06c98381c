"""Storage formats of the tables' master weights: read rows as float32, add to rows, their largest magnitude.

A storage is a dtype with these operations. To add one: subclass `Storage` and enter it in `config.STORAGES`; its name
is then a `table_dtype`, and modules and optimizers take weights that are stored so.
"""

from collections.abc import Iterator
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import TableRanges, Weight
from dqrm.quant.config import HOT_ROWS, STORAGES, registered
from dqrm.quant.encoded_rows import EncodedRows
from dqrm.quant.int8_rows import Int8Rows, row_width
from dqrm.quant.tiered_rows import TieredRows, slots_for, words_for

# Rows per block of the largest magnitude of int8 rows.
_BLOCK = 1 << 10
# Rows read at once: torch may copy what it reduces.
_CHUNK = 1 << 20
# Values copied from one weight to another at once.
_COPIED = 1 << 22


def max_abs(weight: Tensor) -> Tensor:
    """max|weight| as a float32 scalar tensor, in one pass and without a copy of `weight`."""
    if weight.numel() == 0:
        return torch.zeros((), device=weight.device)
    pieces = [torch.stack(torch.aminmax(piece)) for piece in weight.split(_CHUNK)]
    low, high = pieces[0] if len(pieces) == 1 else torch.stack(pieces).unbind(1)
    return torch.maximum(-low.amin(), high.amax()).float()


class Storage:
    """Weights [rows, dim] of any floating-point dtype: they can be read, but have no sparse updates."""

    dtype: torch.dtype
    rounds = False
    """Whether adding rounds at random: rows must not repeat then, and each update needs another seed."""

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> Tensor:
        """An uninitialized weight [rows, dim]."""
        return torch.empty(rows, dim, dtype=cls.dtype, device=device)

    @classmethod
    def encode(cls, values: Tensor) -> Tensor:
        """Floating-point values [R, dim], rounded to what is nearest."""
        rows, dim = values.shape
        made = cls.empty(rows, dim, values.device)
        made.copy_(values)
        return made

    @classmethod
    def with_hot_rows(cls, hot_rows: float) -> "type[Storage]":
        """This storage with at most such a share of the rows in its finer tier; itself, if it has no tiers."""
        return cls

    @classmethod
    def layout(cls, rows: int, dim: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `memory`."""
        return (rows, dim), cls.dtype

    @classmethod
    def memory_bytes(cls, rows: int, dim: int) -> int:
        """Bytes of `memory`."""
        shape, dtype = cls.layout(rows, dim)
        return prod(shape) * dtype.itemsize

    @staticmethod
    def memory(weight: Tensor) -> Tensor:
        """The plain tensor that holds a weight: what files and collectives take."""
        return weight.detach()

    @staticmethod
    def of_memory(memory: Tensor, rows: int, dim: int) -> Tensor:
        """The inverse: the weight [rows, dim] that such a tensor holds, not copied.

        Raises:
            ValueError: it does not hold one.
        """
        return memory

    @staticmethod
    def check(weight: Tensor) -> None:
        """Raise ValueError where memory that was filled from a file holds no weight."""

    @classmethod
    def operand(cls, weight: Tensor) -> Weight:
        """What kernels take: a weight's rows, or those of a slice."""
        return cls.memory(weight)

    @staticmethod
    def read(weight: Tensor) -> Tensor:
        """All values as float32 [rows, dim]: for some rows at a time, since it may be a copy."""
        return weight.detach().float()

    @staticmethod
    def gather(weight: Tensor, rows: Tensor) -> Tensor:
        """Rows int64 [N] of a weight as float32 [N, dim], without a gradient."""
        return weight.detach().index_select(0, rows).float()

    @classmethod
    def put(cls, weight: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
        """weight[rows] = source[source_rows] in place, as `copy_rows`."""
        given = storage_of(source)
        if cls is given:
            memory = given.memory(source).index_select(0, source_rows)
        else:
            memory = cls.memory(cls.encode(given.gather(source, source_rows)))
        cls.memory(weight).index_copy_(0, rows, memory.to(weight.device))

    @staticmethod
    def lookup(weight: Tensor, rows: Tensor, sparse: bool) -> Tensor:
        """The same with a gradient for the weight, sparse or dense."""
        return F.embedding(rows, weight, sparse=sparse).float()

    largest = staticmethod(max_abs)

    @classmethod
    def raise_scales(cls, weight: Tensor, rows: Tensor, ranges: TableRanges) -> None:
        """Raise the scales of tables in the weight, in place, to what its rows int64 [N] need."""
        kernels.raise_scales(rows, cls.operand(weight), ranges)

    @classmethod
    def update(
        cls, weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None
    ) -> tuple[bool, Tensor | None]:
        """As `add`; also returns the other rows that it changed, int64 [M], if it may change others."""
        return cls.add(weight, rows, values, factor, seed, ranges), None

    @staticmethod
    def add(weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None) -> bool:
        """weight[rows[i]] += factor * values[i] in place.

        Args:
            rows: int64 [N]. values: float32 [N, dim]. seed: of random rounding, below 2**32.
            ranges: scales of the tables in the weight, which it may raise to what the rows then need.

        Returns:
            Whether it has raised them.

        Raises:
            ValueError: this dtype has no such update.
        """
        raise ValueError(f"the weight is {weight.dtype}, expected {dtypes_of(Storage)} for sparse updates")


class FP32(Storage):
    """float32."""

    dtype = torch.float32

    @staticmethod
    def add(weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None) -> bool:
        """Rows may repeat; they are added in their order."""
        kernels.add_rows(weight, rows, values, factor, ranges)
        return ranges is not None


class BF16(Storage):
    """bfloat16 with stochastic rounding: half the memory."""

    dtype = torch.bfloat16
    rounds = True

    @staticmethod
    def add(weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None) -> bool:
        """Each sum goes up or down with the probability of its distance (`add_rows_stochastic`)."""
        kernels.add_rows_stochastic(weight, rows, values, factor, seed, ranges)
        return ranges is not None


class Encoded(Storage):
    """Base of storages in codes; updates round stochastically."""

    rounds = True
    weight_class: type[EncodedRows]
    """The class of its weights."""

    @staticmethod
    def memory(weight: Tensor) -> Tensor:
        assert isinstance(weight, EncodedRows)
        return weight.stored

    @classmethod
    def operand(cls, weight: Tensor) -> Weight:
        assert isinstance(weight, EncodedRows)
        return weight.operand

    @staticmethod
    def read(weight: Tensor) -> Tensor:
        return weight.detach().dequantize()

    @classmethod
    def largest(cls, weight: Tensor) -> Tensor:
        """max|weight| as a float32 scalar tensor, without decoding all of it at once."""
        blocks = -(-len(weight) // _BLOCK)
        dirty = torch.ones(blocks, dtype=torch.uint8, device=weight.device)
        maxima = torch.zeros(blocks, device=weight.device)
        return torch.tensor(kernels.blocks_max(cls.operand(weight), _BLOCK, dirty, maxima), device=weight.device)

    @classmethod
    def add(
        cls, weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None
    ) -> bool:
        """Each row is decoded, added to, and encoded again on the scale that it then needs."""
        return cls.update(weight, rows, values, factor, seed, ranges)[0]


class INT8(Encoded):
    """INT8 codes with a scale per row (`Int8Rows`), a quarter of the memory."""

    dtype = torch.int8
    weight_class = Int8Rows

    @classmethod
    def layout(cls, rows: int, dim: int) -> tuple[tuple[int, ...], torch.dtype]:
        return (rows, row_width(dim)), torch.int8

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> Tensor:
        return Int8Rows.empty(rows, dim, device)

    @staticmethod
    def of_memory(memory: Tensor, rows: int, dim: int) -> Tensor:
        return Int8Rows(memory, dim)

    @classmethod
    def update(
        cls, weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None
    ) -> tuple[bool, Tensor | None]:
        """See `add_rows_stochastic`."""
        if values.shape != (len(rows), weight.shape[1]):  # the stored rows may be one byte longer
            raise ValueError(f"values are {list(values.shape)}, expected [{len(rows)}, {weight.shape[1]}]")
        kernels.add_rows_stochastic(cls.memory(weight), rows, values, factor, seed, ranges)
        torch.autograd.graph.increment_version(weight)
        return ranges is not None, None


class INT4(Encoded):
    """INT4 codes with a scale per row, and INT8 codes for the rows that are updated most often (`TieredRows`)."""

    dtype = torch.int4  # type: ignore[attr-defined]
    weight_class = TieredRows
    hot_rows = HOT_ROWS

    @classmethod
    def with_hot_rows(cls, hot_rows: float) -> "type[Storage]":
        return _sharing(hot_rows)

    @classmethod
    def layout(cls, rows: int, dim: int) -> tuple[tuple[int, ...], torch.dtype]:
        return (words_for(rows, dim, slots_for(rows, cls.hot_rows)),), torch.int32

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> Tensor:
        return TieredRows.empty(rows, dim, device, cls.hot_rows)

    @staticmethod
    def of_memory(memory: Tensor, rows: int, dim: int) -> Tensor:
        return TieredRows(memory, rows, dim)

    @staticmethod
    def check(weight: Tensor) -> None:
        assert isinstance(weight, TieredRows)
        weight.check()

    @classmethod
    def put(cls, weight: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
        assert isinstance(weight, TieredRows)
        weight.write_from(rows, source, source_rows)

    @classmethod
    def update(
        cls, weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None
    ) -> tuple[bool, Tensor | None]:
        """See `update_tiers`; the other rows are those that lost their place in the finer tier.

        Raises:
            ValueError: the weight is a slice.
        """
        assert isinstance(weight, TieredRows)
        if not weight.whole:
            raise ValueError(f"{len(weight)} rows of a table stored as INT4 rows are updated alone, expected all of it")
        moved = kernels.update_tiers(weight.operand, rows, values, factor, seed, ranges)
        torch.autograd.graph.increment_version(weight)
        return ranges is not None, moved


@cache
def _sharing(hot_rows: float) -> type[INT4]:
    return INT4 if hot_rows == HOT_ROWS else type("INT4", (INT4,), {"hot_rows": hot_rows, "__doc__": INT4.__doc__})


def storage_for(dtype: torch.dtype | type[Storage]) -> type[Storage]:
    """The registered storage of a dtype; of one that is not registered, the base, which can only be read.

    A storage is its own.
    """
    if isinstance(dtype, type):
        return dtype
    return next((storage for storage in _storages() if storage.dtype == dtype), Storage)


def _storages() -> Iterator[type[Storage]]:
    return (registered(name, STORAGES) for name in STORAGES)


def new_weight(rows: int, dim: int, dtype: torch.dtype | type[Storage]) -> Tensor:
    """An uninitialized weight [rows, dim] in the registered storage of a dtype.

    Raises:
        ValueError: there is none.
    """
    storage = storage_for(dtype)
    if storage is Storage:
        raise ValueError(f"dtype is {dtype}, expected {dtypes_of(Storage)}")
    return storage.empty(rows, dim)


def dtypes_of(base: type[Storage]) -> str:
    """The dtypes of registered storages of this base, as a message names them."""
    return " or ".join(str(storage.dtype) for storage in _storages() if issubclass(storage, base))


def storage_of(weight: Tensor) -> type[Storage]:
    """The storage of a weight."""
    if isinstance(weight, EncodedRows):
        return _encoded(type(weight))
    return storage_for(weight.dtype) if weight.is_floating_point() else Storage  # integers alone are no weight


@cache
def _encoded(kind: type[EncodedRows]) -> type[Storage]:
    return next(each for each in _storages() if issubclass(each, Encoded) and issubclass(kind, each.weight_class))


@torch.no_grad()
def copy_rows(target: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """target[rows] = source[source_rows] in place, for weights [R, dim] of any two storages and rows int64 [N].

    Bit for bit where the storages are the same, else rounded to the nearest value; in tiers, bit for bit in the tier
    that has a place (`TieredRows.write_from`). No row of the target twice.
    """
    if isinstance(target, TieredRows) and isinstance(source, TieredRows):
        target.take_slots(rows, source, source_rows)
    step = max(1, _COPIED // max(1, target.shape[1]))
    for part, source_part in zip(rows.split(step), source_rows.split(step)):
        storage_of(target).put(target, part, source, source_part)
