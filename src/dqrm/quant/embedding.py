"""Embedding tables that are quantized as they are looked up: only the rows of the batch, and before pooling.

One scale per table (DQRM paper), per row, or per block of a table's rows. A lookup of N rows reads N rows, a backward
pass writes a gradient of N rows; the whole table is read only when its scale is refreshed (`ranges`). The paper's
reference code quantizes the pooled vector instead; with more than one row per bag that corresponds to no stored INT4
table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqrm import kernels
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import QATConfig, take_qat
from dqrm.quant.encoded_rows import EncodedRows
from dqrm.quant.groups import Groups
from dqrm.quant.quantizer import FakeQuantized, LookupArguments
from dqrm.quant.storage import Encoded, Storage, dtypes_of, new_weight, storage_for, storage_of
from dqrm.quant.tables import TableLayout, integers, pool, refuse_id


class _Lookup(NamedTuple):
    """Ids to look up in tables of one contiguous weight: ids[i] belongs to table first + i % len(starts)."""

    ids: Tensor  # int32 or int64, contiguous
    first: int
    starts: Tensor  # int64 [tables], the first row of each
    table_rows: Tensor  # int64 [tables]


class _ActiveRows(torch.autograd.Function):
    """Gather and fake-quantize in one operation; backward: one sparse gradient (STE)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, lookups: list[_Lookup], scale: Tensor | None, groups: kernels.GroupMap | None,
        limits: kernels.Limits, blocks: Any, clamped: Tensor | None, raising: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        memory = storage_of(weight).operand(weight)
        count = sum(lookup.ids.numel() for lookup in lookups)
        values = torch.empty(count, weight.shape[1], device=weight.device)
        rows = torch.empty(count, dtype=torch.int64, device=weight.device)
        at = 0
        for lookup in lookups:
            end = at + lookup.ids.numel()
            tables = slice(lookup.first, lookup.first + len(lookup.starts))
            part = limits if isinstance(limits, tuple) else limits[tables]
            watched: tuple[Any, Any, int] = (None, None, 1)
            if blocks is not None:
                watched = blocks.dirty, blocks.starts[tables], blocks.block
            own = scale[tables] if scale is not None and groups is None else scale
            wrong = kernels.lookup(
                lookup.ids, lookup.starts, lookup.table_rows, memory, own, part, values[at:end], rows[at:end], clamped,
                raising, *watched, None if groups is None else groups.part(tables),
            )  # fmt: skip
            if wrong >= 0:
                number = wrong % len(lookup.starts)
                refuse_id(int(lookup.ids.reshape(-1)[wrong]), lookup.first + number, int(lookup.table_rows[number]))
            at = end
        ctx.rows, ctx.shape, ctx.dtype = rows, weight.shape, weight.dtype
        ctx.mark_non_differentiable(rows)
        return values, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values = grads[0].to(ctx.dtype).contiguous()
        grad = torch.sparse_coo_tensor(ctx.rows[None], values, ctx.shape, check_invariants=False)
        return grad, *[None] * 7


def refuse_unsupported(module: Any) -> None:
    """Raise ValueError if an `nn.Embedding` or `nn.EmbeddingBag` uses an option that a quantized table cannot have."""
    if module.max_norm is not None:
        raise ValueError(f"max_norm is {module.max_norm}: a quantized table cannot be renormalized at lookup; use None")
    if module.scale_grad_by_freq:
        raise ValueError("scale_grad_by_freq is True: not supported for a quantized table; use False")
    if getattr(module, "mode", "sum") == "max":
        raise ValueError("mode is 'max', expected 'sum' or 'mean'")


def refuse_tracing(weight: Tensor) -> None:
    """Raise NotImplementedError while a module whose table is stored as INT8 or INT4 rows is traced."""
    if kernels.traced() and isinstance(weight, EncodedRows):
        raise NotImplementedError(
            f"a table stored as {weight.kind} rows cannot be traced (torch.compile, torch.export, torch.jit.trace); "
            "trace it after dqrm.convert, or with 32 bits, which are not packed, load its state dict into a module on "
            "float32"
        )


class QuantizedTables(FakeQuantized):
    """Mixin: tables stored in `self.weight`, whose rows are fake-quantized as they are looked up."""

    sparse: bool
    _training_bits = (32,)

    @property
    def scale(self) -> Tensor:
        """The scale of each table, or group of rows, as of the last forward: float32 [groups]; 0 until it is set."""
        return self.weight_fake_quantizer.scale

    @property
    def clamps(self) -> Clamps:
        """Counts of the weights that were looked up and of those that were clamped."""
        return self.weight_fake_quantizer.clamps

    @property
    def scale_ticks(self) -> int:
        """How many training steps the scales have seen."""
        return self.weight_fake_quantizer.scale_ticks

    def refresh_scale(self) -> None:
        """Compute every table's scale from all of its rows; of tables of 32 bits, which have none, nothing."""
        self.weight_fake_quantizer.refresh(self.weight, everything=True)

    def only_looked_up_rows_change(self) -> None:
        """Promise that nothing but the optimizer changes the weight, and only rows that a training forward looked up.

        Also that an update follows each training forward; with gradient accumulation, call `same_step` in between.
        True of plain SGD and Adagrad on sparse gradients, not of momentum or dense weight decay. A periodic refresh of
        the scale then reads the rows looked up since the last one, and is as exact as before; with running_max an
        evaluation reads none. Loading a state dict and moving the module are detected; after any other change call
        `refresh_scale`.
        """
        self.weight_fake_quantizer.only_looked_up_rows_change(self.weight)

    def same_step(self) -> None:
        """The next training forward belongs to the same step: the step count does not advance, nothing is refreshed."""
        self.weight_fake_quantizer.same_step()

    def rows_changed(self, rows: Tensor) -> None:
        """An optimizer has changed these rows (int64 [U] of the weight), whichever process looked them up."""
        self.weight_fake_quantizer.rows_changed(rows, self.weight)

    def tables_redrawn(self, numbers: Sequence[int]) -> None:
        """These tables hold other weights now, drawn anew: set scales from them."""
        self.weight_fake_quantizer.tables_redrawn(self.weight, numbers)

    def _lookup_arguments(self, rows: int) -> LookupArguments:
        """Of the quantizer, for compiled code; what is not quantized has no scale, and is not clamped either."""
        quantized = self.bits_in_use != 32
        scale, *others = self.weight_fake_quantizer.lookup_arguments(self.weight, rows if quantized else 0)
        return (scale if quantized else None, *others)

    def weights_replaced(self, ticks: int) -> None:
        """Call after weights and scales were replaced; `ticks` is the new step count."""
        self.weight_fake_quantizer.weights_replaced(self.weight, ticks)


class _OneTable(QuantizedTables):
    """Common base of `QuantEmbedding` and `QuantEmbeddingBag`: bits and scale of the one table in `weight`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        qat = take_qat(kwargs)
        given, dtype, drawn = kwargs.get("_weight"), kwargs.get("dtype"), False
        if dtype is None:  # encoded rows say that they are float32
            dtype = torch.float32 if given is None else given.dtype
        storage = storage_for(dtype) if isinstance(dtype, (torch.dtype, type)) else Storage
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not floating and not issubclass(storage, Encoded):
            raise ValueError(f"dtype is {dtype!r}, expected a floating-point dtype, or {dtypes_of(Encoded)}")
        if issubclass(storage, Encoded):
            drawn = given is None
            if given is None:
                kwargs["_weight"] = storage.empty(num_embeddings, embedding_dim, kwargs.get("device"))
            elif storage_of(given).dtype != storage.dtype:  # torch's modules would leave it as it is
                kwargs["_weight"] = storage.encode(given.dequantize() if isinstance(given, EncodedRows) else given)
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        if drawn:
            self.reset_parameters()  # type: ignore[operator]
        self._init_quantization(qat)

    def _init_quantization(self, qat: QATConfig) -> None:
        refuse_unsupported(self)
        bits = qat.bits_of_table(len(self.weight))
        self._add_quantizer(qat, bits, Groups.of_tables(qat, (len(self.weight),), (bits,)))

    padding_idx: int | None

    @torch.no_grad()
    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is not None:  # torch's fills a view of the row, which encoded rows do not have
            self.weight[self.padding_idx : self.padding_idx + 1].zero_()

    def _rows(self, ids: Tensor) -> Tensor:
        """Fake-quantized rows of ids [N]: float [N, dim], with the gradient that `sparse` asks for."""
        weight, quantizer = self.weight, self.weight_fake_quantizer
        refuse_tracing(weight)
        if self.bits == 32:
            return F.embedding(ids, weight, self.padding_idx, sparse=self.sparse)
        ids, quantized = integers(ids), self.bits_in_use != 32
        quantizer.before_forward(weight, self.sparse)
        plain = self.padding_idx is not None or weight.dtype != torch.float32 or not quantizer.fusible
        if self.sparse and not plain and not kernels.traced():
            start = torch.zeros(1, dtype=torch.int64, device=weight.device)
            table = _Lookup(ids.contiguous(), 0, start, start + len(weight))
            values, rows = _ActiveRows.apply(weight, [table], *self._lookup_arguments(ids.numel()))
        else:
            rows = ids.long()
            quantizer.mark_rows(rows, 0, 1)
            values = F.embedding(rows, weight, self.padding_idx, sparse=self.sparse)
            values = quantizer.fake_quantize(values) if quantized else values
        quantizer.note_rows(rows, weight, self.sparse)
        return values

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantEmbedding(_OneTable, nn.Embedding):
    """`nn.Embedding` (its arguments, its `weight`) with looked-up rows fake-quantized to `bits` on one scale per table.

    Args:
        dtype: as of `nn.Embedding`; or torch.int8 or torch.int4, which store the table in 8 bits (`Int8Rows`) or 4
            (`TieredRows`).
        qat: a `QATConfig`; or its fields one by one, as `bits`, `quantizer`, `scale_refresh` and `scale_period`.

    Raises:
        ValueError: max_norm or scale_grad_by_freq is set, or bits or dtype are not supported.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Flat, since torch 2.13 fails in the sparse gradient of a single id (0 dimensions) with padding.
        return self._rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)


class QuantEmbeddingBag(_OneTable, nn.EmbeddingBag):
    """`nn.EmbeddingBag` (modes sum and mean, all of its inputs, its `weight`) with rows fake-quantized before pooling.

    Args:
        dtype: as of `nn.EmbeddingBag`; or torch.int8 or torch.int4, which store the table in 8 bits (`Int8Rows`) or 4
            (`TieredRows`).
        qat: a `QATConfig`; or its fields one by one, as `bits`, `quantizer`, `scale_refresh` and `scale_period`.

    Raises:
        ValueError: mode 'max', max_norm or scale_grad_by_freq is set, or bits or dtype are not supported.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        # Ids [B, L] together with include_last_offset: torch 2.9 reads past the end; `pool` works around it.
        if (
            self.bits == 32
            and not isinstance(self.weight, EncodedRows)
            and (offsets is not None or not self.include_last_offset)
        ):
            return super().forward(input, offsets, per_sample_weights)
        return pool(self, self._rows(input.reshape(-1)), input, offsets, per_sample_weights)


class QuantEmbeddingBagCollection(TableLayout, QuantizedTables):
    """All tables of a model in one contiguous weight, looked up together and fake-quantized on one scale per table (or
    per row, or per block of rows: `QATConfig.table_granularity`).

    One gather instead of one per table, and one sparse gradient for the whole collection: `weight.grad` is a COO tensor
    of row numbers in the contiguous weight and their gradients.

    Attributes:
        table_bits: bits of each table. bits: the fewest of them.

    Args:
        table_rows: rows of each table; the single-valued tables first, then the multi-valued ones.
        embedding_dim: values per row.
        multi: for each table, whether a sample has a bag of ids there instead of one; default: none has.
        pooling: 'sum' or 'mean' over the rows of a bag; an empty bag gives zeros.
        qat: a `QATConfig`; or its fields one by one, as `bits`, `quantizer`, `scale_refresh` and `scale_period`.
        sparse: whether `weight.grad` is sparse; a dense one costs a second copy of all tables.
        _weight: the initial weight [sum(table_rows), embedding_dim], not copied; default: as `reset_parameters`.
        dtype: of the weight: torch.float32, torch.bfloat16, torch.int8 (`Int8Rows`) or torch.int4 (`TieredRows`), or a
            `Storage`; `_weight` has its own.

    Raises:
        ValueError: a table without rows, single-valued tables after multi-valued ones, an unknown pooling or bits, or
            another dtype.
    """

    def __init__(
        self,
        table_rows: Sequence[int],
        embedding_dim: int,
        *,
        multi: Sequence[bool] | None = None,
        pooling: str = "sum",
        sparse: bool = True,
        dtype: torch.dtype | type[Storage] = torch.float32,
        _weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        qat = take_qat(options)
        if options:
            raise TypeError(f"QuantEmbeddingBagCollection got an unexpected keyword argument '{next(iter(options))}'")
        super().__init__()
        self._init_layout(table_rows, embedding_dim, multi, pooling)
        self.sparse = sparse
        self.weight = nn.Parameter(new_weight(self._starts[-1], embedding_dim, dtype) if _weight is None else _weight)
        self.table_bits = tuple(map(qat.bits_of_table, self.table_rows))
        bits = min(self.table_bits, default=qat.effective_table_bits)
        self._add_quantizer(qat, bits, Groups.of_tables(qat, self.table_rows, self.table_bits))
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

    def local_rows(self, number: int) -> list[tuple[int, Tensor]]:
        """The rows of one table that are in this process, as (number of the first, view): all of them."""
        return [(0, self.table(number))]

    def forward(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """One pooled vector per sample and table: float32 [B, T, embedding_dim].

        Args:
            ids: integers [B, S], one per sample and single-valued table, each from 0 to the table's rows - 1.
            bags: for each multi-valued table its (values [L], offsets [B]), as `nn.EmbeddingBag` takes them.

        Raises:
            IndexError: an id outside its table. Checked on CPU only: on CUDA the check would stall every step.
            ValueError: the number of columns or of bags is not that of the tables.
        """
        groups = self._groups(ids, bags)
        weight, quantizer = self.weight, self.weight_fake_quantizer
        refuse_tracing(weight)
        if self.bits != 32:
            quantizer.before_forward(weight, self.sparse)
        if self.sparse and quantizer.fusible and not kernels.traced():
            starts, table_rows = self.row_offsets, self.rows_per_table
            lookups = [
                _Lookup(part, first, starts[first : first + tables], table_rows[first : first + tables])
                for part, first, tables in groups
            ]
            count = sum([part.numel() for part, _, _ in groups])
            values, rows = _ActiveRows.apply(weight, lookups, *self._lookup_arguments(count))
        else:
            values, rows = self._plain_rows(groups, weight)
        quantizer.note_rows(rows, weight, self.sparse)
        lengths = [part.numel() for part, _, _ in groups]
        return self._pooled(list(values.split(lengths)) if bags else [values], len(ids), bags)

    def _plain_rows(self, groups: list[tuple[Tensor, int, int]], weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same rows [N, dim] and their numbers in plain autograd, for dense gradients and other quantizers."""
        quantizer, pieces = self.weight_fake_quantizer, []
        for ids, first, tables in groups:
            self._refuse_outside(ids, first, tables)
            pieces.append((ids.view(-1, tables) + self.row_offsets[first : first + tables]).view(-1))
            quantizer.mark_rows(pieces[-1], first, tables)
        rows = torch.cat(pieces).long() if len(pieces) > 1 else pieces[0].long()
        values = storage_of(weight).lookup(weight, rows, self.sparse)
        if self.bits_in_use == 32:
            return values, rows
        quantized = []
        for part, (_, first, tables) in zip(values.split([len(piece) for piece in pieces]), groups):
            vectors = part.view(-1, tables, self.embedding_dim)
            quantized.append(quantizer.fake_quantize(vectors, slice(first, first + tables)).flatten(0, 1))
        return torch.cat(quantized) if len(quantized) > 1 else quantized[0], rows

    def extra_repr(self) -> str:
        bits = "/".join(map(str, sorted({self.bits, *self.table_bits})))
        return f"{len(self.table_rows)} tables, {self._starts[-1]} rows, {self.embedding_dim}, bits={bits}"
