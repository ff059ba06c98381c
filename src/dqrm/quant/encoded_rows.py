"""What the encoded storages of tables have in common: a float32 weight of torch whose only copy is codes."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import Weight

aten = torch.ops.aten
# Rows that pass through float32 at once.
_CHUNK = 1 << 16
_OPERATIONS: dict[Any, Callable[..., Any]] = {}


class EncodedRows(Tensor):
    """A float32 weight [R, dim], for `nn.Parameter` too, stored as codes and scales.

    It reads as float32: rows that are looked up (`index_select`, indexing by rows, `F.embedding`), `dequantize()`, and
    what it is copied into. It is written by `copy_`, `uniform_`, `normal_` and `zero_` (rounding to the nearest code),
    and by the optimizers of `dqrm.training.optimizers` (stochastic rounding). Slices along the rows share its memory.
    Gradients are float32, sparse or dense. Any other operation raises NotImplementedError: one on the whole weight
    would need the float32 copy that this storage avoids.

    A subclass says what its memory, `stored`, is, and how rows are read, written and divided.
    """

    kind: str
    """What its rows are called in messages."""

    @classmethod
    def _made(cls, rows: int, dim: int, device: torch.device) -> Any:
        # In inference mode as well: a view of a weight from outside has a version counter there, as any tensor's.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return torch.Tensor._make_wrapper_subclass(cls, (rows, dim), dtype=torch.float32, device=device)

    @property
    def stored(self) -> Tensor:
        """The memory; the subclass says dtype and shape."""
        stored: Tensor = self.__dict__["stored"]
        return stored

    @stored.setter
    def stored(self, stored: Tensor) -> None:  # of a file, too: kernels read what it says without looking
        self._check_layout(stored)
        if not stored.is_contiguous():
            raise ValueError("stored rows are not contiguous")
        self.__dict__["stored"] = stored
        self.check()

    @abstractmethod
    def _check_layout(self, stored: Tensor) -> None:
        """Raise ValueError unless dtype and shape are those of the memory of such a weight."""

    def check(self) -> None:
        """Raise ValueError where the content of the memory is none of such a weight."""

    @property
    def data(self) -> "EncodedRows":
        made: EncodedRows = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return made

    @data.setter
    def data(self, data: Tensor) -> None:  # torch's would leave the stored rows as they are
        if not isinstance(data, type(self)) or data.shape != self.shape:
            raise ValueError(
                f"the data of a table stored as {self.kind} rows are {self.kind} rows of its shape "
                f"{list(self.shape)}; use .copy_() to encode other values"
            )
        self.__dict__.update({name: data.__dict__[name] for name in data.detach().__dict__})  # not a parameter's own

    @property
    @abstractmethod
    def operand(self) -> Weight:
        """Its rows as the kernels take them."""

    @abstractmethod
    def part(self, start: int, stop: int) -> "EncodedRows":
        """These rows, in the same memory."""

    @abstractmethod
    def on(self, stored: Tensor) -> "EncodedRows":
        """The same rows of a copy of the memory."""

    @abstractmethod
    def encode_into(self, values: Tensor) -> None:
        """Write values float32 [R, dim], contiguous, to the nearest codes."""

    @abstractmethod
    def take_codes(self, other: Any) -> bool:
        """Copy the codes of a weight of the same class and shape, where that is possible; returns whether it was."""

    def same_codes(self, other: Any) -> bool:
        """Whether a weight of the same class and shape has the same memory content."""
        return torch.equal(self.stored, other.stored)

    @classmethod
    def refuse(cls, what: str) -> NotImplementedError:
        """The error that such a table `what`."""
        return NotImplementedError(f"a table stored as {cls.kind} rows {what}")

    def share_memory_(self) -> "EncodedRows":
        self.stored.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.stored.is_shared()

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise self.refuse("cannot be passed by DLPack; pass .stored, its bytes")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operation = _OPERATIONS.get(func)
        if operation is None:
            raise NotImplementedError(
                f"{func} is not available on a table stored as {cls.kind} rows; look rows up, use .dequantize() on a "
                "slice, or update it with an optimizer of dqrm, as SparseSGD or SparseAdagrad"
            )
        return operation(*args, **(kwargs or {}))


def read_rows(weight: EncodedRows, rows: Tensor) -> Tensor:
    """Rows int64 or int32 [N] as float32 [N, dim]."""
    if rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"row numbers are {rows.dtype}, expected torch.int64 or torch.int32")
    rows = rows.long()
    out = torch.empty(len(rows), weight.shape[1], device=weight.device)
    start = rows.new_zeros(1)
    wrong = kernels.lookup(
        rows.contiguous(), start, start + len(weight), weight.operand, None, (0, 0), out, rows.new_empty(len(rows))
    )
    if wrong >= 0:
        raise IndexError(f"row {int(rows[wrong])} is out of range for a weight of {len(weight)} rows")
    return out


def _chunks(weight: EncodedRows) -> Iterable[tuple[slice, EncodedRows]]:
    for start in range(0, len(weight), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, weight.part(start, min(start + _CHUNK, len(weight)))


def _implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATIONS.update(dict.fromkeys(functions, function))
        return function

    return register


@_implements(aten.detach.default, aten.alias.default)
def _same(weight: EncodedRows) -> EncodedRows:
    return weight.part(0, len(weight))


@_implements(aten.clone.default)
def _clone(weight: EncodedRows, memory_format: Any = None) -> EncodedRows:
    return weight.on(weight.stored.clone())


@_implements(aten._to_copy.default)
def _to_copy(weight: EncodedRows, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> EncodedRows:
    if dtype not in (None, torch.float32):
        raise weight.refuse(f"cannot become {dtype}; .dequantize() gives float32")
    return weight.on(weight.stored.to(device=device, copy=True))


@_implements(aten.view.default)
def _view(weight: EncodedRows, size: Any) -> EncodedRows:  # torch takes one of the same shape when it moves a module
    if list(size) != list(weight.shape):
        raise weight.refuse("cannot have another shape")
    return _same(weight)


@_implements(aten.slice.Tensor)
def _slice(
    weight: EncodedRows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> EncodedRows:
    if dim != 0 or step != 1:
        raise weight.refuse("can be sliced along its rows only, in steps of 1")
    first, last, _ = slice(start, end).indices(len(weight))
    return weight.part(first, max(first, last))


@_implements(aten.split.Tensor, aten.split_with_sizes.default)
def _split(weight: EncodedRows, sizes: Any, dim: int = 0) -> list[EncodedRows]:
    if dim != 0:
        raise weight.refuse("can be split along its rows only")
    count = len(weight)
    if isinstance(sizes, int):
        sizes = [min(sizes, count - start) for start in range(0, count, sizes)] or [0]
    if sum(sizes) != count:
        raise ValueError(f"the parts have {sum(sizes)} rows, expected {count}")
    return [weight.part(end - size, end) for end, size in zip(accumulate(sizes), sizes)]


@_implements(aten.index_select.default)
def _index_select(weight: EncodedRows, dim: int, rows: Tensor) -> Tensor:
    if dim != 0:
        raise NotImplementedError(f"of a table stored as {weight.kind} rows only rows can be selected")
    return read_rows(weight, rows)


@_implements(aten.index.Tensor)
def _index(weight: EncodedRows, indices: Any) -> Tensor:
    if len(indices) != 1 or indices[0].dtype not in (torch.int64, torch.int32):
        raise weight.refuse("can be indexed by row numbers (int64 or int32) only")
    given, count = indices[0], len(weight)
    outside = (given < -count) | (given >= count)
    if outside.any():
        raise IndexError(f"row {int(given[outside][0])} is out of range for a weight of {count} rows")
    rows = torch.where(given < 0, given + count, given)
    return read_rows(weight, rows.reshape(-1)).view(*rows.shape, weight.shape[1])


@_implements(aten.embedding.default)
def _embedding(weight: EncodedRows, indices: Tensor, *_: Any) -> Tensor:
    return read_rows(weight, indices.reshape(-1)).view(*indices.shape, weight.shape[1])


@_implements(aten.dequantize.self)
def _dequantize(weight: EncodedRows) -> Tensor:
    out = torch.empty(weight.shape, device=weight.device)
    _copy_to(out, weight)
    return out


def _copy_to(target: Tensor, weight: EncodedRows) -> None:
    for part, piece in _chunks(weight):
        target[part] = read_rows(piece, torch.arange(len(piece), device=weight.device)).to(target.device)


@_implements(aten.copy_.default)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if target.shape != source.shape:
        raise ValueError(f"cannot copy {list(source.shape)} into {list(target.shape)}: a table is not broadcast")
    if not isinstance(target, EncodedRows):
        assert isinstance(source, EncodedRows)
        _copy_to(target, source)
    elif type(source) is not type(target) or not target.take_codes(source):
        for part, piece in _chunks(target):
            values = source[part].detach()
            values = values.dequantize() if isinstance(values, EncodedRows) else values
            piece.encode_into(values.to(target.device, torch.float32).contiguous())
    return target


def _drawn(name: str) -> Callable[..., Tensor]:
    """`uniform_` and the like: chunk by chunk."""

    def draw(weight: EncodedRows, *args: Any, **kwargs: Any) -> Tensor:
        for _, piece in _chunks(weight):
            values = torch.empty(piece.shape, device=weight.device)
            piece.encode_into(getattr(values, name)(*args, **kwargs))
        return weight

    return draw


for _name in ("uniform_", "normal_", "zero_"):
    _implements(getattr(aten, _name).default)(_drawn(_name))


@_implements(aten.equal.default)
def _equal(one: Tensor, other: Tensor) -> bool:
    if not (isinstance(one, EncodedRows) and type(one) is type(other)):
        encoded = one if isinstance(one, EncodedRows) else other
        assert isinstance(encoded, EncodedRows)
        raise encoded.refuse("can be compared with another such table only")
    return one.shape == other.shape and one.same_codes(other)
