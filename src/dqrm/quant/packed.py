"""Inference on packed codes: the layers that `convert` swaps in, and that a loaded artifact consists of.

Codes, scales and values are those that trained layers use in evaluation, so a packed layer gives the same results.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm import kernels
from dqrm.quant.packing import decode, storage
from dqrm.quant.tables import TableLayout, integers, pool, refuse_id
from dqrm.quant.uniform import check_bits, check_floats, fake_quantize


class _Packed(nn.Module):
    """Mixin: codes and scales move with the module but are never cast, which would change them."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class _PackedTables(_Packed):
    """Mixin: rows of packed tables, looked up by id.

    Buffers: codes [rows, width] (see `packing.storage`); scale float32: one per table, or for each `rows_per_scale`
    rows of a table; zero_point int32, as `scale`, or None: symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_offsets: Tensor
    rows_per_scale: int | None
    """Rows of a table that share a scale, a power of 2; None: all."""
    bits: int
    embedding_dim: int
    source: Any = None
    """The file that the codes are memory-mapped from; its `check()` raises if it was changed. None: codes in memory."""

    def check_source(self) -> None:
        """Raise if the file that the codes are mapped from was changed: they may belong to another model."""
        if self.source is not None and not torch.compiler.is_compiling():
            self.source.check()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        mapped = self.codes
        super()._apply(fn, recurse)
        if self.codes is not mapped:
            self.source = None  # a copy
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}  # copies are in memory

    def _init_storage(
        self, table_rows: Sequence[int], bits: int, codes: Tensor | None, scale: Tensor | None,
        zero_point: Tensor | None, rows_per_scale: int | None,
    ) -> None:  # fmt: skip
        check_bits("bits", bits)
        self.bits, rows, tables = bits, sum(table_rows), len(table_rows)
        dtype, width = storage(self.embedding_dim, bits)
        codes = torch.empty(rows, width, dtype=dtype) if codes is None else codes
        each = None if bits == 32 else rows_per_scale
        if each is None and bits != 32 and scale is not None and scale.shape == (rows,) != (tables,):
            each = 1
        per_table = [1 if each is None else -(-count // each) for count in table_rows]
        scale = torch.empty(sum(per_table)) if scale is None else scale
        if codes.dtype != dtype or codes.shape != (rows, width):
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected {dtype} [{rows}, {width}]")
        if scale.dtype != torch.float32 or scale.shape not in ((sum(per_table),), (rows if bits == 32 else -1,)):
            expected = f"[{tables}] or [{rows}]" if each is None else f"[{sum(per_table)}]"
            raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}, expected torch.float32 {expected}")
        if zero_point is not None and (zero_point.dtype != torch.int32 or zero_point.shape != scale.shape):
            raise ValueError(
                f"zero_point is {zero_point.dtype} {list(zero_point.shape)}, expected torch.int32 {list(scale.shape)}"
            )
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        first = torch.tensor([0, *accumulate(per_table)][:-1], dtype=torch.int64, device=codes.device)
        self.register_buffer("group_offsets", first, persistent=False)
        self.rows_per_scale = each

    def _values(self, ids: Tensor, starts: Tensor, table_rows: Tensor, first: int) -> Tensor:
        """Values float32 [N, dim] of integer ids [..., T] of the T tables first, first + 1, ..."""
        scale, zero_point, groups, part = self.scale, self.zero_point, None, slice(first, first + len(table_rows))
        if self.rows_per_scale is None:
            scale, zero_point = scale[part], None if zero_point is None else zero_point[part]
        else:
            groups = kernels.GroupMap(starts, self.group_offsets[part], self.rows_per_scale.bit_length() - 1)
        values, wrong = kernels.lookup_packed(
            ids, starts, table_rows, self.codes, self.bits, scale, self.embedding_dim, zero_point, groups
        )
        if wrong >= 0:
            number = wrong % len(table_rows)
            refuse_id(int(ids.reshape(-1)[wrong]), first + number, int(table_rows[number]))
        return values


class PackedEmbeddingBagCollection(TableLayout, _PackedTables):
    """A trained `QuantEmbeddingBagCollection` on packed codes, for inference.

    Args:
        table_rows, embedding_dim, multi, pooling: as of `QuantEmbeddingBagCollection`.
        bits: 2, 4, 8, 16, or 32 (float32 rows).
        codes: [sum(table_rows), width], not copied; default: not initialized.
        scale: float32, one per table or one per row; ignored with 32 bits.
        zero_point: int32, as `scale`: the code of 0.0, which is subtracted from codes; None: 0.
        rows_per_scale: rows of a table that share a scale, a power of 2; `scale` then has ceil(rows / rows_per_scale)
            for each table, one after the other. None: as the length of `scale` says.

    Raises:
        ValueError: as `QuantEmbeddingBagCollection`; or codes or scale of the wrong dtype or shape.
    """

    def __init__(
        self,
        table_rows: Sequence[int],
        embedding_dim: int,
        *,
        multi: Sequence[bool] | None = None,
        pooling: str = "sum",
        bits: int = 4,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        rows_per_scale: int | None = None,
    ) -> None:
        super().__init__()
        self._init_layout(table_rows, embedding_dim, multi, pooling)
        self._init_storage(self.table_rows, bits, codes, scale, zero_point, rows_per_scale)

    def forward(self, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """One pooled vector per sample and table: float32 [B, T, embedding_dim].

        Args:
            ids: integers [B, S], one per sample and single-valued table.
            bags: (values [L], offsets [B]) for each multi-valued table.

        Raises:
            IndexError: an id outside its table (on CPU; in an exported graph it is looked up as row 0).
            ValueError: the number of columns or of bags is not that of the tables.
        """
        self.check_source()  # before, since a file that was cut short would end the process
        looked_up = [
            self._values(
                part, self.row_offsets[first : first + tables], self.rows_per_table[first : first + tables], first
            )
            for part, first, tables in self._groups(ids, bags)
        ]
        self.check_source()  # after, since a file may change while it is read
        return self._pooled(looked_up, len(ids), bags)

    def table_values(self, number: int, ids: Tensor) -> Tensor:
        """Values float32 [N, dim] of ids int64 [N] of table `number`."""
        self.check_source()
        table = slice(number, number + 1)
        values = self._values(ids[:, None], self.row_offsets[table], self.rows_per_table[table], number)
        self.check_source()
        return values

    def extra_repr(self) -> str:
        return f"{len(self.table_rows)} tables, {self._starts[-1]} rows, {self.embedding_dim}, bits={self.bits}"


class _OnePackedTable(_PackedTables):
    """Common base of `PackedEmbedding` and `PackedEmbeddingBag`."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, bits: int, codes: Tensor, scale: Tensor,
        zero_point: Tensor | None = None, rows_per_scale: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = torch.float32  # of the output
        self._init_storage((num_embeddings,), bits, codes, scale, zero_point, rows_per_scale)

    def _rows(self, ids: Tensor) -> Tensor:
        """Values float32 [N, dim] of ids [N]."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.codes.device)
        return self._values(integers(ids).contiguous(), zero, zero + self.num_embeddings, 0).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


class PackedEmbedding(_OnePackedTable):
    """A trained `QuantEmbedding` on packed codes: integers [...] -> float32 [..., embedding_dim]."""

    def forward(self, input: Tensor) -> Tensor:
        return self._rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)


class PackedEmbeddingBag(_OnePackedTable):
    """A trained `QuantEmbeddingBag` on packed codes, with the inputs of `nn.EmbeddingBag`."""

    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return pool(self, self._rows(input.reshape(-1)), input, offsets, per_sample_weights)


class PackedLinear(_Packed):
    """A trained `QuantLinear` on packed codes: float32 [..., in_features] -> [..., out_features].

    Args:
        codes: [out_features, width], see `packing.storage`. scale: float32 [out_features] or [1].
        bias: float32 [out_features], or None.
        activation_bits, activation_scale: below 32, the input is quantized on this scale (float32, no dimension).
        unpack_once: keep the float32 weight from the first forward on (fast); False unpacks it at each one.

    Raises:
        ValueError: codes or scale of the wrong dtype or shape.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    activation_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        activation_bits: int = 32,
        activation_scale: Tensor | None = None,
        unpack_once: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("bits", bits), ("activation_bits", activation_bits)):
            check_bits(name, value)
        dtype, width = storage(in_features, bits)
        for name, tensor, kind, shapes in (
            ("codes", codes, dtype, ((out_features, width),)),
            ("scale", scale, torch.float32, ((out_features,), (1,))),
            ("bias", bias, torch.float32, ((out_features,),)),
            ("activation_scale", activation_scale, torch.float32, ((),)),
        ):
            if tensor is not None and (tensor.dtype != kind or tuple(tensor.shape) not in shapes):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {kind} {list(shapes[0])}")
        if (activation_scale is None) != (activation_bits == 32):
            raise ValueError(f"activation_bits is {activation_bits} and activation_scale is {activation_scale}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.activation_bits, self.unpack_once = bits, activation_bits, unpack_once
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("activation_scale", activation_scale)
        self._weight: Tensor | None = None

    def weight(self) -> Tensor:
        """The weight's values: float32 [out_features, in_features]."""
        if torch.compiler.is_compiling() or not self.unpack_once:
            return decode(self.codes, self.scale[:, None], self.bits, self.in_features)
        if self._weight is None:
            with torch.inference_mode(False), torch.no_grad():  # it will be used outside of inference mode, too
                self._weight = decode(self.codes, self.scale[:, None], self.bits, self.in_features)
        return self._weight

    def forward(self, input: Tensor) -> Tensor:
        check_floats("input", input)  # the weight takes the input's dtype
        if self.activation_scale is not None:
            input = fake_quantize(input, self.activation_scale, self.activation_bits)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight().to(input.dtype), bias)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._weight = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._weight = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
