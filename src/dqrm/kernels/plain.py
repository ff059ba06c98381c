"""All operations in plain torch: on any device, in any floating-point dtype, and as recorded in a traced model.

See `kernels` for their documentation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqrm.kernels.idle import adam_moments, idle_adam  # noqa: F401 (operations of this backend)
from dqrm.kernels.layout import Blocks, GroupMap, Limits, TableRanges, Weight
from dqrm.kernels.rows import (
    MASK,
    bf16_stochastic,
    encode_int8_rows,  # noqa: F401
    hash_of,
    int8_rows,
    read_rows,
    scale_of,
    uniform,
    values_per_row,
)
from dqrm.kernels.tiers import encode_tiers, update_tiers  # noqa: F401

# Rows read at a time: torch may copy what it reduces.
_CHUNK = 1 << 20


def takes(operation: str, *tensors: Weight | None) -> bool:
    return True


def limits(bits: int) -> tuple[int, int]:
    """(lowest, highest) code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def codes_of(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """As float32."""
    return (x.float() / scale).round_().clamp_(low, high)


# ---- tables


def lookup(
    ids: Tensor, starts: Tensor, table_rows: Tensor, weight: Weight, scale: Tensor | None, limits: Limits,
    out: Tensor, rows_out: Tensor, clamped: Tensor | None = None, raising: bool = False, dirty: Tensor | None = None,
    dirty_starts: Tensor | None = None, block: int = 1, groups: GroupMap | None = None,
) -> int:  # fmt: skip
    ids = ids.reshape(-1, len(starts)).long()
    outside = (ids < 0) | (ids >= table_rows)
    if ids.is_cpu and outside.any():  # on other devices the check would synchronize in every step
        return int(outside.view(-1).nonzero()[0])
    rows = (ids + starts).view(-1)
    rows_out.copy_(rows)
    if dirty is not None and dirty_starts is not None:
        dirty[(dirty_starts + ids.div(block, rounding_mode="floor")).view(-1)] = 1
    values = read_rows(weight, rows, out.shape[1]).view(*ids.shape, out.shape[1])
    if scale is not None and values.numel():
        each = isinstance(limits, Tensor)
        highest: Any = limits if each else limits[1]
        low, high = (-highest[:, None] - 1, highest[:, None]) if each else limits
        if raising and groups is not None:
            raise_groups(groups.of(rows), values.abs().amax(2).view(-1), scale, highest, groups)
        elif raising:
            torch.maximum(scale, scale_of(values.abs().amax((0, 2)), highest), out=scale)
        scale = (scale if groups is None else scale[groups.of(rows)].view(ids.shape))[..., None]
        codes = (values / scale).round_()
        if clamped is not None:
            clamped += (((codes < low) | (codes > high)) & (highest[:, None] > 0 if each else True)).sum()
        quantized = codes.clamp_(low, high).mul_(scale)
        values = torch.where(highest[:, None] > 0, quantized, values) if each else quantized
    out.copy_(values.view(out.shape))
    return -1


def lookup_packed(
    ids: Tensor, starts: Tensor, table_rows: Tensor, codes: Tensor, bits: int, scale: Tensor, dim: int,
    zero_point: Tensor | None = None, groups: GroupMap | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    tables = len(table_rows)
    ids = ids.reshape(-1, tables)
    outside = (ids < 0) | (ids >= table_rows)
    if torch.compiler.is_compiling():  # an exported graph cannot raise: out-of-range ids give row 0 (unseen)
        ids = torch.where(outside, torch.zeros_like(ids), ids)
    elif ids.device.type == "cpu" and outside.any():
        return scale.new_empty(0, dim), int(outside.view(-1).nonzero()[0])
    rows = (ids + starts).reshape(-1)
    stored = codes.index_select(0, rows)
    if bits == 32:
        return stored, -1
    if groups is None:
        stored = stored.view(-1, tables, stored.shape[1])
    else:  # by division: some exporters do not support shifts
        within = ids.div(1 << groups.shift, rounding_mode="floor") if groups.shift else ids
        group = (within + groups.first).reshape(-1)
        scale = scale.index_select(0, group)
        zero_point = None if zero_point is None else zero_point.index_select(0, group)
    values = unpack(stored, bits, dim) if bits <= 8 else stored.float()
    values = values if zero_point is None else values - zero_point[:, None].float()
    return (values * scale[:, None]).view(-1, dim), -1


def add_rows(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float = 1.0, ranges: TableRanges | None = None
) -> Tensor:
    if factor != 1.0:
        values = values * factor
    if weight.is_cpu:  # 4 to 5 times faster than `index_add_`
        weight.scatter_add_(0, rows[:, None].expand(-1, weight.shape[1]), values)
    else:
        weight.index_add_(0, rows, values)
    if ranges is not None:
        raise_scales(rows, weight, ranges)
    return weight


def add_rows_stochastic(
    weight: Tensor, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    dim = values.shape[1]
    new = read_rows(weight, rows, dim) + values * factor
    position = rows[:, None] * dim + torch.arange(dim, device=rows.device)
    if weight.dtype == torch.int8:
        weight.index_copy_(0, rows, int8_rows(new, uniform(position, seed)))
    else:
        weight.index_copy_(0, rows, bf16_stochastic(new, hash_of(position, seed) & 0xFFFF))
    if ranges is not None:
        raise_scales(rows, weight, ranges)
    return weight


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    unique, inverse = torch.unique(rows, return_inverse=True)
    return unique, add_rows(values.new_zeros(len(unique), values.shape[1]), inverse, values)


def raise_groups(group: Tensor, largest: Tensor, scale: Tensor, highest: int, groups: GroupMap) -> None:
    """Raise scale[group] in place to what magnitudes float [N] need, as `groups` says; group: int64 [N]."""
    needed = scale_of(largest, highest)
    if groups.shift == 0:
        scale[group] = needed
    else:
        scale.scatter_reduce_(0, group, needed, "amax")


def raise_scales(rows: Tensor, weight: Weight, ranges: TableRanges) -> None:
    starts, scale, highest, groups = ranges
    if len(rows):
        largest = read_rows(weight, rows, values_per_row(weight)).abs().amax(1)
        if groups is not None:
            assert isinstance(highest, int)
            return raise_groups(groups.of(rows), largest, scale, highest, groups)
        table = torch.searchsorted(starts, rows, right=True).sub_(1)
        highest = highest[table] if isinstance(highest, Tensor) else highest
        scale.scatter_reduce_(0, table, scale_of(largest, highest), "amax")


def blocks_max(table: Weight, block: int, dirty: Tensor, maxima: Tensor) -> float:
    within = torch.arange(block, device=table.device)
    for chunk in dirty.nonzero()[:, 0].split(_CHUNK // block):
        # The last block may be short: its last row is repeated for those that are missing.
        rows = (chunk[:, None] * block + within).clamp_(max=len(table) - 1).view(-1)
        dim = values_per_row(table)
        maxima[chunk] = read_rows(table, rows, dim).abs().view(len(chunk), block * dim).amax(1)
    dirty.zero_()
    return float(maxima.amax()) if len(maxima) else 0.0


# ---- linear layers and interaction


def quantize_weights(
    weights: Sequence[Tensor], formats: Sequence[tuple[bool, int, bool]]
) -> list[tuple[Tensor, Tensor]]:
    quantized = []
    for weight, (per_channel, highest, codes) in zip(weights, formats):
        magnitude = weight.detach().abs()
        if not magnitude.numel():  # no inputs or no outputs: the maximum is not defined
            largest = magnitude.new_zeros(len(weight) if per_channel else 1)
        else:
            largest = magnitude.amax(1) if per_channel else magnitude.amax().view(1)
        scale = scale_of(largest, highest)
        rounded = codes_of(weight.detach(), scale[:, None], -highest - 1, highest)
        quantized.append((rounded.bfloat16() if codes else rounded.mul_(scale[:, None]), scale))
    return quantized


def finish_linear(y: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> Tensor:
    y = torch.addcmul(bias, y.float(), scale).bfloat16()
    return y.relu_() if relu else y


def start_linear(grad: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    masked = grad if y is None else torch.where(y > 0, grad, 0)
    scaled = masked if scale is None else (masked * scale).to(grad.dtype)
    return masked, scaled, masked.float().sum(0)


def interact(dense: Tensor | None, tables: Tensor, pairs: Tensor, self_interaction: bool) -> Tensor:
    vectors = tables if dense is None else torch.cat([dense[:, None], tables.to(dense.dtype)], dim=1)
    products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, pairs)
    return products if dense is None else torch.cat([dense, products], dim=1)


# ---- blocks and packing


def _z(x: Tensor, blocks: Blocks, residual: Tensor | None) -> Tensor:
    z = x[blocks.position]
    return z if residual is None else z + residual[blocks.key]


def block_scales(x: Tensor, blocks: Blocks, bits: int, residual: Tensor | None = None) -> Tensor:
    largest = x.new_zeros(len(blocks))
    largest.scatter_reduce_(0, blocks.block, _z(x, blocks, residual).abs(), "amax")
    return scale_of(largest, limits(bits)[1])


def quantize_blocks(
    x: Tensor, blocks: Blocks, scale: Tensor, bits: int, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    z, spread, (low, high) = _z(x, blocks, residual), scale[blocks.block], limits(bits)
    if seed is None:
        codes = codes_of(z, spread, low, high).to(torch.int8)
    else:
        codes = (z / spread + uniform(blocks.key, seed)).floor_().clamp_(low, high).to(torch.int8)
    if residual is not None:
        residual[blocks.key] = z - codes.float() * spread
    return codes if out is None else out.copy_(codes)


def cast_blocks(
    x: Tensor, blocks: Blocks, dtype: torch.dtype, residual: Tensor | None = None, seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    z = _z(x, blocks, residual)
    stochastic = seed is not None and dtype == torch.bfloat16
    cast = bf16_stochastic(z, hash_of(blocks.key, seed or 0) >> 16) if stochastic else z.to(dtype)
    if residual is not None:
        residual[blocks.key] = torch.zeros_like(z) if dtype == torch.float32 else z - cast.float()  # avoids inf - inf
    return cast if out is None else out.copy_(cast)


def decode_blocks(stored: Tensor, blocks: Blocks, out: Tensor, scale: Tensor | None = None, add: bool = False) -> None:
    values = stored.float() if scale is None else stored.float() * scale[blocks.block]
    if add:
        values += out[blocks.position]
    out[blocks.position] = values


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, dim] of 2, 4 or 8 bits as uint8 [rows, ceil(dim * bits / 8)]; see `quant.packing`."""
    dim = codes.shape[1]
    width, parts = -(-dim * bits // 8), 8 // bits
    # In int16, since a sum of 255 does not fit in int8; as unsigned bytes at the end.
    shifted = torch.nn.functional.pad(codes, (0, width * parts - dim)).to(torch.int16).add_(1 << (bits - 1))
    packed = shifted[:, :width].clone()
    for part in range(1, parts):
        packed.add_(shifted[:, part * width : (part + 1) * width], alpha=1 << (bits * part))
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse: float32 [..., dim]. Arithmetic only: some exporters and runtimes do not support shifts."""
    rest, parts = packed.float(), []
    for part in range(8 // bits - 1, 0, -1):
        unit = float(1 << (bits * part))
        high = (rest * (1 / unit)).floor()
        rest = rest - high * unit
        parts.append(high)
    codes = torch.cat([rest, *reversed(parts)], dim=-1) if parts else rest
    return codes[..., :dim] - float(1 << (bits - 1))


def pack_nibbles(codes: Tensor) -> Tensor:
    return pack(codes[None], 4)[0]


def unpack_nibbles(stored: Tensor, count: int) -> Tensor:
    return unpack(stored, 4, count).to(torch.int8)


# ---- messages of rows


def _padded(part: Tensor) -> Tensor:
    return torch.nn.functional.pad(part, (0, -len(part) % 4))


def _count_dtype(rows: int) -> torch.dtype:
    return torch.uint16 if rows < 1 << 16 else torch.int32


def _kept(widths: Tensor) -> Tensor:
    """Which of the four bytes of an id are sent: bool [tables, 4]."""
    return torch.arange(4, device=widths.device) < widths[:, None]


def encode_rows(
    rows: Tensor, values: Tensor, bounds: Tensor, widths: Tensor, per_row: bool, dtype: torch.dtype, bits: int,
    given: Tensor | None, seed: int | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    count, dim = values.shape
    head = torch.tensor([count], dtype=torch.int32).view(torch.uint8).to(rows.device)
    if count == 0:
        return head, [4, 0, 4]
    counts = torch.searchsorted(rows, bounds).diff()
    table = torch.repeat_interleave(counts, output_size=count)
    ids = (rows - bounds[table]).to(torch.int32).view(torch.uint8).view(count, 4)[_kept(widths)[table]]
    parts = [_padded(torch.cat([head, counts.to(_count_dtype(count)).view(torch.uint8), ids]))]
    flat, blocks = values.reshape(-1), Blocks.of_rows(counts, dim, per_row)
    if bits:
        scale = block_scales(flat, blocks, bits) if given is None else given[counts > 0]
        codes = quantize_blocks(flat, blocks, scale, bits, None, seed)
        parts += [scale.view(torch.uint8), _padded(pack_nibbles(codes) if bits == 4 else codes.view(torch.uint8))]
    else:
        parts.append(_padded(cast_blocks(flat, blocks, dtype, None, seed).view(torch.uint8)))
    return torch.cat(parts), [len(parts[0]), len(parts[1]) if bits else 0, sum(map(len, parts))]


def decode_rows(
    message: Tensor, bounds: Tensor, widths: Tensor, dim: int, per_row: bool, dtype: torch.dtype, bits: int
) -> tuple[Tensor, Tensor]:
    count, device = int(message[:4].view(torch.int32)), message.device
    values = torch.empty(count, dim, device=device)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device), values
    number = _count_dtype(count)
    at = 4 + len(widths) * number.itemsize
    counts = message[4:at].view(number).to(torch.int64)
    table = torch.repeat_interleave(counts, output_size=count)
    ids = torch.zeros(count, 4, dtype=torch.uint8, device=device)
    end = at + int((counts * widths).sum())
    ids[_kept(widths)[table]] = message[at:end]
    rows = (ids.view(torch.int32)[:, 0].to(torch.int64) & MASK) + bounds[table]
    blocks, scale, stored = Blocks.of_rows(counts, dim, per_row), None, message[end + -end % 4 :]
    if bits:
        scale, stored = stored[: 4 * len(blocks)].view(torch.float32), stored[4 * len(blocks) :]
    if bits == 4:
        stored = unpack_nibbles(stored[: (blocks.total + 1) // 2], blocks.total)
    else:
        stored = stored[: blocks.total * dtype.itemsize].view(dtype)
    decode_blocks(stored, blocks, values.view(-1), scale)
    return rows, values


# ---- rows with their own scale behind them


def half_above(scale: Tensor) -> Tensor:
    """Scales float32 as float16: the smallest that is not below, at most the largest one; infinity and NaN stay."""
    most = torch.finfo(torch.float16).max
    sent = torch.where(scale.isfinite(), scale.clamp(max=most), scale).half()
    # Above 0, the next larger number is the next larger integer.
    up = (sent.float() < scale) & (sent < most)
    return (sent.view(torch.int16) + up.to(torch.int16)).view(torch.float16)


def pack_rows(values: Tensor, bits: int, half: bool, seed: int | None) -> Tensor:
    low, high = limits(bits)
    scale = scale_of(values.abs().amax(1), high) if len(values) else values.new_empty(0)
    sent = half_above(scale) if half else scale
    ratios = values / sent.float()[:, None]
    if seed is None:
        ratios.round_()
    else:
        ratios.add_(uniform(torch.arange(values.numel(), device=values.device).view(values.shape), seed)).floor_()
    codes = torch.where(sent.isfinite()[:, None], ratios.clamp_(low, high), 0.0).to(torch.int8)
    return torch.cat([pack(codes, bits), sent[:, None].view(torch.uint8)], 1)


def unpack_rows(message: Tensor, dim: int, bits: int, half: bool) -> Tensor:
    width = -(-dim * bits // 8)
    sent = message[:, width:].clone(memory_format=torch.contiguous_format)
    scale = sent.view(torch.float16 if half else torch.float32).float()
    return unpack(message[:, :width], bits, dim) * scale
