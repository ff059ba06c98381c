"""Embedding tables that are quantized as they are looked up: only the rows of the batch, and before pooling.

One scale per table (DQRM paper). A lookup of N rows reads N rows, a backward pass writes a gradient of N
rows; the whole table is read only when its scale is refreshed (`ranges`). The paper's reference code quantizes the
pooled vector instead; with more than one row per bag that corresponds to no stored INT4 table.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm.quant.ranges import TableScales
from dqrm.quant.uniform import fake_quantize


def refuse_unsupported(module: Any) -> None:
    """Raise ValueError if an `nn.Embedding` or `nn.EmbeddingBag` uses an option that a quantized table cannot have."""
    if module.max_norm is not None:
        raise ValueError(f"max_norm is {module.max_norm}: a quantized table cannot be renormalized at lookup; use None")
    if module.scale_grad_by_freq:
        raise ValueError("scale_grad_by_freq is True: not supported for a quantized table; use False")
    if getattr(module, "mode", "sum") == "max":
        raise ValueError("mode is 'max', expected 'sum' or 'mean'")


class _OneTable(TableScales):
    """What `QuantEmbedding` and `QuantEmbeddingBag` share: bits and scale of the one table in `weight`."""

    def __init__(self, *args: Any, bits: int = 4, scale_period: int = 200, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_quantization(bits, scale_period)

    def _init_quantization(self, bits: int, scale_period: int) -> None:
        refuse_unsupported(self)
        self._init_scales(1, bits, scale_period)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, scale_period={self.scale_period}"


class QuantEmbedding(_OneTable, nn.Embedding):
    """`nn.Embedding` (its arguments, its `weight`) with looked-up rows fake-quantized to `bits` on one scale per table.

    Args:
        bits: 2, 4, 8, 16, or 32 for no quantization.
        scale_period: training forwards between two refreshes of the scale.

    Raises:
        ValueError: max_norm or scale_grad_by_freq is asked for, or another number of bits.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Flat, since torch 2.13 fails in the sparse gradient of a single id (0 dimensions) with padding.
        rows = F.embedding(input.reshape(-1), self.weight, self.padding_idx, sparse=self.sparse)
        rows = rows.view(*input.shape, self.embedding_dim)
        return rows if self.bits == 32 else fake_quantize(rows, self._tick(), self.bits)


class QuantEmbeddingBag(_OneTable, nn.EmbeddingBag):
    """`nn.EmbeddingBag` (modes sum and mean, all of its inputs, its `weight`) with rows fake-quantized before pooling.

    Args:
        bits: 2, 4, 8, 16, or 32 for no quantization.
        scale_period: training forwards between two refreshes of the scale.

    Raises:
        ValueError: mode 'max', max_norm or scale_grad_by_freq is asked for, or another number of bits.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if self.bits == 32:
            return super().forward(input, offsets, per_sample_weights)
        ids = input.reshape(-1).long()
        rows = F.embedding(ids, self.weight, padding_idx=self.padding_idx, sparse=self.sparse)
        rows = fake_quantize(rows, self._tick(), self.bits)
        # Pool by position: row i of `rows` is what the i-th id looked up, whatever the shape of the input.
        position = torch.arange(ids.numel(), dtype=input.dtype, device=input.device).view(input.shape)
        padding = None
        if self.padding_idx is not None:  # one more row, which the pooling is told to leave out
            padding = ids.numel()
            position = position.masked_fill(input == self.padding_idx, padding)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return F.embedding_bag(
            position,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


class QuantEmbeddingBagCollection(TableScales):
    """All tables of a model in one contiguous weight, looked up together and fake-quantized on one scale per table.

    One gather instead of one per table, and one sparse gradient for the whole collection: `weight.grad` is a COO tensor
    of row numbers in the contiguous weight and their gradients.

    Args:
        table_rows: rows of each table; the single-valued tables first, then the multi-valued ones.
        embedding_dim: values per row.
        multi: for each table, whether a sample has a bag of ids there instead of one; default: none has.
        pooling: 'sum' or 'mean' over the rows of a bag; an empty bag gives zeros.
        bits: 2, 4, 8, 16, or 32 for no quantization.
        scale_period: training forwards between two refreshes of the scales.
        sparse: whether `weight.grad` is sparse; a dense one costs a second copy of all tables.
        _weight: the initial weight [sum(table_rows), embedding_dim], not copied; default: as `reset_parameters`.

    Raises:
        ValueError: a table without rows, single-valued tables after multi-valued ones, or another pooling or bits.
    """

    row_offsets: Tensor
    rows_per_table: Tensor

    def __init__(
        self,
        table_rows: Sequence[int],
        embedding_dim: int,
        *,
        multi: Sequence[bool] | None = None,
        pooling: str = "sum",
        bits: int = 4,
        scale_period: int = 200,
        sparse: bool = True,
        _weight: Tensor | None = None,
    ) -> None:
        super().__init__()
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
        self.num_single = multi.count(False)
        self.pooling, self.sparse = pooling, sparse
        self._starts = [0, *torch.tensor(self.table_rows, dtype=torch.int64).cumsum(0).tolist()]
        self.weight = nn.Parameter(torch.empty(self._starts[-1], embedding_dim) if _weight is None else _weight)
        self.register_buffer("row_offsets", torch.tensor(self._starts[:-1], dtype=torch.int64), persistent=False)
        self.register_buffer("rows_per_table", torch.tensor(self.table_rows, dtype=torch.int64), persistent=False)
        self._init_scales(len(self.table_rows), bits, scale_period)
        if _weight is None:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-sqrt(1/rows) of each table (DLRM paper's code), from torch's global generator."""
        for number, rows in enumerate(self.table_rows):
            self.table(number).uniform_(-(rows**-0.5), rows**-0.5)

    def table(self, number: int) -> Tensor:
        """The weights of one table, [rows, embedding_dim]: a view, without a gradient."""
        return self.weight.detach()[self._starts[number] : self._starts[number + 1]]

    def _tables(self) -> list[Tensor]:
        return [self.table(number) for number in range(len(self.table_rows))]

    def forward(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """One pooled vector per sample and table: float32 [B, T, embedding_dim].

        Args:
            ids: integers [B, S], one per sample and single-valued table, each from 0 to the table's rows - 1.
            bags: for each multi-valued table its (values [L], offsets [B]), as `nn.EmbeddingBag` takes them.

        Raises:
            IndexError: an id outside its table. Checked on CPU only: on CUDA the check would stall every step.
            ValueError: the number of columns or of bags is not that of the tables.
        """
        single, tables = self.num_single, len(self.table_rows)
        if ids.shape[1] != single or len(bags) != tables - single:
            raise ValueError(
                f"got {ids.shape[1]} columns of ids and {len(bags)} of bags, expected {single} and {tables - single}"
            )
        self._check(ids, range(single))
        rows = [(ids + self.row_offsets[:single]).reshape(-1)]
        for number, (values, offsets) in enumerate(bags, start=single):
            if len(offsets) != len(ids):
                raise ValueError(
                    f"table {number} got {len(offsets)} offsets, expected one for each of {len(ids)} samples"
                )
            self._check(values[:, None], range(number, number + 1))
            rows.append(values + self.row_offsets[number])
        found = F.embedding(torch.cat(rows) if bags else rows[0], self.weight, sparse=self.sparse)
        scale = self.scale if self.bits == 32 else self._tick()

        looked_up = found.split([len(part) for part in rows]) if bags else (found,)
        pooled = fake_quantize(looked_up[0].view(len(ids), single, self.embedding_dim), scale[:single, None], self.bits)
        if not bags:
            return pooled
        vectors = [pooled]
        for number, (part, (values, offsets)) in enumerate(zip(looked_up[1:], bags), start=single):
            position = torch.arange(len(values), device=values.device)
            quantized = fake_quantize(part, scale[number], self.bits)
            vectors.append(F.embedding_bag(position, quantized, offsets.long(), mode=self.pooling)[:, None])
        return torch.cat(vectors, dim=1)

    def _check(self, ids: Tensor, numbers: range) -> None:
        if ids.device.type != "cpu" or ids.numel() == 0:
            return
        outside = (ids < 0) | (ids >= self.rows_per_table[numbers.start : numbers.stop])
        if outside.any():
            sample, column = outside.nonzero()[0].tolist()
            number = numbers[column]
            raise IndexError(
                f"id {int(ids[sample, column])} is outside table {number}, which has {self.table_rows[number]} rows "
                f"(0 to {self.table_rows[number] - 1})"
            )

    def extra_repr(self) -> str:
        return (
            f"{len(self.table_rows)} tables, {self._starts[-1]} rows, {self.embedding_dim}, "
            f"bits={self.bits}, scale_period={self.scale_period}"
        )
