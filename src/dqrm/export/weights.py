"""A trained model's weights as the tensors of an artifact, table by table: no table is in memory in FP32 twice."""

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dqrm.errors import UserError
from dqrm.export.config import PTQConfig
from dqrm.export.container import Entry
from dqrm.export.formats.traceable import packed_stack
from dqrm.models.base import ClickModel
from dqrm.quant.convert import pack_linear
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.packed import PackedLinear
from dqrm.quant.packing import encode, pieces, storage
from dqrm.quant.ptq import row_scales, table_scale
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
        self._model, self._tell = model, progress or (lambda what, done, total: None)
        self._layers = {
            f"{path}.{number}": layer
            for path, stack in model.stacks().items()
            for number, layer in enumerate(stack.children())
            if isinstance(layer, QuantLinear)
        }
        linear = list(self._layers.values())
        if ptq is not None:
            trained = {model.tables.bits, *(layer.bits for layer in linear)} - {32}
            if trained:
                raise UserError(
                    f"the run was trained in {min(trained)} bits; `dqrm export` packs it unchanged; quantization "
                    "after training needs a run in FP32 (--bits 32)"
                )
        self._trained_bits = (model.tables.bits, linear[0].bits)
        self.table_bits = model.tables.bits if ptq is None else ptq.effective_table_bits
        self.mlp_bits = linear[0].bits if ptq is None else ptq.effective_mlp_bits
        try:
            self.scale = self._table_scales(ptq)
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
        dtype, width = storage(tables.embedding_dim, self.table_bits)
        entries = [Entry("tables.codes", dtype, (len(tables.weight), width), self._codes)]
        entries.append(Entry.of("tables.scale", self.scale))
        for path, stack in self.packed.items():
            entries += [Entry.of(f"{path}.{key}", tensor) for key, tensor in stack.state_dict().items()]
        return sorted(entries, key=lambda entry: -entry.dtype.itemsize)

    def reference(self) -> ClickModel:
        """The reference for the packed model: the trained model, or one with weights quantized by the plain formula."""
        model = self._model
        if (self.table_bits, self.mlp_bits) == self._trained_bits:
            return model
        stacks = {path: deepcopy(stack) for path, stack in model.stacks().items()}
        for path, scale in self._scales.items():
            if scale is not None:
                owner, _, number = path.rpartition(".")
                layer: Any = stacks[owner].get_submodule(number)
                layer.weight.data = fake_quantize(layer.weight.data, scale[:, None], self.mlp_bits)
        tables = _Requantized(model.tables, self.scale, self.table_bits)
        return type(model).from_parts(model.config, model.num_dense, tables, stacks)

    def _layer_scale(self, layer: QuantLinear, ptq: PTQConfig | None) -> Tensor | None:
        """The scale of a layer that is quantized after training; None: its own."""
        if not layer.weight.isfinite().all() or not (layer.bias is None or layer.bias.isfinite().all()):
            raise ValueError("a layer of the MLP holds weights that are NaN or infinite: its training diverged")
        if ptq is None or self.mlp_bits == 32:
            return None
        return row_scales(layer.weight.detach().float(), self.mlp_bits, ptq.clip)

    def _table_scales(self, ptq: PTQConfig | None) -> Tensor:
        tables: QuantEmbeddingBagCollection = self._model.tables
        if self.table_bits == 32:
            return torch.ones(len(tables.table_rows))
        if ptq is None:
            return tables.current_scale().clone()
        scales, done, total = [], 0, len(tables.weight)
        for number, rows in enumerate(tables.table_rows):
            self._tell("searching scales", done, total)
            table = tables.table(number)
            if ptq.granularity == "table":
                scales.append(table_scale(partial(pieces, table), self.table_bits, ptq.clip).view(1))
            else:
                scales += [row_scales(piece.float(), self.table_bits, ptq.clip) for piece in pieces(table)]
            done += rows
        self._tell("searching scales", total, total)
        return torch.cat(scales) if scales else torch.empty(0)

    def _codes(self) -> Iterable[Tensor]:
        tables, done = self._model.tables, 0
        per_row = len(self.scale) == len(tables.weight)
        for number in range(len(tables.table_rows)):
            for piece in pieces(tables.table(number)):
                low, high = torch.aminmax(piece)  # NaN, if any is
                if not bool((low.isfinite() & high.isfinite()).item()):
                    raise UserError(f"table {number} holds weights that are NaN or infinite: the training diverged")
                scale = self.scale[done : done + len(piece)] if per_row else self.scale[number : number + 1]
                yield encode(piece, scale[:, None], self.table_bits)
                done += len(piece)
                self._tell("packing", done, len(tables.weight))


class _Requantized(TableLayout):
    """Tables in FP32 whose rows are quantized as they are looked up: the plain formula, for comparison."""

    def __init__(self, tables: QuantEmbeddingBagCollection, scale: Tensor, bits: int) -> None:
        super().__init__()
        self._init_layout(tables.table_rows, tables.embedding_dim, tables.multi, tables.pooling)
        self.weight, self.scale, self.bits = tables.weight.detach(), scale, bits

    def forward(self, ids: Tensor, bags: Any = ()) -> Tensor:
        looked_up = []
        for part, first, tables in self._groups(ids, bags):
            self._refuse_outside(part, first, tables)
            rows = (part.view(-1, tables) + self.row_offsets[first : first + tables]).view(-1)
            numbers = torch.arange(first, first + tables).repeat(len(rows) // max(1, tables))
            scale = self.scale[rows if len(self.scale) == len(self.weight) else numbers]
            looked_up.append(fake_quantize(self.weight[rows].float(), scale[:, None], self.bits))
        return self._pooled(looked_up, len(ids), bags)
