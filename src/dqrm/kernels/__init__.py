"""Compiled CPU kernels: the passes of a training step that plain torch makes many of.

Knows memory only and imports nothing else of dqrm. Callers ask `fits(tensors)` first and have a plain torch path beside
it, which other devices, machines without a compiler, and tracing take. Formulas are in `quant` and `models`; tests hold
both paths to each other and to a float64 reference.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dqrm.kernels.build import library

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8)


def native() -> bool:
    """Whether the compiled kernels are there."""
    return library() is not None


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: on the CPU, contiguous, of a known dtype, and not traced."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype in _DTYPES and tensor.is_contiguous()
        ):
            return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and native()


_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "lookup": (c_int64, [c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int64, c_void_p,
                         c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int]),
    "lookup_packed": (c_int64, [c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int64,
                                c_void_p, c_int, c_void_p, c_int]),
    "outside": (c_int64, [c_void_p, c_int64, c_int64, c_int]),
    "add_rows": (None, [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_float, c_void_p, c_int64, c_void_p, c_int,
                        c_int]),
    "add_rows_stochastic": (None, [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_float, c_uint32, c_void_p, c_int64,
                                   c_void_p, c_int, c_int]),
    "sum_duplicates": (c_int64, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int]),
    "raise_scales": (None, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int64, c_void_p, c_int, c_int]),
    "blocks_max": (c_uint32, [c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int]),
    "quantize_weights": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int]),
    "finish_linear": (None, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int]),
    "start_linear": (None, [c_void_p, c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p,
                            c_void_p, c_int]),
    "interact": (c_int, [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p, c_int64, c_int]),
    "interact_backward": (c_int, [c_void_p, c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, c_int, c_int64,
                                  c_void_p, c_void_p, c_int]),
    "block_scales": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int]),
    "quantize_blocks": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
                               c_int, c_int, c_uint32, c_void_p, c_int]),
    "cast_blocks": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_uint32,
                           c_void_p, c_int]),
    "decode_blocks": (None, [c_void_p, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int]),
    "pack_nibbles": (None, [c_void_p, c_int64, c_void_p, c_int]),
    "unpack_nibbles": (None, [c_void_p, c_int64, c_void_p, c_int]),
    "encode_rows": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int, c_int,
                            c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_int]),
    "decode_rows": (c_int, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int, c_int, c_void_p,
                            c_void_p, c_int]),
}  # fmt: skip
_functions: dict[str, Any] = {}


def _call(name: str, *arguments: Any) -> Any:
    """One kernel on all of torch's threads; tensors pass as pointers, None as a null pointer."""
    function = _functions.get(name)
    if function is None:
        loaded = library()
        assert loaded is not None, "callers ask fits() first"
        function = getattr(loaded, f"dqrm_{name}")
        function.restype, function.argtypes = _PROTOTYPES[name]
        _functions[name] = function  # last: another thread may take it at once
    return function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def _half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


def lookup(
    ids: Tensor, starts: Tensor, table_rows: Tensor, weight: Tensor, scale: Tensor | None, limits: tuple[int, int],
    out: Tensor, rows_out: Tensor, clamped: Tensor | None = None, raising: bool = False, dirty: Tensor | None = None,
    dirty_starts: Tensor | None = None, block: int = 1,
) -> int:  # fmt: skip
    """Fake-quantized rows of `weight` for integer ids [..., T] of T tables into `out` float32 [N, dim], N ids.

    Args:
        starts, table_rows: int64 [T], first row and number of rows of each table. scale: float32 [T], or None.
        limits: lowest and highest code. rows_out: int64 [N], set to the rows read.
        clamped: int64 [1], to which the number of weights beyond the limits is added; None: not counted.
        raising: raise `scale` first, in place, to what these rows need, so that nothing is beyond the limits.
        dirty: uint8 flags of blocks of `block` rows, set where a row is read; table t's begin at dirty_starts[t].

    Returns:
        The first position whose id is outside its table, or -1.
    """
    found: int = _call(
        "lookup", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, weight,
        _half(weight), weight.shape[1], scale, *limits, out, rows_out, clamped, raising, dirty, dirty_starts, block,
    )  # fmt: skip
    return found


def lookup_packed(
    ids: Tensor, starts: Tensor, table_rows: Tensor, codes: Tensor, bits: int, scale: Tensor, out: Tensor
) -> int:
    """Values of packed rows for integer ids [..., T] of T tables into `out` float32 [N, dim], N ids.

    Args:
        starts, table_rows: int64 [T], first row and number of rows of each table.
        codes: uint8 [rows, width], packed codes of 2, 4 or 8 bits. scale: float32 [T], or one for each row of `codes`.

    Returns:
        The first position whose id is outside its table, or -1.
    """
    found: int = _call(
        "lookup_packed", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, codes, bits,
        out.shape[1], scale, len(scale) != len(table_rows), out,
    )  # fmt: skip
    return found


def _require_rows(weight: Tensor, rows: Tensor, values: Tensor) -> None:
    if values.shape != (len(rows), weight.shape[1]):
        raise ValueError(f"values are {list(values.shape)}, expected [{len(rows)}, {weight.shape[1]}]")
    wrong = _call("outside", rows, len(rows), len(weight))
    if wrong >= 0:
        raise IndexError(f"row {int(rows[wrong])} is outside a weight of {len(weight)} rows")


class TableRanges(NamedTuple):
    """Scales of the tables in one weight, for whoever changes its rows to raise."""

    starts: Tensor
    """int64 [tables], the first row of each."""
    scale: Tensor
    """float32 [tables]."""
    highest: int
    """The highest code."""

    def arguments(self) -> tuple[Tensor, int, Tensor, int]:
        return self.starts, len(self.starts), self.scale, self.highest


_UNWATCHED = (None, 0, None, 0)


def add_rows(weight: Tensor, rows: Tensor, values: Tensor, factor: float, ranges: TableRanges | None = None) -> None:
    """weight[rows[i]] += factor * values[i] in place, in the order of i.

    Args:
        weight: float32 [R, dim]. rows: int64 [N]. values: float32 [N, dim].
        ranges: scales to raise, in place, to what the rows need afterwards.
    """
    _require_rows(weight, rows, values)
    torch.autograd.graph.increment_version(weight)  # torch cannot see the write
    watched = _UNWATCHED if ranges is None else ranges.arguments()
    _call("add_rows", weight, weight.shape[1], rows, values, len(rows), factor, *watched)


def add_rows_stochastic(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> None:
    """The same on bf16 weights with stochastic rounding (`seed` below 2**32); no row twice."""
    _require_rows(weight, rows, values)
    torch.autograd.graph.increment_version(weight)
    watched = _UNWATCHED if ranges is None else ranges.arguments()
    _call("add_rows_stochastic", weight, weight.shape[1], rows, values, len(rows), factor, seed, *watched)


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Each of the rows int64 [N] once, in rising order, with the sum of its values float32 [N, dim]; None: too many."""
    unique, sums = torch.empty_like(rows), torch.empty_like(values)
    count = _call("sum_duplicates", rows, values, *values.shape, unique, sums, rows.new_empty(2 * len(rows)))
    return None if count < 0 else (unique[:count], sums[:count])


def raise_scales(rows: Tensor, weight: Tensor, ranges: TableRanges) -> None:
    """The scale of each row's table = max(itself, the scale of max|weight[row]|), in place; rows: int64 [N]."""
    starts, tables, scale, highest = ranges.arguments()
    _call("raise_scales", rows, len(rows), starts, tables, weight, _half(weight), weight.shape[1], scale, highest)


def blocks_max(table: Tensor, block: int, dirty: Tensor, maxima: Tensor) -> float:
    """max|table|, reading only the blocks of `block` rows whose flag in `dirty` (uint8) is set; cleans them.

    maxima: float32, the maximum of each block, brought up to date.
    """
    bits = _call("blocks_max", table, _half(table), *table.shape, block, dirty, maxima)
    return ctypes.c_float.from_buffer(c_uint32(bits)).value


_spare: dict[int, list[Any]] = {}


class _Lent(np.ndarray):
    """Memory that goes back to `_spare` when the last tensor on it has gone."""

    def __del__(self, spare: dict[int, list[Any]] = _spare) -> None:
        if len(kept := spare.setdefault(len(self), [])) < 4:
            kept.append(self.base)
        if len(spare) > 8:
            spare.clear()


def _lend(size: int) -> Tensor:
    """uint8 [size], used again later: fresh memory of a megabyte costs more than writing to it, page by page."""
    try:
        memory = _spare[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(size, np.uint8)
    return torch.from_numpy(memory.view(_Lent))


def quantize_weights(
    weights: Sequence[Tensor], formats: Sequence[tuple[bool, int, bool]]
) -> list[tuple[Tensor, Tensor]]:
    """Of each float32 weight [outputs, inputs]: values as float32, or codes as bf16, and the scale [outputs] or [1].

    Args:
        formats: of each weight, whether it has a scale per channel, its highest code, and whether codes are wanted.
    """
    plan, size, scales, places = _plan(tuple([weight.shape for weight in weights]), tuple(formats))
    memory, scale = _lend(size), torch.empty(sum(scales))
    pointers = (c_void_p * len(weights))(*[weight.data_ptr() for weight in weights])
    _call("quantize_weights", pointers, plan, len(weights), scale, memory)
    views = {dtype: memory.view(dtype) for dtype in {dtype for dtype, *_ in places}}
    used = [views[dtype].as_strided(shape, stride, at) for dtype, shape, stride, at in places]
    return list(zip(used, scale.split_with_sizes(scales)))


@functools.lru_cache(64)
def _plan(
    shapes: tuple[torch.Size, ...], formats: tuple[tuple[bool, int, bool], ...]
) -> tuple[Any, int, list[int], Any]:
    """What the kernel is told, the bytes of memory it needs, the number of each weight's scales, and where its values
    are: (dtype, shape, stride, offset)."""
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


def finish_linear(y: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> None:
    """y * scale + bias, then ReLU where asked for: bf16 [B, outputs] in place."""
    _call("finish_linear", y, *y.shape, scale, len(scale), bias, relu)


def start_linear(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient behind the ReLU that gave `y` (None: no ReLU), the same times `scale` (None: the same tensor), and
    its sum over the batch, float32 [outputs]."""
    masked, bias_grad = torch.empty_like(grad), grad.new_empty(grad.shape[1], dtype=torch.float32)
    scaled = None if scale is None else torch.empty_like(grad)
    scales = 0 if scale is None else len(scale)
    _call("start_linear", grad, y, _half(grad), *grad.shape, scale, scales, masked, scaled, bias_grad)
    return masked, masked if scaled is None else scaled, bias_grad


def interact(dense: Tensor | None, tables: Tensor, self_interaction: bool, width: int) -> Tensor:
    """The dense vector [B, dim] beside all pairs' dot products: [B, width], of dense's dtype (bf16 or float32)."""
    out = tables.new_empty(len(tables), width, dtype=tables.dtype if dense is None else dense.dtype)
    if _call("interact", dense, _half(dense), tables, *tables.shape, self_interaction, out, width):
        raise MemoryError("the interaction needs more memory than there is")
    return out


def interact_backward(
    grad: Tensor, dense: Tensor | None, tables: Tensor, self_interaction: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `interact` by dense and by tables."""
    grad_dense = None if dense is None else torch.empty_like(dense)
    grad_tables = torch.empty_like(tables)
    if _call(
        "interact_backward", grad, dense, _half(dense), tables, *tables.shape, self_interaction, grad.shape[1],
        grad_dense, grad_tables,
    ):  # fmt: skip
        raise MemoryError("the interaction's gradient needs more memory than there is")
    return grad_dense, grad_tables


# Blocks (see `quant.blocks`): `starts`, `lengths`, `keys`, `offsets` are int64 [blocks]; stored values are uint8 bytes.
_KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}


def block_scales(
    x: Tensor, residual: Tensor | None, starts: Tensor, lengths: Tensor, keys: Tensor, highest: int, scale: Tensor
) -> None:
    """scale[b] = max|x + residual| over block b / highest, float32 [blocks]."""
    _call("block_scales", x, residual, len(starts), starts, lengths, keys, highest, scale)


def quantize_blocks(
    x: Tensor, residual: Tensor | None, starts: Tensor, lengths: Tensor, keys: Tensor, offsets: Tensor, scale: Tensor,
    limits: tuple[int, int], seed: int | None, codes: Tensor,
) -> None:  # fmt: skip
    """Codes of x + residual; a seed (below 2**32) rounds stochastically. The residual becomes what was lost."""
    _call(
        "quantize_blocks", x, residual, len(starts), starts, lengths, keys, offsets, scale, *limits, seed is not None,
        seed or 0, codes,
    )  # fmt: skip


def cast_blocks(
    x: Tensor, residual: Tensor | None, starts: Tensor, lengths: Tensor, keys: Tensor, offsets: Tensor,
    dtype: torch.dtype, seed: int | None, out: Tensor,
) -> None:  # fmt: skip
    """The same with values of `dtype` (bfloat16 or float32) instead of codes."""
    _call(
        "cast_blocks", x, residual, len(starts), starts, lengths, keys, offsets, _KINDS[dtype], seed is not None,
        seed or 0, out,
    )  # fmt: skip


def decode_blocks(
    stored: Tensor, dtype: torch.dtype, scale: Tensor | None, starts: Tensor, lengths: Tensor, offsets: Tensor,
    out: Tensor, add: bool,
) -> None:  # fmt: skip
    """out[starts[b] + j] = the stored values, times scale[b] where they are codes (int8); added where `add`."""
    _call("decode_blocks", stored, _KINDS[dtype], scale, len(starts), starts, lengths, offsets, out, add)


def pack_nibbles(codes: Tensor, out: Tensor) -> None:
    """int8 codes [N] of 4 bits as bytes: `out`, uint8 [ceil(N / 2)]."""
    _call("pack_nibbles", codes, len(codes), out)


def unpack_nibbles(stored: Tensor, codes: Tensor) -> None:
    """The inverse."""
    _call("unpack_nibbles", stored, len(codes), codes)


def encode_rows(
    rows: Tensor, values: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int,
    given: Tensor | None, seed: int | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """A message of `distributed.sparse`, uint8, and its bytes before the scales, of the scales, and in all."""
    (count, dim), tables = values.shape, len(widths)
    out = torch.empty(16 + 4 * (tables + count) * 2 + 4 * values.numel(), dtype=torch.uint8)
    sizes = torch.empty(3, dtype=torch.int64)
    if _call(
        "encode_rows", rows, values, count, dim, bounds, widths, tables, per_row, _KINDS[dtype], bits, given,
        seed is not None, seed or 0, out, sizes,
    ):  # fmt: skip
        raise MemoryError("encoding rows needs more memory than there is")
    lengths: list[int] = sizes.tolist()
    return out[: lengths[2]], lengths


def decode_rows(
    message: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int, rows: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """The inverse, into rows int64 [U] and values float32 [U, dim], as many as the message holds."""
    if _call(
        "decode_rows", message, *values.shape, bounds, widths, len(widths), per_row, _KINDS[dtype], bits, rows, values
    ):
        raise MemoryError("decoding rows needs more memory than there is")
