"""Packed tables of several bit widths: one packed collection for each width, and the order of their columns.

A row of 8-bit codes takes twice the bytes of one of 4 bits, so tables of another width lie in another tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dqrm.quant.packed import PackedEmbeddingBagCollection
from dqrm.quant.tables import TableLayout


class MixedPackedCollection(TableLayout):
    """A trained `QuantEmbeddingBagCollection` whose tables have several bit widths, for inference.

    Args:
        table_rows, embedding_dim, multi, pooling: as of `QuantEmbeddingBagCollection`.
        table_bits: bits of each table; two or more different numbers.
        parts: for each of these numbers, rising, its tables in their order.

    Attributes:
        parts: the same; `parts[i]` has the tables `members[i]`.
        order: int64 [T], where each table comes in the vectors of all parts, one part after the other.

    Raises:
        ValueError: parts that have other tables than `table_bits` says.
    """

    order: Tensor

    def __init__(
        self,
        table_rows: Sequence[int],
        embedding_dim: int,
        *,
        table_bits: Sequence[int],
        parts: Sequence[PackedEmbeddingBagCollection],
        multi: Sequence[bool] | None = None,
        pooling: str = "sum",
    ) -> None:
        super().__init__()
        self._init_layout(table_rows, embedding_dim, multi, pooling)
        self.table_bits, self.bits = tuple(table_bits), min(table_bits)
        self.members = members(table_bits)
        self.parts = torch.nn.ModuleList(parts)
        for (bits, numbers), part in zip(self.members.items(), parts, strict=True):
            rows, many = _chosen(self.table_rows, numbers), _chosen(self.multi, numbers)
            if (part.bits, list(part.table_rows), part.multi) != (bits, rows, many):
                raise ValueError(f"the part of {bits} bits has rows {list(part.table_rows)}, expected {rows}")
        placed = torch.tensor([table for tables in self.members.values() for table in tables])
        self.register_buffer("order", placed.argsort(), persistent=False)
        for number, tables in enumerate(self.members.values()):
            columns = torch.tensor([table for table in tables if table < self.num_single], dtype=torch.int64)
            self.register_buffer(f"columns_{number}", columns, persistent=False)

    @property
    def source(self) -> Any:
        """What codes are memory-mapped from; see `PackedEmbeddingBagCollection`."""
        return self.parts[0].source

    @source.setter
    def source(self, source: Any) -> None:
        for part in self.parts:
            part.source = source

    def check_source(self) -> None:
        """Raise where the file that the codes are mapped from was changed."""
        for part in self.parts:
            part.check_source()  # type: ignore[operator]

    def share(self, number: int, ids: Tensor, bags: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Of part `number`: its columns of ids [B, S], and its entries of `bags`, one per multi-valued table."""
        tables = list(self.members.values())[number]
        many = [bags[table - self.num_single] for table in tables if table >= self.num_single]
        return ids.index_select(1, self.get_buffer(f"columns_{number}")), many

    def forward(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """One pooled vector per sample and table: float32 [B, T, embedding_dim]; as `PackedEmbeddingBagCollection`."""
        for group in self._groups(ids, bags):
            self._refuse_outside(*group)  # a part would name the table by its own count
        vectors = [part(*self.share(number, ids, bags)) for number, part in enumerate(self.parts)]
        return torch.cat(vectors, dim=1).index_select(1, self.order)

    def table_values(self, number: int, ids: Tensor) -> Tensor:
        """As `PackedEmbeddingBagCollection.table_values`."""
        part, tables = next(pair for pair in zip(self.parts, self.members.values()) if number in pair[1])
        found: Tensor = part.table_values(tables.index(number), ids)  # type: ignore[operator]
        return found

    def extra_repr(self) -> str:
        return f"{len(self.table_rows)} tables, {self._starts[-1]} rows, {self.embedding_dim}"


PackedTables = PackedEmbeddingBagCollection | MixedPackedCollection


def members(table_bits: Sequence[int]) -> dict[int, list[int]]:
    """For each number of bits, rising, the numbers of the tables that have it."""
    return {
        bits: [number for number, other in enumerate(table_bits) if other == bits] for bits in sorted({*table_bits})
    }


def _chosen(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[number] for number in numbers]


def packed_collection(
    table_rows: Sequence[int],
    embedding_dim: int,
    table_bits: Sequence[int] | int,
    tensors: Callable[[str, int, list[int]], Mapping[str, Any]],
    *,
    multi: Sequence[bool] | None = None,
    pooling: str = "sum",
) -> PackedTables:
    """Packed tables of one width or of several.

    Args:
        table_bits: of each table, or of all.
        tensors: called as tensors(prefix, bits, tables) for each width, its tensors having names that begin with
            `prefix` ('' where all tables have the same bits); gives further arguments of
            `PackedEmbeddingBagCollection`: codes and scales.
    """
    multi = [False] * len(table_rows) if multi is None else list(multi)
    parts = [
        PackedEmbeddingBagCollection(
            _chosen(table_rows, numbers), embedding_dim, multi=_chosen(multi, numbers), pooling=pooling, bits=bits,
            **tensors(prefix, bits, numbers),
        )
        for prefix, bits, numbers in widths(table_bits, len(table_rows))
    ]  # fmt: skip
    if len(parts) == 1 or isinstance(table_bits, int):
        return parts[0]
    return MixedPackedCollection(
        table_rows, embedding_dim, table_bits=table_bits, parts=parts, multi=multi, pooling=pooling
    )


def widths(table_bits: Sequence[int] | int, tables: int) -> list[tuple[str, int, list[int]]]:
    """(prefix, bits, numbers of the tables) for each bit width; a single one has the prefix '', for tensors' names."""
    if isinstance(table_bits, int):
        return [("", table_bits, list(range(tables)))]
    of = members(table_bits)
    return [(f"parts.{part}." if len(of) > 1 else "", bits, of[bits]) for part, bits in enumerate(of)]
