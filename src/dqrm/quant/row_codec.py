"""Rows as messages: each is its packed codes and its own scale behind them, so a message can be cut between any rows.

A row of `dim` values takes packed_width(dim, bits) bytes of codes, as `quant.packing` lays them out, and 4 (FP32) or 2
(FP16) of scale. The scale is that of the row alone, max(max|row|, 1e-8) / n; so whoever has the row has the scale, and
training on such messages, evaluation and export agree on it without exchanging it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import Blocks, GroupMap
from dqrm.quant.packing import pack, packed_width
from dqrm.quant.uniform import check_dtype, fake_quantize

CODECS: dict[str, int] = {"int2": 2, "int4": 4, "int8": 8}
"""Codecs of rows by name: bits of a code, one that `quant.packing` packs."""
SCALES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
"""What the scale of a row can be sent as."""


@dataclass(frozen=True)
class RowCodec:
    """How rows are encoded.

    Args:
        dim: values of a row.
        name: 'int2', 'int4' or 'int8'.
        scale: 'fp32' or 'fp16'; an FP16 scale is rounded up, so that no code is clamped, and is at most 65,504: a row
            beyond n times that is clamped.
        stochastic: whether rounding is stochastic (unbiased, for gradients) instead of half to even.

    Raises:
        ValueError: dim below 1, or an unknown name or scale.
    """

    dim: int
    name: str = "int4"
    scale: str = "fp32"
    stochastic: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"dim is {self.dim!r}, expected a whole number, 1 or more")
        for field, value, known in (("name", self.name, CODECS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise ValueError(f"{field} is {value!r}, expected {' or '.join(map(repr, known))}")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return CODECS[self.name]

    @property
    def row_bytes(self) -> int:
        """Bytes of an encoded row."""
        return packed_width(self.dim, self.bits) + SCALES[self.scale].itemsize

    def scales(self, values: Tensor) -> Tensor:
        """The scale of each row of values float32 [N, dim]: float32 [N], a number that `scale` can represent.

        A row with NaN has the scale NaN, one with an infinite value an infinite one, and both are decoded as NaN.

        Raises:
            ValueError: values of the wrong dtype or shape.
        """
        values = self._checked(values)
        return self._representable(kernels.block_scales(values.view(-1), self._blocks(values), self.bits))

    def encode(self, values: Tensor, seed: int = 0) -> Tensor:
        """Values float32 [N, dim] as uint8 [N, row_bytes].

        Args:
            seed: of stochastic rounding, below 2**32: equal values with equal seeds give equal bytes.

        Raises:
            ValueError: values of the wrong dtype or shape.
        """
        values = self._checked(values)
        flat, blocks = values.view(-1), self._blocks(values)
        scale = self._representable(kernels.block_scales(flat, blocks, self.bits))
        codes = kernels.quantize_blocks(flat, blocks, scale, self.bits, None, seed if self.stochastic else None)
        sent = scale.to(SCALES[self.scale])[:, None].view(torch.uint8)
        return torch.cat([self._packed(codes.view(values.shape)), sent], 1)

    def decode(self, message: Tensor) -> Tensor:
        """The inverse: uint8 [N, row_bytes] as float32 [N, dim].

        Raises:
            ValueError: a message of the wrong dtype or shape.
        """
        check_dtype("message", message, torch.uint8)
        if message.ndim != 2 or message.shape[1] != self.row_bytes:
            raise ValueError(f"message is {list(message.shape)}, expected [N, {self.row_bytes}]")
        count, width = len(message), packed_width(self.dim, self.bits)
        codes = message[:, :width].contiguous()
        sent = message[:, width:].clone(memory_format=torch.contiguous_format).view(SCALES[self.scale])
        ids = torch.arange(count, device=message.device)
        zero = ids.new_zeros(1)
        each = GroupMap(zero, zero, 0)
        scale = sent[:, 0].float()
        return kernels.lookup_packed(ids, zero, zero + count, codes, self.bits, scale, self.dim, None, each)[0]

    def fake_quantize(self, values: Tensor) -> Tensor:
        """Values float32 [N, dim] as a receiver decodes them, rounded half to even whatever `stochastic` says.

        The gradient passes unchanged (STE): a forward pass through the codec, on one process.

        Raises:
            ValueError: values of the wrong dtype or shape.
        """
        return fake_quantize(values, self.scales(values.detach())[:, None], self.bits)

    def _packed(self, codes: Tensor) -> Tensor:
        """`packing.pack`, by compiled code where that has it: the halves of all rows are those of one long row."""
        if self.bits != 4 or self.dim % 2:
            return pack(codes, self.bits)
        halves = codes.view(len(codes), 2, self.dim // 2).transpose(0, 1)
        return kernels.pack_nibbles(halves.reshape(-1)).view(len(codes), self.dim // 2)

    def _representable(self, scale: Tensor) -> Tensor:
        if self.scale == "fp32":
            return scale
        sent = torch.where(scale.isfinite(), scale.clamp(max=torch.finfo(torch.float16).max), scale).half()
        # Above 0, the next larger number is the next larger integer.
        up = (sent.float() < scale) & (sent < torch.finfo(torch.float16).max)
        return (sent.view(torch.int16) + up.to(torch.int16)).view(torch.float16).float()

    def _blocks(self, values: Tensor) -> Blocks:
        return Blocks.of_rows(torch.tensor([len(values)], device=values.device), self.dim, per_row=True)

    def _checked(self, values: Tensor) -> Tensor:
        check_dtype("values", values, torch.float32)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"values are {list(values.shape)}, expected [N, {self.dim}]")
        return values.contiguous()
