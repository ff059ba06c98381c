"""The fused operations of a training step, each several operations in plain torch, and the backends that provide them.

Operates on memory only and imports nothing else of dqrm. Each function here is one operation: its docstring is the
contract, and `choose` selects the backend that computes it. A backend is a module (or any object) with `takes` and a
function of the same name and arguments for each operation that it provides: `cpu` is compiled C; `plain` is in plain
torch, runs everywhere and is the reference. To add one (another device, another compiler), add it to `BACKENDS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dqrm.kernels import cpu, plain
from dqrm.kernels.build import library
from dqrm.kernels.layout import Blocks, GroupMap, IdleCourse, Limits, TableRanges, Tiers, Weight

__all__ = [
    "BACKENDS", "OPERATIONS", "Backend", "Blocks", "GroupMap", "IdleCourse", "Limits", "TableRanges", "Tiers",
    "Weight", "choose", "native", "traced",
]  # fmt: skip


class Backend(Protocol):
    def takes(self, operation: str, *tensors: Weight | None) -> bool:
        """Whether it computes this operation on these tensors: device, dtypes, contiguity. Called before each one."""


BACKENDS: list[Backend] = [cpu, plain]
"""Backends in order of preference."""
OPERATIONS: dict[str, Callable[..., Any]] = {}
"""The operations that a backend may provide, by name."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


def native() -> bool:
    """Whether the compiled CPU kernels are available."""
    return library() is not None


def traced() -> bool:
    """Whether torch is tracing (torch.compile, torch.export, torch.jit.trace)."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def choose(operation: str, *tensors: Weight | None) -> Any:
    """The backend that computes an operation on these tensors; while a model is traced, plain torch."""
    if not traced():
        for backend in BACKENDS:
            if backend.takes(operation, *tensors):
                return backend
    return plain


def _operation(function: _Function) -> _Function:
    OPERATIONS[function.__name__] = function
    return function


# ---- tables: one weight [rows, dim] may hold several, one after the other


@_operation
def lookup(
    ids: Tensor, starts: Tensor, table_rows: Tensor, weight: Weight, scale: Tensor | None, limits: Limits,
    out: Tensor, rows_out: Tensor, clamped: Tensor | None = None, raising: bool = False, dirty: Tensor | None = None,
    dirty_starts: Tensor | None = None, block: int = 1, groups: GroupMap | None = None,
) -> int:  # fmt: skip
    """Fake-quantized rows of `weight` for integer ids [..., T] of T tables into `out` float32 [N, dim], N ids.

    Args:
        starts, table_rows: int64 [T], first row and number of rows of each table.
        weight: float32, bf16, int8 rows (`encode_int8_rows`), or `Tiers`. scale: float32 [T], or None: not quantized.
        limits: lowest and highest code, or those of each table (`Limits`). rows_out: int64 [N], set to the rows read.
        clamped: int64 [1], to which the number of weights beyond the limits is added; None: not counted.
        raising: raise `scale` first, in place, to what these rows need, so that nothing is beyond the limits.
        dirty: uint8 flags of blocks of `block` rows, set where a row is read; table t's begin at dirty_starts[t].
        groups: which scale a row of the T tables has; `scale` is then float32 [groups], `limits` a pair.

    Returns:
        The first position whose id is out of range for its table (the output is then incomplete), or -1. Devices on
        which the check would stall every step need not make it.
    """
    backend = choose("lookup", ids, weight, scale)
    return backend.lookup(
        ids, starts, table_rows, weight, scale, limits, out, rows_out, clamped, raising, dirty, dirty_starts, block,
        groups,
    )  # fmt: skip


@_operation
def lookup_packed(
    ids: Tensor, starts: Tensor, table_rows: Tensor, codes: Tensor, bits: int, scale: Tensor, dim: int,
    zero_point: Tensor | None = None, groups: GroupMap | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Values float32 [N, dim] of stored rows for integer ids [..., T] of T tables, N ids.

    Args:
        starts, table_rows: int64 [T], first row and number of rows of each table.
        codes: [rows, width], as `quant.packing.storage` says for `bits`.
        scale: float32 [T], or [groups]. zero_point: int32, as `scale`: what is subtracted from codes; None: 0.
        groups: which scale a row of the T tables has; None: that of its table.

    Returns:
        The values, and the first position whose id is out of range for its table (the values are then incomplete), or
        -1; in a traced model always -1, and such an id gives row 0.
    """
    backend = choose("lookup_packed", ids, codes, scale, zero_point)
    return backend.lookup_packed(ids, starts, table_rows, codes, bits, scale, dim, zero_point, groups)


@_operation
def add_rows(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float = 1.0, ranges: TableRanges | None = None
) -> Tensor:
    """weight[rows[i]] += factor * values[i] in place, rows repeated or not; on CPU in the order of i. Returns `weight`.

    Args:
        weight: float32 [R, dim]. rows: int64 [N]. values: float32 [N, dim].
        ranges: scales to raise, in place, to what the rows need afterwards.

    Raises:
        ValueError, IndexError, RuntimeError: values of the wrong shape, or a row out of range.
    """
    scale = None if ranges is None else ranges.scale
    return choose("add_rows", weight, rows, values, scale).add_rows(weight, rows, values, factor, ranges)


@_operation
def add_rows_stochastic(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    """`add_rows` on bf16 weights or int8 rows with stochastic rounding; no row twice. seed: below 2**32.

    A sum between two neighbours (of bf16; or codes on the scale that its int8 row then has) goes to the upper one with
    the probability of its distance to the lower: updates far below the weight's precision act on average, where
    rounding to nearest would lose them all. The random bits are a hash of (seed, row, column): the same on every
    device, in any order.
    """
    backend = choose("add_rows_stochastic", weight, rows, values, None if ranges is None else ranges.scale)
    return backend.add_rows_stochastic(weight, rows, values, factor, seed, ranges)


@_operation
def encode_int8_rows(values: Tensor, out: Tensor) -> None:
    """Values float32 [N, dim] as int8 rows, to the nearest code, into `out` int8 [N, dim + 2] (an odd dim: dim + 3).

    A row is its codes from -127 to 127, one byte of padding where dim is odd, and in the last two bytes the scale in
    bf16: max(max|row|, 1e-8) / 127, rounded up. A row with NaN or infinite values gets codes 0 and a scale that is NaN
    or infinite.
    """
    choose("encode_int8_rows", values, out).encode_int8_rows(values, out)


@_operation
def update_tiers(
    weight: Tiers, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    """`add_rows_stochastic` on all rows of a weight in two tiers; rows that are updated often move to int8.

    Each row is encoded where it lies, by a hash of (seed, row, column), and the count of its slot, if it has one,
    rises by 1. Then, in the order of `rows`, one without a slot takes that of the lowest count c in its set of 8 with
    probability 1 / (c + 1), and c becomes c + 1: randomized admission (Basat et al., INFOCOM 2017), which counts no
    rows but those that have slots. The row that loses it is rounded to 4 bits, stochastically.

    Returns:
        The rows that lost their slots, int64; `ranges` covers them as well.

    Raises:
        ValueError, IndexError: as `add_rows`.
    """
    scale = None if ranges is None else ranges.scale
    return choose("update_tiers", weight, rows, values, scale).update_tiers(weight, rows, values, factor, seed, ranges)


@_operation
def encode_tiers(values: Tensor, out: Tiers) -> None:
    """Values float32 [N, dim] into N rows, to the nearest code; each stays in its tier.

    A row of 4 bits is its codes from -7 to 7, plus 8, code j in the low and code j + ceil(dim / 2) in the high bits of
    byte j, at least 4 bytes, and its scale in bf16: max|row| / 7, rounded up. One that has a slot is that number and,
    in place of the scale, its sign bit.
    """
    choose("encode_tiers", values, out).encode_tiers(values, out)


@_operation
def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values float32 [N, dim] of equal rows int64 [N]: unique rows int64 [U], ascending, and float32 [U, dim].

    The sums run in the order of the input, so their bits are reproducible.
    """
    return choose("sum_duplicates", rows, values).sum_duplicates(rows, values)


@_operation
def raise_scales(rows: Tensor, weight: Weight, ranges: TableRanges) -> None:
    """The scale of each row's table = max(itself, the scale of max|weight[row]|), in place; rows: int64 [N].

    With `ranges.groups`: that of its block of rows; a row that has its own scale: = the scale of max|weight[row]|.
    """
    choose("raise_scales", rows, weight, ranges.scale, ranges.starts).raise_scales(rows, weight, ranges)


@_operation
def blocks_max(table: Weight, block: int, dirty: Tensor, maxima: Tensor) -> float:
    """max|table|, reading only the blocks of `block` rows whose flag in `dirty` (uint8) is set; clears the flags.

    maxima: float32, the maximum of each block, updated in place.
    """
    return choose("blocks_max", table, dirty, maxima).blocks_max(table, block, dirty, maxima)


@_operation
def idle_adam(
    weight: Tensor, first: Tensor, second: Tensor, last: Tensor, rows: Tensor, now: int, course: IdleCourse
) -> Tensor:
    """Bring rows from the step of Adam that they have seen last to step `now`, in place; in between, their gradient
    was `l2 * weight` alone. Returns those that were not there, int64 [U], each once, in any order.

    Without L2, a row that has seen `EARLY_STEPS` steps goes all the way in one: its first moment fades, and the root of
    its second moment does in proportion, so that the sum of the steps is a number of the gap times `first /
    (sqrt(second) + eps')`, with the mean of `eps` over root and bias correction for eps'.

    Else the first 16 steps of a row are made one by one, then up to 64 at once: within such a block the root of the
    second moment has one value, that of its middle, and weight and first moment follow a matrix of 2 x 2, so the cost
    grows with the logarithm of the gap up to 512 steps and by 1/64 per step from there. A weight below 1e-10 that moves
    by less than that in a step is set to 0 and stays there.

    Args:
        weight, first, second: float32 [R, dim]: weights and moments.
        last: int32 [R]: steps that each row has seen, at most `now`; updated.
        rows: int64 [N], repeated or not.
    """
    backend = choose("idle_adam", weight, first, second, last, rows, course.alpha, course.root, course.powers)
    return backend.idle_adam(weight, first, second, last, rows, now, course)


@_operation
def adam_moments(
    first: Tensor, second: Tensor, rows: Tensor, values: Tensor, beta1: float, beta2: float, root: float, eps: float
) -> Tensor:
    """Update the moments, float32 [R, dim], of rows by their gradients, and return first / (sqrt(second) * root + eps).

    Args:
        rows: int64 [U], each once.
        values: float32 [U, dim]: gradients; overwritten by what is returned.
    """
    backend = choose("adam_moments", first, second, rows, values)
    return backend.adam_moments(first, second, rows, values, beta1, beta2, root, eps)


# ---- linear layers and interaction


@_operation
def quantize_weights(
    weights: Sequence[Tensor], formats: Sequence[tuple[bool, int, bool]]
) -> list[tuple[Tensor, Tensor]]:
    """Quantized weights [outputs, inputs]: values as float32, or codes as bf16; scales float32 [outputs] or [1].

    Args:
        formats: of each weight, whether it has a scale per channel, its highest code, and whether codes are wanted.
    """
    return choose("quantize_weights", *weights).quantize_weights(weights, formats)


@_operation
def finish_linear(y: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """y * scale + bias, then ReLU if requested: bf16 [B, outputs], as `y`, which may be overwritten.

    scale: float32 [outputs] or [1]. bias: float32 [outputs].
    """
    return choose("finish_linear", y, scale, bias).finish_linear(y, scale, bias, relu)


@_operation
def start_linear(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `finish_linear`: gradient before the ReLU, the same times `scale`, and the gradient of the bias.

    Args:
        grad: float32 or bf16 [B, outputs]. y: output of the ReLU, of the same dtype; None: no ReLU.
        scale: float32 [outputs] or [1]; None: the second result is the first.
    """
    return choose("start_linear", grad, y, scale).start_linear(grad, y, scale)


@_operation
def interact(dense: Tensor | None, tables: Tensor, pairs: Tensor, self_interaction: bool) -> Tensor:
    """The dense vector and each pair's dot product, concatenated; differentiable: [B, dim + P] ([B, P] without dense).

    Args:
        dense: float32 or bf16 [B, dim], vector 0, or None. tables: float32 [B, T, dim], the vectors after it.
        pairs: int64 [P], i * vectors + j for all pairs j < i (j <= i with `self_interaction`), i rising.
    """
    return choose("interact", dense, tables).interact(dense, tables, pairs, self_interaction)


# ---- blocks of values that share a scale, encoded for sending and decoded again
#
# z = x + residual is encoded, and the residual is set to z - value(z): error compensation (DQRM paper). Stochastic
# rounding is floor(z / scale + u), u from a hash of (seed, key): the same in any process, in any order, on any device.


@_operation
def block_scales(x: Tensor, blocks: Blocks, bits: int, residual: Tensor | None = None) -> Tensor:
    """The scale of each block of x + residual: float32 [blocks]. x: float32, flat."""
    return choose("block_scales", x, residual, blocks.starts).block_scales(x, blocks, bits, residual)


@_operation
def quantize_blocks(
    x: Tensor, blocks: Blocks, scale: Tensor, bits: int, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes of x + residual: int8 [total], in the order of the blocks; the residual is updated in place.

    Args:
        x: float32, flat. scale: float32 [blocks]. residual: float32, flat, indexed by the blocks' keys.
        seed: below 2**32; rounds stochastically instead of half to even.
        out: output tensor for the codes; default: a new tensor.
    """
    backend = choose("quantize_blocks", x, residual, blocks.starts, scale, out)
    return backend.quantize_blocks(x, blocks, scale, bits, residual, seed, out)


@_operation
def cast_blocks(
    x: Tensor, blocks: Blocks, dtype: torch.dtype, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x + residual as `dtype` (bfloat16 or float32) [total]; otherwise as `quantize_blocks`."""
    backend = choose("cast_blocks", x, residual, blocks.starts, out)
    return backend.cast_blocks(x, blocks, dtype, residual, seed, out)


@_operation
def decode_blocks(stored: Tensor, blocks: Blocks, out: Tensor, scale: Tensor | None = None, add: bool = False) -> None:
    """out[positions of the blocks] = the encoded values, or += with `add`.

    Args:
        stored: [total], int8 codes (with `scale`, float32 [blocks]), bfloat16 or float32. out: float32, flat.
    """
    choose("decode_blocks", out, stored, blocks.starts, scale).decode_blocks(stored, blocks, out, scale, add)


@_operation
def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes [N] of 4 bits as one packed row of `quant.packing`: uint8 [ceil(N / 2)]."""
    return choose("pack_nibbles", codes).pack_nibbles(codes)


@_operation
def unpack_nibbles(stored: Tensor, count: int) -> Tensor:
    """The inverse: int8 [count]."""
    return choose("unpack_nibbles", stored).unpack_nibbles(stored, count)


@_operation
def encode_rows(
    rows: Tensor, values: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int,
    given: Tensor | None, seed: int | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """A message of `distributed.sparse`, uint8, and its bytes before the scales, of the scales, and in all.

    Args:
        rows: int64 [U], ascending. values: float32 [U, dim].
        bounds, widths: int64 [tables + 1] and [tables]: first row of each table, and bytes of an id.
        per_row: one scale per row instead of one per table.
        dtype, bits: of the encoded values (see `Codec`). given: float32 [tables], scales to use. seed: below 2**32.
    """
    backend = choose("encode_rows", rows, values, given, bounds)
    return backend.encode_rows(rows, values, bounds, widths, per_row, dtype, bits, given, seed)


@_operation
def decode_rows(
    message: Tensor, bounds: Tensor, widths: Tensor, dim: int, per_row: bool, dtype: torch.dtype, bits: int
) -> tuple[Tensor, Tensor]:
    """The inverse: rows int64 [U] and values float32 [U, dim]."""
    return choose("decode_rows", message, bounds).decode_rows(message, bounds, widths, dim, per_row, dtype, bits)


@_operation
def pack_rows(values: Tensor, bits: int, half: bool, seed: int | None) -> Tensor:
    """Messages of `quant.row_codec`: rows float32 [N, dim] as uint8 [N, ceil(dim * bits / 8) + 2 or 4].

    Args:
        bits: 2, 4 or 8. half: a scale in FP16, rounded up, instead of FP32. seed: of stochastic rounding, below 2**32;
            None: half to even.
    """
    return choose("pack_rows", values).pack_rows(values, bits, half, seed)


@_operation
def unpack_rows(message: Tensor, dim: int, bits: int, half: bool) -> Tensor:
    """The inverse: float32 [N, dim]."""
    return choose("unpack_rows", message).unpack_rows(message, dim, bits, half)
