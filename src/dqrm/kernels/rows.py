"""Rows of tables in plain torch: how they are stored, read, and rounded. The functions correspond to `common.h`."""

import torch
from torch import Tensor

from dqrm.kernels.layout import Tiers, Weight

SMALLEST_MAXIMUM = 1e-8
MASK = 0xFFFFFFFF


def scale_of(largest: Tensor, highest: int | Tensor) -> Tensor:
    """Where the highest code is 0 (not quantized): 0."""
    scale = largest.float().clamp(min=SMALLEST_MAXIMUM) / highest
    return torch.where(highest == 0, 0.0, scale) if isinstance(highest, Tensor) else scale


def hash_of(position: Tensor, seed: int) -> Tensor:
    """murmur3's finalizer of positions and a seed: 32 bits in int64; the same on any device, in any order."""
    hashed = position * 0x9E3779B1 & MASK ^ seed
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & MASK
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & MASK
    return hashed ^ hashed >> 16


def uniform(position: Tensor, seed: int) -> Tensor:
    """A number between 0 and 1 for each position (int64) and a seed below 2**32: float32, one of 2**16, odd / 2**17."""
    return ((hash_of(position, seed) >> 16).float() + 0.5) * 2**-16


def bf16_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """Stochastically rounded bf16: 16 random bits are added to the low 16 bits, which are then cut off."""
    rounded = (x.view(torch.int32) + random.int() & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def values_per_row(weight: Weight) -> int:
    """Of a weight; of int8 rows of an odd dim one more, which is 0."""
    if isinstance(weight, Tiers):
        return weight.dim
    return weight.shape[1] - 2 if weight.dtype == torch.int8 else weight.shape[1]


def read_rows(weight: Weight, rows: Tensor, dim: int) -> Tensor:
    """Rows of a weight, float32 [N, dim]."""
    if isinstance(weight, Tiers):
        cold, slots = weight.cold.index_select(0, rows), slots_of(weight, rows)
        values = int4_codes(cold, dim).float() * bf16_at_end(cold)
        hot = slots >= 0
        values[hot] = _int8_values(weight.hot[slots[hot]], dim)
        return values
    stored = weight.detach().index_select(0, rows)
    return stored.float() if weight.dtype != torch.int8 else _int8_values(stored, dim)


def _int8_values(stored: Tensor, dim: int) -> Tensor:
    return stored[:, :dim].float() * bf16_at_end(stored)


def bf16_at_end(stored: Tensor) -> Tensor:
    """The scales [N, 1] of stored rows, in float32."""
    return _own(stored[:, -2:]).view(torch.bfloat16).float()


def _own(x: Tensor) -> Tensor:
    """A copy that can be viewed as another dtype."""
    return x.clone(memory_format=torch.contiguous_format)


def slots_of(weight: Tiers, rows: Tensor) -> Tensor:
    """The slot of each row int64 [N], or -1: int64 [N]."""
    cold = weight.cold.index_select(0, rows)
    return torch.where(cold[:, -1] >= 0x80, _own(cold[:, :4]).view(torch.int32)[:, 0].long(), -1)


def int4_codes(cold: Tensor, dim: int) -> Tensor:
    """The codes int8 [N, dim] of rows of 4 bits, the first half in the low bits."""
    half = cold[:, : -(-dim // 2)]
    return torch.cat([half & 15, half >> 4], 1)[:, :dim].to(torch.int8) - 8


def _encoded(values: Tensor, highest: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, dim] up to the highest, and scales bf16 [N, 1]: max|row| / highest, rounded up."""
    largest = values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
    scale = scale_of(largest, highest)
    finite = scale.isfinite()
    up = torch.where(finite, scale.view(torch.int32) + 0xFFFF >> 16, torch.where(scale.isnan(), 0x7FC0, 0x7F80))
    stored = up.to(torch.int16).view(torch.bfloat16)
    codes = values / stored.float()
    codes = codes.round() if noise is None else (codes + noise).floor()
    return torch.where(finite, codes.clamp(-highest, highest), 0.0).to(torch.int8), stored


def int4_rows(values: Tensor, noise: Tensor | None = None) -> Tensor:
    """Values [N, dim] as rows of 4 bits, uint8 [N, int4_row_width(dim)]; otherwise as `int8_rows`."""
    codes, stored = _encoded(values, 7, noise)
    dim = codes.shape[1]
    half = -(-dim // 2)
    raised = torch.full((len(codes), 2 * max(half, 4)), 8, dtype=torch.uint8, device=codes.device)
    width = raised.shape[1] // 2
    raised[:, :half] = (codes[:, :half] + 8).to(torch.uint8)
    raised[:, width : width + dim - half] = (codes[:, half:] + 8).to(torch.uint8)
    return torch.cat([raised[:, :width] | raised[:, width:] << 4, stored.view(torch.uint8)], 1)


def int8_rows(values: Tensor, noise: Tensor | None = None) -> Tensor:
    """Values [N, dim] as int8 rows: codes on the scale max|row| / 127, rounded up to bf16, and that scale.

    To the nearest code, or stochastically by `noise` from 0 to 1. NaN or infinite: codes 0 and a scale that is NaN or
    infinite, so NaN comes back.
    """
    codes, stored = _encoded(values, 127, noise)
    padding = codes.new_zeros(len(codes), values.shape[1] % 2)
    return torch.cat([codes, padding, stored.view(torch.int8)], 1)


def encode_int8_rows(values: Tensor, out: Tensor) -> None:
    out.copy_(int8_rows(values))
