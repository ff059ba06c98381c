"""A trained model's weights as the tensors of an artifact, table by table: no table is in memory in FP32 twice."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqrm.artifact.container import Entry
from dqrm.errors import UserError
from dqrm.export.config import PTQConfig
from dqrm.export.formats.traceable import packed_stack
from dqrm.models.base import ClickModel
from dqrm.quant.affine import affine_parameters
from dqrm.quant.config import rows_per_scale
from dqrm.quant.convert import pack_linear
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.groups import Groups
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mixed import widths
from dqrm.quant.packed import PackedLinear
from dqrm.quant.packing import TableScales, encode, joined, pieces, storage
from dqrm.quant.ptq import block_scales, row_scales, table_scale
from dqrm.quant.tables import TableLayout
from dqrm.quant.uniform import fake_quantize
from dqrm.training.environment import Progress


class EncodedWeights:
    """A trained model's weights as codes and scales.

    Args:
        model: in eval mode, as `Run.load_model` gives it; it may be memory-mapped.
        ptq: how a model that was trained in FP32 is quantized; None: with the scales that it was trained on.

    Raises:
        UserError: quantization after training of a model that is quantized already; weights that are not finite.
    """

    def __init__(self, model: ClickModel, ptq: PTQConfig | None = None, progress: Progress | None = None) -> None:
        self._model, self._tell, self._packed = model, progress or (lambda what, done, total: None), 0
        self._layers = {
            f"{path}.{number}": layer
            for path, stack in model.stacks().items()
            for number, layer in enumerate(stack.children())
            if isinstance(layer, QuantLinear)
        }
        linear = list(self._layers.values())
        if ptq is not None:
            quantized = {model.tables.bits, *(layer.bits for layer in linear)} - {32}
            if quantized:
                raise UserError(
                    f"the run was trained in {min(quantized)} bits; `dqrm export` packs it unchanged; quantization "
                    "after training needs a run in FP32 (--bits 32)"
                )
        rows, trained = model.tables.table_rows, model.tables.table_bits
        self._bits = trained if ptq is None else tuple(map(ptq.bits_of_table, rows))
        self._trained_bits = (trained, linear[0].bits)
        default = model.tables.bits if ptq is None else ptq.effective_table_bits
        self.table_bits = list(self._bits) if len({*self._bits}) > 1 else min(self._bits, default=default)
        qat = model.tables.qat
        self.granularity = qat.table_granularity if ptq is None else ptq.granularity
        self.qscheme = qat.table_qscheme if ptq is None else ptq.qscheme
        self.mlp_bits = linear[0].bits if ptq is None else ptq.effective_mlp_bits
        try:
            self.scales = self._table_scales(ptq)
            scales = {id(layer): self._layer_scale(layer, ptq) for layer in linear}
            self._scales = {path: scales[id(layer)] for path, layer in self._layers.items()}

            def pack(layer: QuantLinear) -> PackedLinear:
                return pack_linear(layer, scales[id(layer)], self.mlp_bits)

            self.packed = {path: packed_stack(stack, pack) for path, stack in model.stacks().items()}
        except ValueError as error:
            raise UserError(f"the model cannot be packed: {error}") from None

    def entries(self) -> list[Entry]:
        """All tensors, those of wider elements first."""
        tables: QuantEmbeddingBagCollection = self._model.tables
        entries = []
        for prefix, bits, numbers in widths(self.table_bits, len(tables.table_rows)):
            dtype, width = storage(tables.embedding_dim, bits)
            shape = (sum(tables.table_rows[number] for number in numbers), width)
            entries.append(Entry(f"tables.{prefix}codes", dtype, shape, partial(self._codes, numbers)))
            scales = joined([self.scales[number] for number in numbers])
            for name in ("scale", "zero_point"):
                if scales[name] is not None:
                    entries.append(Entry.of(f"tables.{prefix}{name}", scales[name]))
        for path, stack in self.packed.items():
            entries += [Entry.of(f"{path}.{key}", tensor) for key, tensor in stack.state_dict().items()]
        return sorted(entries, key=lambda entry: -entry.dtype.itemsize)

    def reference(self) -> ClickModel:
        """The reference for the packed model: the trained model, or one with weights quantized by the plain formula."""
        model = self._model
        if (self._bits, self.mlp_bits) == self._trained_bits:
            return model
        stacks = {path: deepcopy(stack) for path, stack in model.stacks().items()}
        for path, scale in self._scales.items():
            if scale is not None:
                owner, _, number = path.rpartition(".")
                layer: Any = stacks[owner].get_submodule(number)
                layer.weight.data = fake_quantize(layer.weight.data, scale[:, None], self.mlp_bits)
        tables = _Requantized(model.tables, self.scales, self._bits)
        return type(model).from_parts(model.config, model.num_dense, tables, stacks)

    def _layer_scale(self, layer: QuantLinear, ptq: PTQConfig | None) -> Tensor | None:
        """The scale of a layer that is quantized after training; None: its own."""
        if not layer.weight.isfinite().all() or not (layer.bias is None or layer.bias.isfinite().all()):
            raise ValueError("a layer of the MLP holds weights that are NaN or infinite: its training diverged")
        if ptq is None or self.mlp_bits == 32:
            return None
        return row_scales(layer.weight.detach().float(), self.mlp_bits, ptq.clip)

    def _table_scales(self, ptq: PTQConfig | None) -> list[TableScales]:
        tables: QuantEmbeddingBagCollection = self._model.tables
        if self.table_bits == 32:
            return [TableScales(torch.ones(1))] * len(tables.table_rows)
        if ptq is None:
            return tables.weight_fake_quantizer.table_scales(tables.weight) if tables.table_rows else []
        scales: list[TableScales] = []
        done, total = 0, len(tables.weight)
        for number, (rows, bits) in enumerate(zip(tables.table_rows, self._bits)):
            self._tell("searching scales", done, total)
            table = tables.table(number)
            if bits == 32:
                scales.append(TableScales(torch.ones(1)))
            else:
                scales.append(_searched(table, bits, ptq))
            done += rows
        self._tell("searching scales", total, total)
        return scales

    def _codes(self, numbers: Sequence[int]) -> Iterable[Tensor]:
        """Of these tables, in this order."""
        tables = self._model.tables
        for number in numbers:
            done, scales = 0, self.scales[number]
            for piece in pieces(tables.table(number)):
                low, high = torch.aminmax(piece)  # NaN, if any is
                if not bool((low.isfinite() & high.isfinite()).item()):
                    raise UserError(f"table {number} holds weights that are NaN or infinite: the training diverged")
                scale, zero_point = scales.of(torch.arange(done, done + len(piece)))
                yield encode(piece, scale, self._bits[number], zero_point)
                done += len(piece)
                self._packed += len(piece)
                self._tell("packing", self._packed, len(tables.weight))


def _searched(table: Tensor, bits: int, ptq: PTQConfig) -> TableScales:
    """The scales of a table [rows, dim]."""
    each = rows_per_scale(ptq.granularity)
    if ptq.qscheme == "affine":
        low, high = Groups(1, (len(table),), rows_per_group=each).extremes(table)
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError("weights are NaN or infinite, expected finite ones")
        return TableScales(*affine_parameters(low.clamp(max=0), high.clamp(min=0), bits), each)
    if each is None:
        return TableScales(table_scale(partial(pieces, table), bits, ptq.clip).view(1))
    return TableScales(block_scales(table, each, bits, ptq.clip), None, each)


class _Requantized(TableLayout):
    """Tables in FP32 whose rows are quantized as they are looked up: the plain formula, for comparison."""

    def __init__(self, tables: QuantEmbeddingBagCollection, scales: list[TableScales], bits: Sequence[int]) -> None:
        super().__init__()
        self._init_layout(tables.table_rows, tables.embedding_dim, tables.multi, tables.pooling)
        self.weight, self.scales, self.bits = tables.weight.detach(), scales, bits

    def forward(self, ids: Tensor, bags: Any = ()) -> Tensor:
        looked_up = []
        for part, first, tables in self._groups(ids, bags):
            self._refuse_outside(part, first, tables)
            vectors = [self._values(column, first + number) for number, column in enumerate(part.view(-1, tables).T)]
            looked_up.append(torch.stack(vectors, 1).flatten(0, 1))
        return self._pooled(looked_up, len(ids), bags)

    def _values(self, ids: Tensor, number: int) -> Tensor:
        """Of a table's ids [N]: float32 [N, dim]."""
        rows = self.weight[ids + self.row_offsets[number]].float()
        scale, zero_point = self.scales[number].of(ids.long())
        return fake_quantize(rows, scale, self.bits[number], zero_point=zero_point)
