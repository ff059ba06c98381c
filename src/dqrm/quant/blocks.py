"""Blocks: runs of values that share a scale, encoded for the wire and decoded again.

A gradient is cut into blocks (a channel of a weight, a bucket of K values, a table's rows, a row); each block is
encoded with the quantizer of `uniform`, on a scale of its own, or as bf16, or as it is. With a residual,
z = x + residual is encoded, and the residual becomes z - value(z): error compensation (DQRM paper). Stochastic rounding
is floor(z / scale + u), u from a hash of (seed, key): the same in any process, in any order and on any device.

Everything has a compiled path and a plain torch path of the same bits.
"""

from functools import cached_property

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.quant.packing import pack, unpack
from dqrm.quant.uniform import code_limits, dequantize, quantize, scale_from_max

MASK = 0xFFFFFFFF


def mix(*parts: int) -> int:
    """A 32-bit seed of several whole numbers."""
    found = 0
    for part in parts:
        found = (found ^ part ^ part >> 32) * 0x9E3779B1 & MASK
        found = (found ^ found >> 15) * 0x85EBCA77 & MASK
        found ^= found >> 13
    return found


class Blocks:
    """Where blocks lie in a flat tensor, in the order in which they are encoded.

    Args:
        starts: int64 [N], position of each block's first value.
        lengths: int64 [N], values of each block.
        keys: int64 [N], position of each block's residual and in the random stream; default: `starts`.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, keys: Tensor | None = None) -> None:
        self.starts, self.lengths = starts.contiguous(), lengths.contiguous()
        self.keys = self.starts if keys is None else keys.contiguous()
        ends = lengths.cumsum(0)
        self.offsets = ends - self.lengths
        self.total = int(ends[-1]) if len(ends) else 0

    def __len__(self) -> int:
        return len(self.starts)

    def packed(self) -> "Blocks":
        """The same blocks, lying one after the other in a tensor of their values; keys stay."""
        return Blocks(self.offsets, self.lengths, self.keys)

    @cached_property
    def block(self) -> Tensor:
        """int64 [total]: the block of each value."""
        return torch.repeat_interleave(self.lengths)

    @cached_property
    def _within(self) -> Tensor:
        return torch.arange(self.total, device=self.starts.device) - self.offsets[self.block]

    @cached_property
    def position(self) -> Tensor:
        """int64 [total]: where each value lies."""
        return self.starts[self.block] + self._within

    @cached_property
    def key(self) -> Tensor:
        """int64 [total]: the key of each value."""
        return self.keys[self.block] + self._within


def _z(x: Tensor, blocks: Blocks, residual: Tensor | None) -> Tensor:
    z = x[blocks.position]
    return z if residual is None else z + residual[blocks.key]


def _noise(blocks: Blocks, seed: int) -> Tensor:
    """16 random bits for each value, int64 [total]."""
    hashed = blocks.key * 0x9E3779B1 & MASK ^ seed
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B & MASK
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 & MASK
    return (hashed ^ hashed >> 16) >> 16


def block_scales(x: Tensor, blocks: Blocks, bits: int, residual: Tensor | None = None) -> Tensor:
    """The scale of each block of x + residual: float32 [N]. x: float32, flat."""
    if kernels.fits(x, residual, blocks.starts):
        scale = x.new_empty(len(blocks))
        kernels.block_scales(x, residual, blocks.starts, blocks.lengths, blocks.keys, code_limits(bits)[1], scale)
        return scale
    largest = x.new_zeros(len(blocks))
    largest.scatter_reduce_(0, blocks.block, _z(x, blocks, residual).abs(), "amax")
    return scale_from_max(largest, bits)


def quantize_blocks(
    x: Tensor,
    blocks: Blocks,
    scale: Tensor,
    bits: int,
    residual: Tensor | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Codes of x + residual: int8 [total], in the order of the blocks; the residual is brought up to date in place.

    Args:
        x: float32, flat.
        scale: float32 [N].
        residual: float32, flat, indexed by the blocks' keys.
        seed: below 2**32; rounds stochastically instead of half to even.
        out: where the codes go; default: a new tensor.
    """
    if kernels.fits(x, residual, blocks.starts, scale):
        codes = torch.empty(blocks.total, dtype=torch.int8) if out is None else out
        kernels.quantize_blocks(
            x, residual, blocks.starts, blocks.lengths, blocks.keys, blocks.offsets, scale, code_limits(bits), seed,
            codes,
        )  # fmt: skip
        return codes
    z, spread = _z(x, blocks, residual), scale[blocks.block]
    if seed is None:
        codes = quantize(z, spread, bits)
    else:
        low, high = code_limits(bits)
        codes = (z / spread + (_noise(blocks, seed).float() + 0.5) * 2**-16).floor_().clamp_(low, high).to(torch.int8)
    if residual is not None:
        residual[blocks.key] = z - dequantize(codes, spread)
    return codes if out is None else out.copy_(codes)


def cast_blocks(
    x: Tensor,
    blocks: Blocks,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    seed: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x + residual as `dtype` (bfloat16 or float32) [total]; otherwise as `quantize_blocks`."""
    if kernels.fits(x, residual, blocks.starts):
        out = torch.empty(blocks.total, dtype=dtype) if out is None else out
        kernels.cast_blocks(
            x, residual, blocks.starts, blocks.lengths, blocks.keys, blocks.offsets, dtype, seed, out
        )  # fmt: skip
        return out
    z = _z(x, blocks, residual)
    if seed is None or dtype == torch.float32:
        cast = z.to(dtype)
    else:
        rounded = (z.view(torch.int32) + _noise(blocks, seed).int() & -0x10000).view(torch.float32)
        cast = torch.where(z.isfinite(), rounded, z).to(dtype)
    if residual is not None:
        residual[blocks.key] = torch.zeros_like(z) if dtype == torch.float32 else z - cast.float()  # not inf - inf
    return cast if out is None else out.copy_(cast)


def decode_blocks(stored: Tensor, blocks: Blocks, out: Tensor, scale: Tensor | None = None, add: bool = False) -> None:
    """out[where the blocks lie] = the encoded values, or that much more where `add`.

    Args:
        stored: [total], int8 codes (with `scale`, float32 [N]), bfloat16 or float32.
        out: float32, flat.
    """
    if kernels.fits(out, blocks.starts, scale):
        kernels.decode_blocks(
            stored, stored.dtype, scale, blocks.starts, blocks.lengths, blocks.offsets, out, add
        )  # fmt: skip
        return
    values = stored.float() if scale is None else dequantize(stored, scale[blocks.block])
    if add:
        values += out[blocks.position]
    out[blocks.position] = values


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [total] of 4 or 8 bits as uint8 bytes, all as one row of `packing` (8 bits: the codes themselves)."""
    if bits == 8:
        return codes.view(torch.uint8)
    if codes.is_cpu and kernels.native():
        out = torch.empty((len(codes) + 1) // 2, dtype=torch.uint8)
        kernels.pack_nibbles(codes, out)
        return out
    return pack(codes[None], bits)[0]


def unpack_codes(stored: Tensor, bits: int, total: int) -> Tensor:
    """The inverse: codes int8 [total]."""
    if bits == 8:
        return stored.view(torch.int8)
    if stored.is_cpu and kernels.native():
        codes = torch.empty(total, dtype=torch.int8)
        kernels.unpack_nibbles(stored, codes)
        return codes
    return unpack(stored, bits, total).to(torch.int8)
