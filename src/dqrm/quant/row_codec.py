"""Rows as messages: each is its packed codes and its own scale behind them, so a message can be cut between any rows.

A row of `dim` values takes packed_width(dim, bits) bytes of codes, as `quant.packing` lays them out, and 4 (FP32) or 2
(FP16) of scale. The scale is that of the row alone, max(max|row|, 1e-8) / n; so whoever has the row has the scale, and
training on such messages, evaluation and export agree on it without exchanging it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import Blocks
from dqrm.kernels.plain import half_above
from dqrm.quant.packing import packed_width
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
        blocks = Blocks.of_rows(torch.tensor([len(values)], device=values.device), self.dim, per_row=True)
        scales = kernels.block_scales(values.view(-1), blocks, self.bits)
        return half_above(scales).float() if self.scale == "fp16" else scales

    def encode(self, values: Tensor, seed: int = 0) -> Tensor:
        """Values float32 [N, dim] as uint8 [N, row_bytes].

        Args:
            seed: of stochastic rounding, below 2**32: equal values with equal seeds give equal bytes.

        Raises:
            ValueError: values of the wrong dtype or shape.
        """
        values = self._checked(values)
        return kernels.pack_rows(values, self.bits, self.scale == "fp16", seed if self.stochastic else None)

    def decode(self, message: Tensor) -> Tensor:
        """The inverse: uint8 [N, row_bytes] as float32 [N, dim].

        Raises:
            ValueError: a message of the wrong dtype or shape.
        """
        check_dtype("message", message, torch.uint8)
        if message.ndim != 2 or message.shape[1] != self.row_bytes:
            raise ValueError(f"message is {list(message.shape)}, expected [N, {self.row_bytes}]")
        return kernels.unpack_rows(message.contiguous(), self.dim, self.bits, self.scale == "fp16")

    def fake_quantize(self, values: Tensor) -> Tensor:
        """Values float32 [N, dim] as a receiver decodes them, rounded half to even whatever `stochastic` says.

        The gradient passes unchanged (STE): a forward pass through the codec, on one process.

        Raises:
            ValueError: values of the wrong dtype or shape.
        """
        return fake_quantize(values, self.scales(values.detach())[:, None], self.bits)

    def _checked(self, values: Tensor) -> Tensor:
        check_dtype("values", values, torch.float32)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"values are {list(values.shape)}, expected [N, {self.dim}]")
        return values.contiguous()
