"""The exchange of the tables' gradients, as bytes: rows and values <-> messages, and the two ways to sum them.

A message holds rows in rising order with their values:

    number of rows (int32) | rows of each table (uint16, int32 from 65,536 rows on) | ids | scales and values (`codecs`)

Ids count from the first row of their table and take the 1 to 4 bytes that the table's size needs. All-gather: every
rank gets every rank's message and adds them up. All-to-all: each row has an owner (row modulo ranks); ranks send owners
their rows, owners add up and encode again, and everybody gets the owners' messages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.distributed.codecs import Codec, padded
from dqrm.quant.blocks import Blocks, block_scales
from dqrm.quant.rows import sum_duplicates


class RowCodec:
    """Rows of tables that lie in one weight, and their gradients, as bytes.

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
        self._kept = (torch.arange(4) < torch.tensor(widths, dtype=torch.int64)[:, None]).to(device)
        self._widths = torch.tensor(widths, dtype=torch.int64, device=device)

    def encode(
        self, rows: Tensor, values: Tensor, seed: int = 0, scales: Tensor | None = None
    ) -> tuple[Tensor, dict[str, int]]:
        """A message, and the bytes of its parts: 'ids', 'scales', 'values'.

        Args:
            rows: int64 [U] in the contiguous weight, rising, none twice.
            values: float32 [U, dim].
            seed: of stochastic rounding.
            scales: float32 [tables], instead of the values' own.
        """
        if scales is not None and self.per_row:
            raise ValueError("scales are of tables, but each row has one of its own")
        count = len(rows)
        if kernels.fits(rows, values, scales):
            message, (used, scale_bytes, total) = kernels.encode_rows(
                rows, values, self._bounds, self._widths, self.per_row, self.codec.dtype, self.codec.bits, scales,
                seed if self.codec.stochastic else None,
            )  # fmt: skip
            return message, {"ids": used, "scales": scale_bytes, "values": total - used - scale_bytes}
        head = [torch.tensor([count], dtype=torch.int32).view(torch.uint8).to(rows.device)]
        if count == 0:
            return head[0], {"ids": 4, "scales": 0, "values": 0}
        counts, blocks = self._cut(rows)
        head.append(counts.to(torch.uint16 if count < 1 << 16 else torch.int32).view(torch.uint8))
        table = torch.repeat_interleave(counts, output_size=count)
        ids = (rows - self._bounds[table]).to(torch.int32).view(torch.uint8).view(count, 4)
        head.append(ids[self._kept[table]])
        used = sum(map(len, head))
        head.append(head[0].new_zeros(padded(used) - used))
        if scales is not None:
            scales = scales[counts > 0]
        body = self.codec.encode(values.reshape(-1), blocks, None, seed, scales)
        scale_bytes, value_bytes = self.codec.sizes(len(blocks), blocks.total)
        return torch.cat([*head, body]), {"ids": padded(used), "scales": scale_bytes, "values": value_bytes}

    def decode(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """The rows int64 [U] and values float32 [U, dim] of a message."""
        count, device = int(message[:4].view(torch.int32)), message.device
        rows, values = torch.empty(count, dtype=torch.int64, device=device), torch.empty(count, self.dim, device=device)
        if count == 0:
            return rows, values
        if kernels.fits(message, rows):
            kernels.decode_rows(
                message, self._bounds, self._widths, self.per_row, self.codec.dtype, self.codec.bits, rows, values
            )
            return rows, values
        dtype = torch.uint16 if count < 1 << 16 else torch.int32
        at = 4 + self.tables * dtype.itemsize
        counts = message[4:at].view(dtype).to(torch.int64)
        table = torch.repeat_interleave(counts, output_size=count)
        ids = torch.zeros(count, 4, dtype=torch.uint8, device=device)
        kept = self._kept[table]
        end = at + int((counts * self._widths).sum())
        ids[kept] = message[at:end]
        torch.add(ids.view(torch.int32)[:, 0].to(torch.int64) & 0xFFFFFFFF, self._bounds[table], out=rows)
        _, blocks = self._cut(rows, counts)
        self.codec.decode(message[padded(end) :], blocks, values.view(-1))
        return rows, values

    def scales(self, rows: Tensor, values: Tensor) -> Tensor | None:
        """The scale of each table's values: float32 [tables], 0 where a table has none; None without scales."""
        if not self.codec.bits:
            return None
        found = values.new_zeros(self.tables)
        if len(rows):
            counts, blocks = self._cut(rows)
            found[counts > 0] = block_scales(values.reshape(-1), blocks, self.codec.bits)
        return found

    def _cut(self, rows: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Blocks]:
        """Rows of each table int64 [tables], and the blocks of the values."""
        if counts is None:
            ends = torch.searchsorted(rows, self._bounds)
            counts = ends.diff()
        if self.per_row:
            starts = torch.arange(0, len(rows) * self.dim, self.dim, device=rows.device)
            return counts, Blocks(starts, torch.full_like(starts, self.dim))
        lengths = counts[counts > 0] * self.dim
        return counts, Blocks(lengths.cumsum(0) - lengths, lengths)


def add_up(codec: RowCodec, messages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of several messages, in their order: rows rising, none twice, and float32 values."""
    parts = [codec.decode(message) for message in messages]
    return sum_duplicates(torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts]))


def split(rows: Tensor, values: Tensor, owners: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of each owner, in rising order."""
    owner = rows % owners
    return [(rows[owner == rank], values[owner == rank]) for rank in range(owners)]


def reduce(codec: RowCodec, messages: Sequence[Tensor], seed: int) -> tuple[Tensor, dict[str, int]]:
    """An owner's message: the sum of what the ranks sent it, encoded anew."""
    return codec.encode(*add_up(codec, messages), seed=seed)


def join(codec: RowCodec, messages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The owners' messages as one gradient; no row is in two of them."""
    parts = [codec.decode(message) for message in messages]
    return torch.cat([rows for rows, _ in parts]), torch.cat([values for _, values in parts])
