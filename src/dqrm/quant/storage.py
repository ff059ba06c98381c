"""Storage formats of the tables' master weights: read rows as float32, add to rows, their largest magnitude.

A storage is a dtype with these operations. To add one: subclass `Storage` and enter it in `config.STORAGES`; its name
is then a `table_dtype`, and modules and optimizers take weights that are stored so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import TableRanges
from dqrm.quant.config import STORAGES, registered
from dqrm.quant.int8_rows import Int8Rows, row_width

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
    def row_bytes(cls, dim: int) -> int:
        """Bytes of a row of `dim` values."""
        return cls.dtype.itemsize * dim

    @staticmethod
    def memory(weight: Tensor) -> Tensor:
        """The plain tensor that holds a weight: what kernels, files and collectives take."""
        return weight.detach()

    @staticmethod
    def of_memory(memory: Tensor, dim: int) -> Tensor:
        """The inverse: the weight of `dim` values per row that such a tensor holds, not copied."""
        return memory

    @staticmethod
    def read(weight: Tensor) -> Tensor:
        """All values as float32 [rows, dim]: for some rows at a time, since it may be a copy."""
        return weight.detach().float()

    @staticmethod
    def gather(weight: Tensor, rows: Tensor) -> Tensor:
        """Rows int64 [N] of a weight as float32 [N, dim], without a gradient."""
        return weight.detach().index_select(0, rows).float()

    @staticmethod
    def lookup(weight: Tensor, rows: Tensor, sparse: bool) -> Tensor:
        """The same with a gradient for the weight, sparse or dense."""
        return F.embedding(rows, weight, sparse=sparse).float()

    largest = staticmethod(max_abs)

    @classmethod
    def raise_scales(cls, weight: Tensor, rows: Tensor, ranges: TableRanges) -> None:
        """Raise the scales of tables in the weight, in place, to what its rows int64 [N] need."""
        kernels.raise_scales(rows, cls.memory(weight), ranges)

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
        raise ValueError(f"the weight is {weight.dtype}, expected {_known()} for sparse updates")


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


class INT8(Storage):
    """INT8 codes with a scale per row (`Int8Rows`), a quarter of the memory; updates round stochastically."""

    dtype = torch.int8
    rounds = True
    row_bytes = staticmethod(row_width)

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> Tensor:
        return Int8Rows.empty(rows, dim, device)

    @staticmethod
    def of_memory(memory: Tensor, dim: int) -> Tensor:
        return Int8Rows(memory, dim)

    @staticmethod
    def memory(weight: Tensor) -> Tensor:
        assert isinstance(weight, Int8Rows)
        return weight.stored

    @staticmethod
    def read(weight: Tensor) -> Tensor:
        return weight.detach().dequantize()

    @classmethod
    def largest(cls, weight: Tensor) -> Tensor:
        """max|weight| as a float32 scalar tensor, without decoding all of it at once."""
        blocks = -(-len(weight) // _BLOCK)
        dirty = torch.ones(blocks, dtype=torch.uint8, device=weight.device)
        maxima = torch.zeros(blocks, device=weight.device)
        return torch.tensor(kernels.blocks_max(cls.memory(weight), _BLOCK, dirty, maxima), device=weight.device)

    @classmethod
    def add(
        cls, weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None
    ) -> bool:
        """Each row is decoded, added to, and encoded again on the scale that it then needs (`add_rows_stochastic`)."""
        if values.shape != (len(rows), weight.shape[1]):  # the stored rows may be one byte longer
            raise ValueError(f"values are {list(values.shape)}, expected [{len(rows)}, {weight.shape[1]}]")
        kernels.add_rows_stochastic(cls.memory(weight), rows, values, factor, seed, ranges)
        torch.autograd.graph.increment_version(weight)
        return ranges is not None


def storage_for(dtype: torch.dtype) -> type[Storage]:
    """The registered storage of a dtype; of one that is not registered, the base, which can only be read."""
    for name in STORAGES:
        storage: type[Storage] = registered(name, STORAGES)
        if storage.dtype == dtype:
            return storage
    return Storage


def new_weight(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized weight [rows, dim] in the registered storage of a dtype.

    Raises:
        ValueError: there is none.
    """
    storage = storage_for(dtype)
    if storage is Storage:
        raise ValueError(f"dtype is {dtype}, expected {_known()}")
    return storage.empty(rows, dim)


def _known() -> str:
    return " or ".join(str(registered(name, STORAGES).dtype) for name in STORAGES)


def storage_of(weight: Tensor) -> type[Storage]:
    """The storage of a weight."""
    if isinstance(weight, Int8Rows):
        return INT8
    return Storage if weight.dtype == torch.int8 else storage_for(weight.dtype)  # int8 alone is no weight, but codes


@torch.no_grad()
def copy_rows(target: Tensor, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
    """target[rows] = source[source_rows] in place, for weights [R, dim] of any two storages and rows int64 [N].

    Bit for bit where the storages are the same, else rounded to the nearest value. No row of the target twice.
    """
    storage, given, dim = storage_of(target), storage_of(source), target.shape[1]
    step = max(1, _COPIED // max(1, dim))
    for part, source_part in zip(rows.split(step), source_rows.split(step)):
        if storage is given:
            memory = given.memory(source).index_select(0, source_part)
        else:
            encoded = storage.empty(len(part), dim, source.device)
            encoded.copy_(given.gather(source, source_part))
            memory = storage.memory(encoded)
        storage.memory(target).index_copy_(0, part, memory.to(target.device))
