"""All operations in compiled C (`kernels.c`, `blocks.c`), on all of torch's threads; memory is passed as pointers."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqrm.kernels import plain
from dqrm.kernels.build import library
from dqrm.kernels.layout import Blocks, GroupMap, IdleCourse, Limits, TableRanges

_PLAIN = (Tensor, nn.Parameter)
_F32, _I64, _U8 = (torch.float32,), (torch.int64,), (torch.uint8,)
_FLOATS, _IDS = (torch.float32, torch.bfloat16), (torch.int64, torch.int32)
_ROWS = (*_FLOATS, torch.int8)
_STORED = (torch.int8, torch.bfloat16, torch.float32)
_KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}
# Valid tensors of each operation, in the order in which `kernels` passes them to `takes`.
_DTYPES: dict[str, Any] = {
    "lookup": (_IDS, _ROWS, _F32),
    "lookup_packed": (_IDS, _U8, _F32, (torch.int32,)),
    "add_rows": (_F32, _I64, _F32, _F32),
    "add_rows_stochastic": ((torch.bfloat16, torch.int8), _I64, _F32, _F32),
    "encode_int8_rows": (_F32, (torch.int8,)),
    "sum_duplicates": (_I64, _F32),
    "raise_scales": (_I64, _ROWS, _F32, _I64),
    "blocks_max": (_ROWS, _U8, _F32),
    "idle_adam": (_F32, _F32, _F32, (torch.int32,), _F32, _F32, _F32),
    "quantize_weights": repeat(_F32),
    "finish_linear": ((torch.bfloat16,), _F32, _F32),
    "start_linear": (_FLOATS, _FLOATS, _F32),
    "interact": (_FLOATS, _F32),
    "block_scales": (_F32, _F32, _I64),
    "quantize_blocks": (_F32, _F32, _I64, _F32, (torch.int8,)),
    "cast_blocks": (_F32, _F32, _I64, _FLOATS),
    "decode_blocks": (_F32, _STORED, _I64, _F32),
    "pack_nibbles": ((torch.int8,),),
    "unpack_nibbles": (_U8,),
    "encode_rows": (_I64, _F32, _F32, _I64),
    "decode_rows": (_U8, _I64),
}


def takes(operation: str, *tensors: Tensor | None) -> bool:
    """Whether these are on the CPU, contiguous and of the operation's dtypes, and the library is available."""
    for tensor, dtypes in zip(tensors, _DTYPES[operation]):
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype in dtypes and tensor.is_contiguous()
        ):
            return False
    return library() is not None


# Each kernel's arguments, then what it returns: pointer, int, 64-bit int, float, 32-bit unsigned, nothing.
_TYPES: dict[str, Any] = {"p": c_void_p, "i": c_int, "l": c_int64, "f": c_float, "u": c_uint32, "-": None}
_PROTOTYPES = {
    "lookup": "pillpppilpiippppipplpii l",
    "lookup_packed": "pillpppilpppipi l",
    "outside": "plli l",
    "add_rows": "plpplfplpippii -",
    "add_rows_stochastic": "plpplfuplpippii -",
    "add_rows_int8": "plpplfuplpippii i",
    "encode_int8": "pllpi -",
    "sum_duplicates": "ppllpppi l",
    "raise_scales": "plplpilpippii -",
    "blocks_max": "pilllppi u",
    "idle_adam": "pppplllpplpffffffi -",
    "quantize_weights": "pplppi -",
    "finish_linear": "pllplpii -",
    "start_linear": "ppillplpppi -",
    "interact": "piplllipli i",
    "interact_backward": "ppiplllilppi i",
    "block_scales": "pplpppipi -",
    "quantize_blocks": "pplpppppiiiupi -",
    "cast_blocks": "pplppppiiupi -",
    "decode_blocks": "piplppppii -",
    "pack_nibbles": "plpi -",
    "unpack_nibbles": "plpi -",
    "encode_rows": "ppllppliiipiuppi i",
    "decode_rows": "pllppliiippi i",
}
_functions: dict[str, Any] = {}


def _call(name: str, *arguments: Any) -> Any:
    """One kernel; tensors are passed as pointers, None as a null pointer."""
    function = _functions.get(name)
    if function is None:
        function = getattr(library(), f"dqrm_{name}")
        arguments_of, result = _PROTOTYPES[name].split()
        function.argtypes, function.restype = [_TYPES[letter] for letter in arguments_of], _TYPES[result]
        _functions[name] = function  # last: another thread may take it at once
    return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], torch.get_num_threads())


def _format(weight: Tensor) -> tuple[int, int]:
    """Of a weight's rows (`ROW_FLOAT` ... in common.h), and the values of a row; of int8 rows with padding."""
    if weight.dtype == torch.int8:
        return 2, weight.shape[1] - 2
    return int(weight.dtype == torch.bfloat16), weight.shape[1]


def _half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


# ---- tables


def lookup(
    ids: Tensor, starts: Tensor, table_rows: Tensor, weight: Tensor, scale: Tensor | None, limits: Limits, out: Tensor,
    rows_out: Tensor, clamped: Tensor | None = None, raising: bool = False, dirty: Tensor | None = None,
    dirty_starts: Tensor | None = None, block: int = 1, groups: GroupMap | None = None,
) -> int:  # fmt: skip
    low_high_highs = (*limits, None) if isinstance(limits, tuple) else (0, 0, limits)
    wrong: int = _call(
        "lookup", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, weight,
        _format(weight)[0], out.shape[1], scale, *low_high_highs, out, rows_out, clamped, raising, dirty,
        dirty_starts, block, *_blocks_of(groups),
    )  # fmt: skip
    return wrong


def _blocks_of(groups: GroupMap | None) -> tuple[Tensor | None, int]:
    return (None, 0) if groups is None else (groups.first, groups.shift)


def lookup_packed(
    ids: Tensor, starts: Tensor, table_rows: Tensor, codes: Tensor, bits: int, scale: Tensor, dim: int,
    zero_point: Tensor | None = None, groups: GroupMap | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    out = torch.empty(ids.numel(), dim)
    return out, _call(
        "lookup_packed", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, codes, bits,
        dim, scale, zero_point, *_blocks_of(groups), out,
    )  # fmt: skip


def _before_update(weight: Tensor, rows: Tensor, values: Tensor) -> None:
    """Refuse writes outside the weight; tell torch's version counter of the write, which it cannot see."""
    dim = _format(weight)[1]
    if values.shape != (len(rows), dim) and not (weight.dtype == torch.int8 and values.shape == (len(rows), dim - 1)):
        raise ValueError(f"values are {list(values.shape)}, expected [{len(rows)}, {dim}]")
    wrong = _call("outside", rows, len(rows), len(weight))
    if wrong >= 0:
        raise IndexError(f"row {int(rows[wrong])} is outside a weight of {len(weight)} rows")
    torch.autograd.graph.increment_version(weight)


def _watched(ranges: TableRanges | None) -> tuple[Any, ...]:
    """(starts, tables, scale, the highest code of all of them, those of each, blocks that share a scale)"""
    if ranges is None:
        return None, 0, None, 0, None, None, 0
    highest: Any = ranges.highest
    codes = (0, highest) if isinstance(highest, Tensor) else (highest, None)
    return ranges.starts, len(ranges.starts), ranges.scale, *codes, *_blocks_of(ranges.groups)


def add_rows(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float = 1.0, ranges: TableRanges | None = None
) -> Tensor:
    _before_update(weight, rows, values)
    _call("add_rows", weight, weight.shape[1], rows, values, len(rows), factor, *_watched(ranges))
    return weight


def add_rows_stochastic(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    _before_update(weight, rows, values)
    name = "add_rows_int8" if weight.dtype == torch.int8 else "add_rows_stochastic"
    if _call(name, weight, values.shape[1], rows, values, len(rows), factor, seed, *_watched(ranges)):
        raise MemoryError("updating rows needs more memory than is available")
    return weight


def encode_int8_rows(values: Tensor, out: Tensor) -> None:
    _call("encode_int8", values, *values.shape, out)


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    unique, sums = torch.empty_like(rows), torch.empty_like(values)
    count = _call("sum_duplicates", rows, values, *values.shape, unique, sums, rows.new_empty(2 * len(rows)))
    if count < 0:  # rows or their number do not fit the sort keys
        return plain.sum_duplicates(rows, values)
    return unique[:count], sums[:count]


def raise_scales(rows: Tensor, weight: Tensor, ranges: TableRanges) -> None:
    starts, tables, *scale = _watched(ranges)
    _call("raise_scales", rows, len(rows), starts, tables, weight, *_format(weight), *scale)


def blocks_max(table: Tensor, block: int, dirty: Tensor, maxima: Tensor) -> float:
    kind, dim = _format(table)
    bits = _call("blocks_max", table, kind, len(table), dim, block, dirty, maxima)
    return ctypes.c_float.from_buffer(c_uint32(bits)).value


def idle_adam(weight: Tensor, first: Tensor, second: Tensor, last: Tensor, now: int, course: IdleCourse) -> None:
    _call(
        "idle_adam", weight, first, second, last, *weight.shape, now, course.alpha, course.root, course.stride,
        course.powers, course.beta1, 1 - course.beta1, course.eps, course.l2, course.gamma, course.most,
    )  # fmt: skip


# ---- linear layers


_spare: dict[int, list[Any]] = {}


class _Lent(np.ndarray):
    """Memory that returns to `_spare` when the last tensor on it is freed."""

    def __del__(self, spare: dict[int, list[Any]] = _spare) -> None:
        if len(kept := spare.setdefault(len(self), [])) < 4:
            kept.append(self.base)
        if len(spare) > 8:
            spare.clear()


def _lend(size: int) -> Tensor:
    """uint8 [size], reused later: allocating a megabyte costs more than writing to it, page by page."""
    try:
        memory = _spare[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(size, np.uint8)
    return torch.from_numpy(memory.view(_Lent))


def quantize_weights(
    weights: Sequence[Tensor], formats: Sequence[tuple[bool, int, bool]]
) -> list[tuple[Tensor, Tensor]]:
    plan, size, scales, places = _plan(tuple([weight.shape for weight in weights]), tuple(formats))
    memory, scale = _lend(size or 64), torch.empty(sum(scales))  # no view is taken of nothing
    pointers = (c_void_p * len(weights))(*[weight.data_ptr() for weight in weights])
    _call("quantize_weights", pointers, plan, len(weights), scale, memory)
    views = {dtype: memory.view(dtype) for dtype in {dtype for dtype, *_ in places}}
    used = [views[dtype].as_strided(shape, stride, at) for dtype, shape, stride, at in places]
    return list(zip(used, scale.split_with_sizes(scales)))


@functools.lru_cache(64)
def _plan(
    shapes: tuple[torch.Size, ...], formats: tuple[tuple[bool, int, bool], ...]
) -> tuple[Any, int, list[int], Any]:
    """The kernel's arguments, the bytes of memory it needs, the number of each weight's scales, and the layout of its
    values: (dtype, shape, stride, offset)."""
    plan: list[int] = []
    places = []
    scales: list[int] = []
    at = 0
    for (outputs, inputs), (per_channel, highest, codes) in zip(shapes, formats):
        plan += (outputs, inputs, per_channel, highest, codes, at, sum(scales))
        dtype, size = (torch.bfloat16, 2) if codes else (torch.float32, 4)
        scales.append(outputs if per_channel else 1)
        places.append((dtype, (outputs, inputs), (inputs, 1), at // size))
        at += outputs * inputs * size + 63 & ~63
    return (c_int64 * len(plan))(*plan), at, scales, places


def finish_linear(y: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> Tensor:
    _call("finish_linear", y, *y.shape, scale, len(scale), bias, relu)
    return y


def start_linear(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    masked, bias_grad = torch.empty_like(grad), grad.new_empty(grad.shape[1], dtype=torch.float32)
    scaled = None if scale is None else torch.empty_like(grad)
    scales = 0 if scale is None else len(scale)
    _call("start_linear", grad, y, _half(grad), *grad.shape, scale, scales, masked, scaled, bias_grad)
    return masked, masked if scaled is None else scaled, bias_grad


# ---- interaction


class _Interact(torch.autograd.Function):
    """The pairs' products without the full matrix of products; sums in FP32."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor | None, tables: Tensor, self_interaction: bool, width: int) -> Tensor:
        ctx.save_for_backward(dense, tables)
        ctx.self_interaction = self_interaction
        out = tables.new_empty(len(tables), width, dtype=tables.dtype if dense is None else dense.dtype)
        if _call("interact", dense, _half(dense), tables, *tables.shape, self_interaction, out, width):
            raise MemoryError("the interaction needs more memory than is available")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (dense, tables), grad = ctx.saved_tensors, grads[0].contiguous()
        grad_dense = None if dense is None else torch.empty_like(dense)
        grad_tables = torch.empty_like(tables)
        if _call(
            "interact_backward", grad, dense, _half(dense), tables, *tables.shape, ctx.self_interaction, grad.shape[1],
            grad_dense, grad_tables,
        ):  # fmt: skip
            raise MemoryError("the interaction's gradient needs more memory than is available")
        return grad_dense, grad_tables, None, None


def interact(dense: Tensor | None, tables: Tensor, pairs: Tensor, self_interaction: bool) -> Tensor:
    width = len(pairs) + (0 if dense is None else dense.shape[1])
    out: Tensor = _Interact.apply(dense, tables, self_interaction, width)
    return out


# ---- blocks and messages


def block_scales(x: Tensor, blocks: Blocks, bits: int, residual: Tensor | None = None) -> Tensor:
    scale = torch.empty(len(blocks))
    highest = plain.limits(bits)[1]
    _call("block_scales", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, highest, scale)
    return scale


def quantize_blocks(
    x: Tensor, blocks: Blocks, scale: Tensor, bits: int, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty(blocks.total, dtype=torch.int8) if out is None else out
    _call(
        "quantize_blocks", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, blocks.offsets, scale,
        *plain.limits(bits), seed is not None, seed or 0, out,
    )  # fmt: skip
    return out


def cast_blocks(
    x: Tensor, blocks: Blocks, dtype: torch.dtype, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty(blocks.total, dtype=dtype) if out is None else out
    _call(
        "cast_blocks", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, blocks.offsets,
        _KINDS[dtype], seed is not None, seed or 0, out,
    )  # fmt: skip
    return out


def decode_blocks(stored: Tensor, blocks: Blocks, out: Tensor, scale: Tensor | None = None, add: bool = False) -> None:
    _call(
        "decode_blocks", stored, _KINDS[stored.dtype], scale, len(blocks), blocks.starts, blocks.lengths,
        blocks.offsets, out, add,
    )  # fmt: skip


def pack_nibbles(codes: Tensor) -> Tensor:
    out = torch.empty((len(codes) + 1) // 2, dtype=torch.uint8)
    _call("pack_nibbles", codes, len(codes), out)
    return out


def unpack_nibbles(stored: Tensor, count: int) -> Tensor:
    codes = torch.empty(count, dtype=torch.int8)
    _call("unpack_nibbles", stored, count, codes)
    return codes


def encode_rows(
    rows: Tensor, values: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int,
    given: Tensor | None, seed: int | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    (count, dim), tables = values.shape, len(widths)
    out = torch.empty(16 + 4 * (tables + count) * 2 + 4 * values.numel(), dtype=torch.uint8)
    sizes = torch.empty(3, dtype=torch.int64)
    if _call(
        "encode_rows", rows, values, count, dim, bounds, widths, tables, per_row, _KINDS[dtype], bits, given,
        seed is not None, seed or 0, out, sizes,
    ):  # fmt: skip
        raise MemoryError("encoding rows needs more memory than is available")
    lengths: list[int] = sizes.tolist()
    return out[: lengths[2]], lengths


def decode_rows(
    message: Tensor, bounds: Tensor, widths: Tensor, dim: int, per_row: bool, dtype: torch.dtype, bits: int
) -> tuple[Tensor, Tensor]:
    count = int(message[:4].view(torch.int32))
    rows, values = torch.empty(count, dtype=torch.int64), torch.empty(count, dim)
    if count and _call(
        "decode_rows", message, count, dim, bounds, widths, len(widths), per_row, _KINDS[dtype], bits, rows, values
    ):
        raise MemoryError("decoding rows needs more memory than is available")
    return rows, values
