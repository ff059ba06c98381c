"""Tables stored in 8 bits: a weight whose only copy is INT8 codes with one scale per row.

A row is `dim` codes from -127 to 127, one byte of padding where `dim` is odd, and its scale in bf16, side by side, so
that a lookup reads one place in memory: dim + 2 bytes instead of 4 * dim. The scale is max|row| / 127, rounded up to
bf16. An update decodes a row, adds to it and encodes it again with stochastic rounding
(`kernels.add_rows_stochastic`), so that updates smaller than a step act on average.
"""

from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels.layout import int8_row_width as row_width
from dqrm.quant.encoded_rows import EncodedRows

__all__ = ["Int8Rows", "row_width"]


class Int8Rows(EncodedRows):
    """A float32 weight [R, dim] stored as int8 rows; what it can do: `EncodedRows`.

    Args:
        stored: int8 [R, row_width(dim)], not copied.
        dim: values of a row.

    Raises:
        ValueError: `stored` has another dtype, another width, or is not contiguous.
    """

    kind = "INT8"

    @staticmethod
    def __new__(cls, stored: Tensor, dim: int) -> "Int8Rows":
        made: Int8Rows = cls._made(len(stored), dim, stored.device)
        made.stored = stored
        return made

    def _check_layout(self, stored: Tensor) -> None:
        expected = [len(self), row_width(self.shape[1])]
        if stored.dtype != torch.int8 or list(stored.shape) != expected:
            raise ValueError(f"stored rows are {stored.dtype} {list(stored.shape)}, expected torch.int8 {expected}")

    @classmethod
    def empty(cls, rows: int, dim: int, device: torch.device | str | None = None) -> "Int8Rows":
        """Uninitialized rows."""
        return cls(torch.empty(rows, row_width(dim), dtype=torch.int8, device=device), dim)

    @classmethod
    def encode(cls, values: Tensor) -> "Int8Rows":
        """Floating-point values [R, dim] to the nearest codes."""
        rows, dim = values.shape
        made = cls.empty(rows, dim, values.device)
        made.copy_(values)
        return made

    @property
    def operand(self) -> Tensor:
        return self.stored

    def part(self, start: int, stop: int) -> "Int8Rows":
        return Int8Rows(self.stored[start:stop], self.shape[1])

    def on(self, stored: Tensor) -> "Int8Rows":
        return Int8Rows(stored, self.shape[1])

    def encode_into(self, values: Tensor) -> None:
        kernels.encode_int8_rows(values, self.stored)

    def take_codes(self, other: "Int8Rows") -> bool:
        self.stored.copy_(other.stored)
        return True

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["stored"], self.shape[1]

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dim: int, size: Any, stride: Any) -> "Int8Rows":
        return Int8Rows(inner["stored"], dim)


torch.serialization.add_safe_globals([Int8Rows])
