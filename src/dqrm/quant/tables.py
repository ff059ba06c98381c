"""Embedding tables without quantization: layout in one shared weight, valid ids, pooling."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm.quant.uniform import no_tensor

INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
"""Dtypes of ids and offsets; all but the first two are converted."""


def integers(ids: Tensor, what: str = "ids are") -> Tensor:
    """The same ids as int32 or int64.

    Raises:
        TypeError: not a tensor. ValueError: not integers.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(no_tensor(what.partition(" ")[0], ids))
    if ids.dtype in (torch.int32, torch.int64):
        return ids
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{what} {ids.dtype}, expected integers: torch.int64 or torch.int32")
    return ids.long()


def refuse_id(id: int, table: int, rows: int) -> None:
    raise IndexError(f"id {id} is outside table {table}, which has {rows} rows (0 to {rows - 1})")


def pool(bag: Any, rows: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
    """The output of the `nn.EmbeddingBag` `bag` for ids `input`, the i-th of which looked up row i of `rows`."""
    input = integers(input)
    if input.dim() == 2 and input.shape[1] == 1 and per_sample_weights is None and bag.padding_idx is None:
        return rows  # one id per bag: nothing to pool
    # Pool by position, whatever the shape of the input.
    position = torch.arange(input.numel(), dtype=input.dtype, device=input.device).view(input.shape)
    padding = None
    if bag.padding_idx is not None:  # one more row, which pooling leaves out as its padding_idx
        padding = input.numel()
        position = position.masked_fill(input == bag.padding_idx, padding)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return F.embedding_bag(
        position,
        rows,
        offsets,
        mode=bag.mode,
        per_sample_weights=per_sample_weights,
        # Ids [B, L] have no offsets; torch 2.9 would take the last one that it generates for the end.
        include_last_offset=bag.include_last_offset and offsets is not None,
        padding_idx=padding,
    )


class TableLayout(nn.Module):
    """Mixin: tables stored in one tensor, one after the other, the single-valued ones first."""

    row_offsets: Tensor
    rows_per_table: Tensor

    def _init_layout(
        self, table_rows: Sequence[int], embedding_dim: int, multi: Sequence[bool] | None, pooling: str
    ) -> None:
        multi = [False] * len(table_rows) if multi is None else list(multi)
        if len(multi) != len(table_rows):
            raise ValueError(f"multi has {len(multi)} entries, expected one for each of {len(table_rows)} tables")
        if multi != sorted(multi):
            raise ValueError(f"multi is {multi}: the single-valued tables must come before the multi-valued ones")
        if any(rows < 1 for rows in table_rows):
            raise ValueError(f"table_rows is {list(table_rows)}: each table needs at least one row")
        if pooling not in ("sum", "mean"):
            raise ValueError(f"pooling is {pooling!r}, expected 'sum' or 'mean'")
        self.table_rows, self.embedding_dim = tuple(table_rows), embedding_dim
        self.num_single, self.pooling = multi.count(False), pooling
        self._starts = [0, *accumulate(self.table_rows)]  # in Python: a sum in int64 could wrap
        self.register_buffer("row_offsets", torch.tensor(self._starts[:-1], dtype=torch.int64), persistent=False)
        self.register_buffer("rows_per_table", torch.tensor(self.table_rows, dtype=torch.int64), persistent=False)

    @property
    def multi(self) -> list[bool]:
        """For each table, whether a sample has a bag of ids there instead of one."""
        return [number >= self.num_single for number in range(len(self.table_rows))]

    def _groups(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, int, int]]:
        """Ids that are looked up together, as (ids, first table, tables): single-valued tables, then each other one."""
        single, tables = self.num_single, len(self.table_rows)
        if not isinstance(ids, Tensor):
            raise TypeError(no_tensor("ids", ids))
        if ids.dim() != 2:
            raise ValueError(f"ids are {ids.dim()}-dimensional {list(ids.shape)}, expected [B, {single}]")
        if ids.shape[1] != single or len(bags) != tables - single:
            raise ValueError(
                f"got {ids.shape[1]} columns of ids and {len(bags)} of bags, expected {single} and {tables - single}"
            )
        for number, (values, offsets) in enumerate(bags, start=single):
            for name, given in (("values", values), ("offsets", offsets)):
                if not isinstance(given, Tensor):
                    raise TypeError(no_tensor(name, given))
                if given.dim() != 1:
                    raise ValueError(f"table {number} got {name} {list(given.shape)}, expected one dimension")
            if len(offsets) != len(ids):
                raise ValueError(
                    f"table {number} got {len(offsets)} offsets, expected one for each of {len(ids)} samples"
                )
        groups = [(integers(ids).contiguous(), 0, single)] if single else []
        return groups + [
            (integers(values).contiguous(), number, 1) for number, (values, _) in enumerate(bags, start=single)
        ]

    def rows(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The rows of the shared weight that a lookup of these ids and bags reads: int64 [N], repeated or not.

        Raises:
            IndexError: an id outside its table (on CPU).
        """
        rows = [self.row_offsets.new_empty(0)]
        for part, first, tables in self._groups(ids, bags):
            self._refuse_outside(part, first, tables)
            rows.append((part.view(-1, tables) + self.row_offsets[first : first + tables]).view(-1))
        return torch.cat(rows)

    def _pooled(self, looked_up: list[Tensor], samples: int, bags: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The rows [N, dim] that each group looked up as one vector per sample and table [B, T, dim]."""
        vectors = [looked_up[0].view(samples, self.num_single, self.embedding_dim)] if self.num_single else []
        if not bags:
            empty = (samples, 0, self.embedding_dim)
            return vectors[0] if vectors else self.row_offsets.new_empty(empty, dtype=torch.float32)
        for part, (values, offsets) in zip(looked_up[-len(bags) :], bags):
            position = torch.arange(len(values), device=values.device)
            vectors.append(
                F.embedding_bag(position, part, integers(offsets, "offsets are").long(), mode=self.pooling)[:, None]
            )
        return torch.cat(vectors, dim=1)

    def _refuse_outside(self, ids: Tensor, first: int, tables: int) -> None:
        """Raise IndexError for an id outside its table; on CPU only: elsewhere the check would stall every step."""
        if ids.device.type != "cpu" or ids.numel() == 0:
            return
        ids = ids.view(-1, tables)
        outside = (ids < 0) | (ids >= self.rows_per_table[first : first + tables])
        if outside.any():
            sample, column = outside.nonzero()[0].tolist()
            refuse_id(int(ids[sample, column]), first + column, self.table_rows[first + column])
