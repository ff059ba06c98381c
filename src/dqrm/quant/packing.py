"""Codes <-> bytes: 4 codes of 2 bits, 2 of 4 bits or 1 of 8 bits in each uint8. Sixteen bits stay int16.

A row of `dim` codes takes w = ceil(dim * bits / 8) bytes. Byte j holds the codes j, j + w, j + 2w, ... of the row, the
first in its lowest bits, each plus 2**(bits-1) so that it is not negative (4 bits: first half in the low nibbles,
second half in the high ones). So a row unpacks into contiguous halves or quarters, and by arithmetic alone, which
every exporter and runtime supports, unlike shifts and masks. Padding (dim not a multiple of 8 / bits) holds code 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqrm.kernels import plain
from dqrm.quant.encoded_rows import EncodedRows
from dqrm.quant.uniform import check_dtype, quantize

PACKED_BITS = (2, 4, 8)


def packed_width(dim: int, bits: int) -> int:
    """Bytes of a packed row of `dim` codes of 2, 4 or 8 bits."""
    return -(-dim * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [rows, dim] of 2, 4 or 8 bits as uint8 [rows, packed_width(dim, bits)].

    Raises:
        ValueError: an unsupported number of bits, or codes of the wrong dtype.
    """
    check_dtype("codes", codes, torch.int8)
    if bits not in PACKED_BITS:
        raise ValueError(f"bits is {bits!r}, expected 2, 4 or 8")
    return plain.pack(codes, bits)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Packed codes uint8 [..., packed_width(dim, bits)] as signed codes in float32 [..., dim]. Arithmetic only.

    Raises:
        ValueError: packed has the wrong dtype.
    """
    check_dtype("packed", packed, torch.uint8)
    return plain.unpack(packed, bits, dim)


def storage(dim: int, bits: int) -> tuple[torch.dtype, int]:
    """Dtype and width of a stored row of `dim` weights: packed uint8, int16 codes (16 bits), or float32 (32 bits)."""
    if bits in PACKED_BITS:
        return torch.uint8, packed_width(dim, bits)
    return (torch.int16 if bits == 16 else torch.float32), dim


def storage_bytes(dim: int, bits: int) -> int:
    """Bytes of a stored row of `dim` weights."""
    dtype, width = storage(dim, bits)
    return dtype.itemsize * width


def encode(weight: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Weights [rows, dim] as they are stored: [rows, width], see `storage`. `scale`: float32, and `zero_point`: int32,
    broadcast."""
    if bits == 32:
        return weight.detach().float()
    codes = quantize(weight.detach(), scale, bits, zero_point)
    return codes if bits == 16 else pack(codes, bits)


def decode(stored: Tensor, scale: Tensor, bits: int, dim: int) -> Tensor:
    """The float32 values [..., dim] of stored rows; `scale` is broadcast against them."""
    if bits == 32:
        return stored
    codes = unpack(stored, bits, dim) if bits in PACKED_BITS else stored.float()
    return codes * scale


# Number of weights encoded at a time: a table is never held in FP32 a second time.
_CHUNK = 1 << 22


def pieces(table: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """A table [rows, dim] in views of some megabytes, at least one; of encoded rows in float32 copies.

    All but the last have a multiple of so many rows.
    """
    for piece in table.split(max(1, _CHUNK // max(1, table.shape[1] * multiple)) * multiple):
        yield piece.dequantize() if isinstance(piece, EncodedRows) else piece


class TableScales(NamedTuple):
    """The scales of one table."""

    scale: Tensor
    """float32 [groups]: one for all rows, or one for each `rows` of them."""
    zero_point: Tensor | None = None
    """int32 [groups]; None: codes are symmetric."""
    rows: int | None = None
    """Rows that share a scale; None: all."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each of these rows int64 [N]: [N, 1], or [1, 1] for all."""
        group = slice(None) if self.rows is None else rows.div(self.rows, rounding_mode="floor")
        return self.scale[group, None], None if self.zero_point is None else self.zero_point[group, None]


def joined(scales: Sequence[TableScales]) -> dict[str, Any]:
    """Those of several tables, as arguments of packed tables: `scale`, `zero_point` and `rows_per_scale`."""
    zero_points = [each.zero_point for each in scales if each.zero_point is not None]
    return {
        "scale": torch.cat([each.scale for each in scales]) if scales else torch.empty(0),
        "zero_point": torch.cat(zero_points) if zero_points else None,
        "rows_per_scale": scales[0].rows if scales else None,
    }


def encode_table(table: Tensor, scales: TableScales, bits: int) -> Tensor:
    """A float table [rows, dim] as it is stored (see `packing.storage`), in pieces."""
    dtype, width = storage(table.shape[1], bits)
    stored, done = torch.empty(len(table), width, dtype=dtype), 0
    for piece in pieces(table):
        scale, zero_point = scales.of(torch.arange(done, done + len(piece), device=table.device))
        stored[done : done + len(piece)] = encode(piece, scale, bits, zero_point)
        done += len(piece)
    return stored
