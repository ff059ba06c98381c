"""Tables stored in 8 bits: a weight whose only copy is INT8 codes with one scale per row.

A row is `dim` codes from -127 to 127, one byte of padding where `dim` is odd, and its scale in bf16, side by side, so
that a lookup reads one place in memory: dim + 2 bytes instead of 4 * dim. The scale is max|row| / 127, rounded up to
bf16. An update decodes a row, adds to it and encodes it again with stochastic rounding
(`kernels.add_rows_stochastic`), so that updates smaller than a step act on average.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels

aten = torch.ops.aten
# Rows that pass through float32 at once.
_CHUNK = 1 << 16
_OPERATIONS: dict[Any, Callable[..., Any]] = {}


def row_width(dim: int) -> int:
    """Bytes of a stored row of `dim` values."""
    return dim + dim % 2 + 2


class Int8Rows(Tensor):
    """A float32 weight [R, dim], for `nn.Parameter` too, stored as int8 rows.

    It reads as float32: rows that are looked up (`index_select`, indexing by rows, `F.embedding`), `dequantize()`, and
    what it is copied into. It is written by `copy_`, `uniform_`, `normal_` and `zero_` (rounding to the nearest code),
    and by the optimizers of `dqrm.training.optimizers` (stochastic rounding). Slices along the rows share its memory.
    Gradients are float32, sparse or dense. Any other operation raises NotImplementedError: one on the whole weight
    would need the float32 copy that this storage avoids.

    Args:
        stored: int8 [R, row_width(dim)], not copied.
        dim: values of a row.

    Raises:
        ValueError: `stored` has another dtype, another width, or is not contiguous.
    """

    @staticmethod
    def __new__(cls, stored: Tensor, dim: int) -> "Int8Rows":
        # In inference mode as well: a view of a weight from outside has a version counter there, as any tensor's.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            made: Int8Rows = torch.Tensor._make_wrapper_subclass(
                cls, (len(stored), dim), dtype=torch.float32, device=stored.device
            )
        made.stored = stored
        return made

    @property
    def stored(self) -> Tensor:
        """int8 [R, row_width(dim)]."""
        stored: Tensor = self.__dict__["stored"]
        return stored

    @stored.setter
    def stored(self, stored: Tensor) -> None:  # of a file, too: kernels read what it says without looking
        expected = [len(self), row_width(self.shape[1])]
        if stored.dtype != torch.int8 or list(stored.shape) != expected:
            raise ValueError(f"stored rows are {stored.dtype} {list(stored.shape)}, expected torch.int8 {expected}")
        if not stored.is_contiguous():
            raise ValueError("stored rows are not contiguous")
        self.__dict__["stored"] = stored

    @property
    def data(self) -> "Int8Rows":
        made: Int8Rows = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return made

    @data.setter
    def data(self, data: Tensor) -> None:  # torch's would leave the stored rows as they are
        if not isinstance(data, Int8Rows):
            raise ValueError(
                "the data of a table stored as INT8 rows are INT8 rows; use .copy_() to encode other values"
            )
        self.stored = data.stored

    def share_memory_(self) -> "Int8Rows":
        self.stored.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.stored.is_shared()

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a table stored as INT8 rows cannot be passed by DLPack; pass .stored, its bytes")

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> "Int8Rows":
        """Uninitialized rows."""
        return cls(torch.empty(rows, row_width(dim), dtype=torch.int8, device=device), dim)

    @classmethod
    def encode(cls, values: Tensor) -> "Int8Rows":
        """Floating-point values [R, dim] to the nearest codes."""
        rows, dim = values.shape
        made = cls.empty(rows, dim, values.device)
        made.copy_(values)
        return made

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["stored"], self.shape[1]

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dim: int, size: Any, stride: Any) -> "Int8Rows":
        return Int8Rows(inner["stored"], dim)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Rows({list(self.shape)}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operation = _OPERATIONS.get(func)
        if operation is None:
            raise NotImplementedError(
                f"{func} is not available on a table stored as INT8 rows; look rows up, use .dequantize() on a slice, "
                "or update it with an optimizer of dqrm, as SparseSGD or SparseAdagrad"
            )
        return operation(*args, **(kwargs or {}))


torch.serialization.add_safe_globals([Int8Rows])


def read_rows(weight: Int8Rows, rows: Tensor) -> Tensor:
    """Rows int64 or int32 [N] as float32 [N, dim]."""
    if rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"row numbers are {rows.dtype}, expected torch.int64 or torch.int32")
    stored, dim, rows = weight.stored, weight.shape[1], rows.long()
    out = torch.empty(len(rows), dim, device=stored.device)
    start = rows.new_zeros(1)
    wrong = kernels.lookup(
        rows.contiguous(), start, start + len(stored), stored, None, (0, 0), out, rows.new_empty(len(rows))
    )
    if wrong >= 0:
        raise IndexError(f"row {int(rows[wrong])} is out of range for a weight of {len(stored)} rows")
    return out


def _chunks(weight: Int8Rows) -> Iterable[tuple[slice, Int8Rows]]:
    for start in range(0, len(weight), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, Int8Rows(weight.stored[part], weight.shape[1])


def _implements(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATIONS.update(dict.fromkeys(functions, function))
        return function

    return register


@_implements(aten.detach.default, aten.alias.default)
def _same(weight: Int8Rows) -> Int8Rows:
    return Int8Rows(weight.stored, weight.shape[1])


@_implements(aten.clone.default)
def _clone(weight: Int8Rows, memory_format: Any = None) -> Int8Rows:
    return Int8Rows(weight.stored.clone(), weight.shape[1])


@_implements(aten._to_copy.default)
def _to_copy(weight: Int8Rows, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Int8Rows:
    if dtype not in (None, torch.float32):
        raise NotImplementedError(f"a table stored as INT8 rows cannot become {dtype}; .dequantize() gives float32")
    return Int8Rows(weight.stored.to(device=device, copy=True), weight.shape[1])


@_implements(aten.view.default)
def _view(weight: Int8Rows, size: Any) -> Int8Rows:  # torch takes one of the same shape when it moves a module
    if list(size) != list(weight.shape):
        raise NotImplementedError("a table stored as INT8 rows cannot have another shape")
    return _same(weight)


@_implements(aten.slice.Tensor)
def _slice(weight: Int8Rows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Int8Rows:
    if dim != 0 or step != 1:
        raise NotImplementedError("a table stored as INT8 rows can be sliced along its rows only, in steps of 1")
    return Int8Rows(aten.slice.Tensor(weight.stored, 0, start, end), weight.shape[1])


@_implements(aten.split.Tensor, aten.split_with_sizes.default)
def _split(weight: Int8Rows, sizes: Any, dim: int = 0) -> list[Int8Rows]:
    if dim != 0:
        raise NotImplementedError("a table stored as INT8 rows can be split along its rows only")
    return [Int8Rows(part, weight.shape[1]) for part in weight.stored.split(sizes)]


@_implements(aten.index_select.default)
def _index_select(weight: Int8Rows, dim: int, rows: Tensor) -> Tensor:
    if dim != 0:
        raise NotImplementedError("of a table stored as INT8 rows only rows can be selected")
    return read_rows(weight, rows)


@_implements(aten.index.Tensor)
def _index(weight: Int8Rows, indices: Any) -> Tensor:
    if len(indices) != 1 or indices[0].dtype not in (torch.int64, torch.int32):
        raise NotImplementedError("a table stored as INT8 rows can be indexed by row numbers (int64 or int32) only")
    given, count = indices[0], len(weight)
    outside = (given < -count) | (given >= count)
    if outside.any():
        raise IndexError(f"row {int(given[outside][0])} is out of range for a weight of {count} rows")
    rows = torch.where(given < 0, given + count, given)
    return read_rows(weight, rows.reshape(-1)).view(*rows.shape, weight.shape[1])


@_implements(aten.embedding.default)
def _embedding(weight: Int8Rows, indices: Tensor, *_: Any) -> Tensor:
    return read_rows(weight, indices.reshape(-1)).view(*indices.shape, weight.shape[1])


@_implements(aten.dequantize.self)
def _dequantize(weight: Int8Rows) -> Tensor:
    out = torch.empty(weight.shape, device=weight.device)
    _copy_to(out, weight)
    return out


def _copy_to(target: Tensor, weight: Int8Rows) -> None:
    for part, piece in _chunks(weight):
        target[part] = read_rows(piece, torch.arange(len(piece), device=weight.device)).to(target.device)


@_implements(aten.copy_.default)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if target.shape != source.shape:
        raise ValueError(f"cannot copy {list(source.shape)} into {list(target.shape)}: a table is not broadcast")
    if not isinstance(target, Int8Rows):
        assert isinstance(source, Int8Rows)
        _copy_to(target, source)
    elif isinstance(source, Int8Rows):
        target.stored.copy_(source.stored)
    else:
        for part, piece in _chunks(target):
            values = source[part].detach().to(target.device, torch.float32).contiguous()
            kernels.encode_int8_rows(values, piece.stored)
    return target


def _drawn(name: str) -> Callable[..., Tensor]:
    """`uniform_` and the like: chunk by chunk."""

    def draw(weight: Int8Rows, *args: Any, **kwargs: Any) -> Tensor:
        for _, piece in _chunks(weight):
            values = torch.empty(piece.shape, device=weight.device)
            kernels.encode_int8_rows(getattr(values, name)(*args, **kwargs), piece.stored)
        return weight

    return draw


for _name in ("uniform_", "normal_", "zero_"):
    _implements(getattr(aten, _name).default)(_drawn(_name))


@_implements(aten.equal.default)
def _equal(one: Tensor, other: Tensor) -> bool:
    if not (isinstance(one, Int8Rows) and isinstance(other, Int8Rows)):
        raise NotImplementedError("a table stored as INT8 rows can be compared with another such table only")
    return one.shape == other.shape and torch.equal(one.stored, other.stored)
