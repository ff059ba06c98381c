"""Gradient codecs: blocks of values <-> bytes on the wire.

An encoded part is its scales (float32, one per block; int8 and int4 only), then its values (float32, bf16, int8, or two
int4 codes per byte), padded to four bytes. Exactly these bytes are sent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import Blocks

_BITS = {"int8": 8, "int4": 4}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def mix(*parts: int) -> int:
    """A 32-bit seed of several whole numbers, for stochastic rounding."""
    seed = 0
    for part in parts:
        seed = (seed ^ part ^ part >> 32) * 0x9E3779B1 & 0xFFFFFFFF
        seed = (seed ^ seed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        seed ^= seed >> 13
    return seed


def padded(count: int) -> int:
    """`count` bytes, rounded up to a multiple of four, so that what follows can be read as float32."""
    return -(-count // 4) * 4


@dataclass(frozen=True)
class Codec:
    """How gradients are encoded.

    Args:
        name: 'fp32', 'bf16', 'int8' or 'int4'.
        stochastic: whether rounding is stochastic instead of to nearest.
    """

    name: str
    stochastic: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for codecs without codes."""
        return _BITS.get(self.name, 0)

    @property
    def value_bits(self) -> int:
        """Bits of a value on the wire."""
        return self.bits or 8 * _DTYPES[self.name].itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of values before they are packed: int8 codes, bfloat16 or float32."""
        return torch.int8 if self.bits else _DTYPES[self.name]

    @property
    def lossless(self) -> bool:
        return self.name == "fp32"

    def sizes(self, blocks: int, values: int) -> tuple[int, int]:
        """Bytes of the scales and of the values (padding included) of `blocks` blocks with `values` values in total."""
        if self.bits:
            return 4 * blocks, padded(-(-values * self.bits // 8))
        return 0, padded(values * _DTYPES[self.name].itemsize)

    def scales(self, x: Tensor, blocks: Blocks, residual: Tensor | None = None) -> Tensor | None:
        """The scales on which `encode` would put x + residual: float32 [blocks]; None where the codec has none."""
        return kernels.block_scales(x, blocks, self.bits, residual) if self.bits else None

    def encode(
        self,
        x: Tensor,
        blocks: Blocks,
        residual: Tensor | None = None,
        seed: int = 0,
        scales: Tensor | None = None,
    ) -> Tensor:
        """x + residual as bytes: uint8 [sum(sizes)]. The residual is set to the encoding error, in place.

        Args:
            x: float32, flat.
            blocks: the values that are encoded, in this order.
            residual: float32, flat, by the blocks' keys.
            seed: of stochastic rounding, below 2**32.
            scales: as `scales` gives them, or larger.
        """
        out = x.new_zeros(sum(self.sizes(len(blocks), blocks.total)), dtype=torch.uint8)
        self.write(out, *self.quantize(x, blocks, residual, seed, scales))
        return out

    def quantize(
        self,
        x: Tensor,
        blocks: Blocks,
        residual: Tensor | None,
        seed: int,
        scales: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The values [total] of `dtype` that `encode` writes, and the scales [blocks], None where there are none."""
        noise = seed if self.stochastic else None
        if not self.bits:
            return kernels.cast_blocks(x, blocks, self.dtype, residual, noise, out), None
        if scales is None:
            scales = kernels.block_scales(x, blocks, self.bits, residual)
        return kernels.quantize_blocks(x, blocks, scales, self.bits, residual, noise, out), scales

    def write(self, out: Tensor, values: Tensor, scales: Tensor | None) -> None:
        """Scales and values as bytes into `out`."""
        at = 0
        if scales is not None:
            at = scales.nbytes
            out[:at].copy_(scales.view(torch.uint8))
        stored = kernels.pack_nibbles(values) if self.bits == 4 else values.view(torch.uint8)
        out[at : at + len(stored)].copy_(stored)

    def decode(self, message: Tensor, blocks: Blocks, out: Tensor, add: bool = False) -> None:
        """The inverse: values into `out` (float32, flat) at the blocks' positions, or added to it."""
        scale_bytes, value_bytes = self.sizes(len(blocks), blocks.total)
        stored = message[scale_bytes : scale_bytes + value_bytes]
        if self.bits == 4:
            stored = kernels.unpack_nibbles(stored[: (blocks.total + 1) // 2], blocks.total)
        else:
            stored = stored.view(self.dtype)[: blocks.total]
        scales = message[:scale_bytes].view(torch.float32) if self.bits else None
        kernels.decode_blocks(stored, blocks, out, scales, add)
