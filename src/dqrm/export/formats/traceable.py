"""A DLRM as a function of tensors alone, which torch.export can trace; and its tables and linear layers in packed form,
converted or not: what the writers of other formats start from."""

from typing import Any

import torch
from torch import Tensor, nn

from dqrm.models.dlrm import DLRM
from dqrm.quant.convert import pack_linear
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.packed import PackedEmbeddingBagCollection, PackedLinear


def packed_tables(model: DLRM) -> PackedEmbeddingBagCollection:
    """The model's tables. Unquantized ones are wrapped, not copied.

    Raises:
        ValueError: they are quantized in training, but not converted.
    """
    tables: Any = model.tables
    if isinstance(tables, PackedEmbeddingBagCollection):
        return tables
    if not isinstance(tables, QuantEmbeddingBagCollection) or tables.bits != 32:
        raise ValueError(f"tables are {type(tables).__name__}, expected packed ones: convert the model first")
    return PackedEmbeddingBagCollection(
        tables.table_rows,
        tables.embedding_dim,
        multi=tables.multi,
        pooling=tables.pooling,
        bits=32,
        codes=tables.weight.detach().float(),
        scale=torch.ones(len(tables.table_rows)),
    )


def packed_mlp(layers: nn.Module) -> list[tuple[PackedLinear, bool]]:
    """Each linear layer of an MLP, and whether a ReLU follows it.

    Raises:
        ValueError: a module that is neither linear nor ReLU, or is quantized but not converted.
    """
    found: list[tuple[PackedLinear, bool]] = []
    for module in layers.children():
        if isinstance(module, nn.ReLU) and found and not found[-1][1]:
            found[-1] = (found[-1][0], True)
        elif isinstance(module, PackedLinear):
            found.append((module, False))
        elif isinstance(module, QuantLinear) and module.bits == 32:
            found.append((pack_linear(module), False))
        else:
            raise ValueError(
                f"the MLP holds {type(module).__name__}, expected packed linear layers with ReLU after them"
            )
    return found


class TraceableDLRM(nn.Module):
    """The same model as one function of tensors alone, of operators that every runtime knows: dense, ids, then values
    and offsets of each multi-valued table. An id outside its table is looked up as row 0.
    """

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.tables = packed_tables(model)
        self.bottom = None if model.bottom is None else _mlp(model.bottom)
        self.top = _mlp(model.top)
        self._interact, self._offset = model.interact, model.logit_offset or 0.0
        self.eval()

    def forward(self, dense: Tensor, ids: Tensor, *bags: Tensor) -> Tensor:
        """The logit of a click for each sample: float32 [B]."""
        tables, samples, vectors = self.tables, dense.shape[0], []
        single = tables.num_single
        if single:
            found = tables._values(ids, tables.row_offsets[:single], tables.rows_per_table[:single], 0)
            vectors.append(found.view(samples, single, tables.embedding_dim))
        for number, (values, offsets) in enumerate(zip(bags[::2], bags[1::2]), start=single):
            starts = tables.row_offsets[number : number + 1]
            rows = tables._values(values, starts, tables.rows_per_table[number : number + 1], number)
            vectors.append(self._pool(rows, values, offsets)[:, None])
        together = torch.cat(vectors, dim=1) if vectors else dense.new_empty(samples, 0, tables.embedding_dim)
        bottom = None if self.bottom is None else self.bottom(dense)
        logits: Tensor = self.top(self._interact(bottom, together)).squeeze(1)
        return logits + self._offset if self._offset else logits

    def _pool(self, rows: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """Rows [L, dim] as one vector per bag [B, dim]; no runtime but torch knows embedding_bag."""
        begun = torch.zeros(values.shape[0] + 1, dtype=torch.int64)
        begun = begun.scatter_add(0, offsets, torch.ones_like(offsets))
        # The bag of each value counts the offsets up to it. Bag 0 is of values before the first offset: there are none.
        bag = begun.cumsum(0)[:-1]
        summed = rows.new_zeros(offsets.shape[0] + 1, rows.shape[1])
        summed = summed.scatter_add(0, bag[:, None].expand(-1, rows.shape[1]), rows)
        if self.tables.pooling == "mean":
            counts = torch.zeros(offsets.shape[0] + 1, dtype=torch.int64)
            counts = counts.scatter_add(0, bag, torch.ones_like(values)).clamp(min=1)
            summed = summed / counts.float()[:, None]
        return summed[1:]


def _mlp(layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(part for layer, relu in packed_mlp(layers) for part in ([layer, nn.ReLU()] if relu else [layer]))
    )
