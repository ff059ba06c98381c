"""All operations in compiled C, on all of torch's threads; memory is passed as pointers."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64, c_uint32, c_void_p
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dqrm.kernels import plain
from dqrm.kernels.calls import call, takes  # noqa: F401 (`takes` makes this a backend)
from dqrm.kernels.layout import EARLY_STEPS, Blocks, GroupMap, IdleCourse, Limits, TableRanges, Tiers, Weight

_KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}


def _format(weight: Weight) -> tuple[int, int]:
    """Of a weight's rows (`ROW_FLOAT` ... in common.h), and the values of a row; of int8 rows with padding."""
    if isinstance(weight, Tiers):
        return 3, weight.dim
    if weight.dtype == torch.int8:
        return 2, weight.shape[1] - 2
    return int(weight.dtype == torch.bfloat16), weight.shape[1]


def _memory(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Of a weight's rows, and of its slots."""
    return (weight.cold, weight.hot) if isinstance(weight, Tiers) else (weight, None)


def _half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


# ---- tables


def lookup(
    ids: Tensor, starts: Tensor, table_rows: Tensor, weight: Weight, scale: Tensor | None, limits: Limits, out: Tensor,
    rows_out: Tensor, clamped: Tensor | None = None, raising: bool = False, dirty: Tensor | None = None,
    dirty_starts: Tensor | None = None, block: int = 1, groups: GroupMap | None = None,
) -> int:  # fmt: skip
    low_high_highs = (*limits, None) if isinstance(limits, tuple) else (0, 0, limits)
    wrong: int = call(
        "lookup", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, *_memory(weight),
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
    return out, call(
        "lookup_packed", ids, ids.dtype == torch.int64, ids.numel(), len(table_rows), starts, table_rows, codes, bits,
        dim, scale, zero_point, *_blocks_of(groups), out,
    )  # fmt: skip


def _before_update(weight: Weight, rows: Tensor, values: Tensor) -> None:
    """Refuse writes outside the weight; tell torch's version counter of the write, which it cannot see."""
    dim = _format(weight)[1]
    odd = isinstance(weight, Tensor) and weight.dtype == torch.int8 and values.shape == (len(rows), dim - 1)
    if values.shape != (len(rows), dim) and not odd:
        raise ValueError(f"values are {list(values.shape)}, expected [{len(rows)}, {dim}]")
    _check_rows(rows, len(weight))
    torch.autograd.graph.increment_version(_memory(weight)[0])


def _check_rows(rows: Tensor, count: int) -> None:
    """Refuse rows outside a weight of `count` rows."""
    wrong = call("outside", rows, len(rows), count)
    if wrong >= 0:
        raise IndexError(f"row {int(rows[wrong])} is outside a weight of {count} rows")


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
    call("add_rows", weight, weight.shape[1], rows, values, len(rows), factor, *_watched(ranges))
    return weight


def add_rows_stochastic(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    _before_update(weight, rows, values)
    name = "add_rows_int8" if weight.dtype == torch.int8 else "add_rows_stochastic"
    if call(name, weight, values.shape[1], rows, values, len(rows), factor, seed, *_watched(ranges)):
        raise MemoryError("updating rows needs more memory than is available")
    return weight


def encode_int8_rows(values: Tensor, out: Tensor) -> None:
    call("encode_int8", values, *values.shape, out)


def update_tiers(
    weight: Tiers, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    _before_update(weight, rows, values)
    moved = torch.empty_like(rows)
    wrong = call(
        "update_tiers", weight.cold, weight.hot, weight.owner, weight.counts, len(weight.hot), weight.dim, rows, values,
        len(rows), factor, seed, moved, *_watched(ranges),
    )  # fmt: skip
    if wrong:
        raise MemoryError("updating rows needs more memory than is available")
    return moved[moved >= 0]


def encode_tiers(values: Tensor, out: Tiers) -> None:
    call("encode_tiers", values, len(values), out.dim, out.cold, out.hot)


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    unique, sums = torch.empty_like(rows), torch.empty_like(values)
    count = call("sum_duplicates", rows, values, *values.shape, unique, sums, rows.new_empty(2 * len(rows)))
    if count < 0:  # rows or their number do not fit the sort keys
        return plain.sum_duplicates(rows, values)
    return unique[:count], sums[:count]


def raise_scales(rows: Tensor, weight: Weight, ranges: TableRanges) -> None:
    starts, tables, *scale = _watched(ranges)
    call("raise_scales", rows, len(rows), starts, tables, *_memory(weight), *_format(weight), *scale)


def blocks_max(table: Weight, block: int, dirty: Tensor, maxima: Tensor) -> float:
    kind, dim = _format(table)
    bits = call("blocks_max", *_memory(table), kind, len(table), dim, block, dirty, maxima)
    return ctypes.c_float.from_buffer(c_uint32(bits)).value


def idle_adam(
    weight: Tensor, first: Tensor, second: Tensor, last: Tensor, rows: Tensor, now: int, course: IdleCourse
) -> Tensor:
    _check_rows(rows, len(last))
    changed = rows.new_empty(2 * len(rows))  # the kernel keeps where they were in the second half
    count = call(
        "idle_adam", weight, first, second, last, weight.shape[1], rows, len(rows), now, EARLY_STEPS, course.alpha,
        course.root, course.stride, course.powers, course.fades, len(course.fades) // 2, course.beta1,
        1 - course.beta1, course.beta2, course.eps, course.l2, course.gamma, course.most, changed,
    )  # fmt: skip
    if count:
        torch.autograd.graph.increment_version(weight)
    return changed[:count]


def adam_moments(
    first: Tensor, second: Tensor, rows: Tensor, values: Tensor, beta1: float, beta2: float, root: float, eps: float
) -> Tensor:
    _check_rows(rows, len(first))
    call(
        "adam_moments", first, second, first.shape[1], rows, len(rows), values, beta1, 1 - beta1, beta2, 1 - beta2,
        root, eps,
    )  # fmt: skip
    return values


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
    call("quantize_weights", pointers, plan, len(weights), scale, memory)
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
    call("finish_linear", y, *y.shape, scale, len(scale), bias, relu)
    return y


def start_linear(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    masked, bias_grad = torch.empty_like(grad), grad.new_empty(grad.shape[1], dtype=torch.float32)
    scaled = None if scale is None else torch.empty_like(grad)
    scales = 0 if scale is None else len(scale)
    call("start_linear", grad, y, _half(grad), *grad.shape, scale, scales, masked, scaled, bias_grad)
    return masked, masked if scaled is None else scaled, bias_grad


# ---- interaction


class _Interact(torch.autograd.Function):
    """The pairs' products without the full matrix of products; sums in FP32."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor | None, tables: Tensor, self_interaction: bool, width: int) -> Tensor:
        ctx.save_for_backward(dense, tables)
        ctx.self_interaction = self_interaction
        out = tables.new_empty(len(tables), width, dtype=tables.dtype if dense is None else dense.dtype)
        if call("interact", dense, _half(dense), tables, *tables.shape, self_interaction, out, width):
            raise MemoryError("the interaction needs more memory than is available")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (dense, tables), grad = ctx.saved_tensors, grads[0].contiguous()
        grad_dense = None if dense is None else torch.empty_like(dense)
        grad_tables = torch.empty_like(tables)
        if call(
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
    call("block_scales", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, highest, scale)
    return scale


def quantize_blocks(
    x: Tensor, blocks: Blocks, scale: Tensor, bits: int, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty(blocks.total, dtype=torch.int8) if out is None else out
    call(
        "quantize_blocks", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, blocks.offsets, scale,
        *plain.limits(bits), seed is not None, seed or 0, out,
    )  # fmt: skip
    return out


def cast_blocks(
    x: Tensor, blocks: Blocks, dtype: torch.dtype, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty(blocks.total, dtype=dtype) if out is None else out
    call(
        "cast_blocks", x, residual, len(blocks), blocks.starts, blocks.lengths, blocks.keys, blocks.offsets,
        _KINDS[dtype], seed is not None, seed or 0, out,
    )  # fmt: skip
    return out


def decode_blocks(stored: Tensor, blocks: Blocks, out: Tensor, scale: Tensor | None = None, add: bool = False) -> None:
    call(
        "decode_blocks", stored, _KINDS[stored.dtype], scale, len(blocks), blocks.starts, blocks.lengths,
        blocks.offsets, out, add,
    )  # fmt: skip


def pack_nibbles(codes: Tensor) -> Tensor:
    out = torch.empty((len(codes) + 1) // 2, dtype=torch.uint8)
    call("pack_nibbles", codes, len(codes), out)
    return out


def unpack_nibbles(stored: Tensor, count: int) -> Tensor:
    codes = torch.empty(count, dtype=torch.int8)
    call("unpack_nibbles", stored, count, codes)
    return codes


def encode_rows(
    rows: Tensor, values: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int,
    given: Tensor | None, seed: int | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    (count, dim), tables = values.shape, len(widths)
    out = torch.empty(16 + 4 * (tables + count) * 2 + 4 * values.numel(), dtype=torch.uint8)
    sizes = torch.empty(3, dtype=torch.int64)
    if call(
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
    if count and call(
        "decode_rows", message, count, dim, bounds, widths, len(widths), per_row, _KINDS[dtype], bits, rows, values
    ):
        raise MemoryError("decoding rows needs more memory than is available")
    return rows, values


def pack_rows(values: Tensor, bits: int, half: bool, seed: int | None) -> Tensor:
    count, dim = values.shape
    out = torch.empty(count, -(-dim * bits // 8) + (2 if half else 4), dtype=torch.uint8)
    call("pack_rows", values, count, dim, bits, half, seed is not None, seed or 0, out)
    return out


def unpack_rows(message: Tensor, dim: int, bits: int, half: bool) -> Tensor:
    out = torch.empty(len(message), dim)
    call("unpack_rows", message, len(message), dim, bits, half, out)
    return out
