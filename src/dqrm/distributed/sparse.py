"""The exchange of the tables' gradients, as bytes: rows and values <-> messages, and the two ways to sum them.

A message holds rows in ascending order with their values:

    number of rows (int32) | rows of each table (uint16, int32 from 65,536 rows on) | ids | scales and values (`codecs`)

Ids count from the first row of their table and take the 1 to 4 bytes that the table's size needs. All-gather: every
rank gets every rank's message and adds them up. All-to-all: each row has an owner (row modulo ranks); ranks send owners
their rows, owners add up and encode again, and everybody gets the owners' messages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.distributed.codecs import Codec
from dqrm.kernels import Blocks


class RowCodec:
    """Rows of tables in one contiguous weight, and their gradients, as bytes.

    Args:
        table_rows: rows of each table.
        dim: values per row.
        codec: how values are encoded.
        per_row: one scale per row instead of one per table.
        device: where the gradients are.
    """

    def __init__(
        self, table_rows: Sequence[int], dim: int, codec: Codec, per_row: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.codec, self.dim, self.per_row, self.tables = codec, dim, per_row, len(table_rows)
        sizes = torch.tensor([0, *table_rows], dtype=torch.int64)
        self._bounds = sizes.cumsum(0).to(device)
        widths = [max(1, -(-(rows - 1).bit_length() // 8)) for rows in table_rows]
        self._widths = torch.tensor(widths, dtype=torch.int64, device=device)

    def encode(
        self, rows: Tensor, values: Tensor, seed: int = 0, scales: Tensor | None = None
    ) -> tuple[Tensor, dict[str, int]]:
        """A message, and the bytes of its parts: 'ids', 'scales', 'values'.

        Args:
            rows: int64 [U] in the contiguous weight, ascending, unique.
            values: float32 [U, dim].
            seed: of stochastic rounding.
            scales: float32 [tables], replacing those of the values.
        """
        if scales is not None and self.per_row:
            raise ValueError("got scales of tables, but the codec has one per row")
        message, (ids, scale_bytes, total) = kernels.encode_rows(
            rows, values, self._bounds, self._widths, self.per_row, self.codec.dtype, self.codec.bits, scales,
            seed if self.codec.stochastic else None,
        )  # fmt: skip
        return message, {"ids": ids, "scales": scale_bytes, "values": total - ids - scale_bytes}

    def decode(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """The rows int64 [U] and values float32 [U, dim] of a message."""
        return kernels.decode_rows(
            message, self._bounds, self._widths, self.dim, self.per_row, self.codec.dtype, self.codec.bits
        )

    def scales(self, rows: Tensor, values: Tensor) -> Tensor | None:
        """The scale of each table's values: float32 [tables], 0 for tables without values; None without scales."""
        if not self.codec.bits:
            return None
        scale = values.new_zeros(self.tables)
        if len(rows):
            counts = torch.searchsorted(rows, self._bounds).diff()
            blocks = Blocks.of_rows(counts, self.dim, per_row=False)
            scale[counts > 0] = kernels.block_scales(values.reshape(-1), blocks, self.codec.bits)
        return scale


def add_up(codec: RowCodec, messages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of several messages, in their order: unique rows in ascending order, and float32 values."""
    parts = [codec.decode(message) for message in messages]
    return kernels.sum_duplicates(torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts]))


def split(rows: Tensor, values: Tensor, owners: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of each owner, in ascending order."""
    owner = rows % owners
    return [(rows[owner == rank], values[owner == rank]) for rank in range(owners)]


def reduce(codec: RowCodec, messages: Sequence[Tensor], seed: int) -> tuple[Tensor, dict[str, int]]:
    """An owner's message: the sum of the ranks' messages to it, encoded again."""
    return codec.encode(*add_up(codec, messages), seed=seed)


def join(codec: RowCodec, messages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The owners' messages as one gradient; each row is in one of them only."""
    parts = [codec.decode(message) for message in messages]
    return torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts])
