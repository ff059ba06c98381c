"""A model as a function of tensors alone, which torch.export can trace; and its tables and stacks as packed modules,
converted or not, from which the other formats are written."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.models.base import ClickModel
from dqrm.quant.convert import pack_linear
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.folding import fold_batch_norm
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mixed import MixedPackedCollection, PackedTables
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.packed import PackedEmbeddingBagCollection, PackedLinear
from dqrm.quant.storage import storage_of


def packed_tables(model: ClickModel) -> PackedTables:
    """The model's tables. Unquantized ones are wrapped, not copied.

    Raises:
        ValueError: they are quantization-aware, but not converted.
    """
    tables: Any = model.tables
    if isinstance(tables, PackedTables):
        return tables
    if not isinstance(tables, QuantEmbeddingBagCollection) or tables.bits != 32:
        raise ValueError(f"tables are {type(tables).__name__}, expected packed ones: convert the model first")
    return PackedEmbeddingBagCollection(
        tables.table_rows,
        tables.embedding_dim,
        multi=tables.multi,
        pooling=tables.pooling,
        bits=32,
        codes=storage_of(tables.weight).read(tables.weight),
        scale=torch.ones(len(tables.table_rows)),
    )


def _unquantized(layer: QuantLinear) -> PackedLinear:
    if layer.bits != 32:
        raise ValueError("a linear layer is quantized in training, but not packed: convert the model first")
    return pack_linear(layer)


def packed_stack(stack: nn.Module, pack: Callable[[QuantLinear], PackedLinear] = _unquantized) -> QuantMLP:
    """A stack of linear layers for inference: packed, with ReLU; batch normalization is folded, dropout removed.

    Args:
        pack: the packed form of a layer that is not packed yet; default: of unquantized layers only.

    Raises:
        ValueError: an unsupported module, or as `pack`.
    """
    modules: list[nn.Module] = []
    for module in stack.children():
        last = modules[-1] if modules else None
        if isinstance(module, PackedLinear):
            modules.append(module)
        elif isinstance(module, QuantLinear):
            modules.append(pack(module))
        elif isinstance(module, nn.BatchNorm1d) and isinstance(last, PackedLinear):
            modules[-1] = fold_batch_norm(last, module)
        elif isinstance(module, nn.ReLU) and isinstance(last, PackedLinear):
            modules.append(nn.ReLU())
        elif not isinstance(module, nn.Dropout):
            raise ValueError(
                f"the MLP holds {type(module).__name__} after {type(last).__name__}, expected linear "
                "layers, each with batch normalization, ReLU and dropout after it or without"
            )
    return QuantMLP(*modules)


def _with_float_weight(layer: PackedLinear) -> PackedLinear:
    """The same layer with its weight in float32: the same values, unpacked once and for all."""
    return PackedLinear(
        layer.in_features,
        layer.out_features,
        bits=32,
        codes=layer.weight().clone(),
        scale=torch.ones(1),
        bias=layer.bias,
        activation_bits=layer.activation_bits,
        activation_scale=layer.activation_scale,
    )


def flat_model(model: ClickModel, float_mlp: bool = False) -> ClickModel:
    """The same model in operators that all runtimes support, as one function of tensors alone: dense, ids, then values
    and offsets of each multi-valued table. An id outside its table is looked up as row 0.

    Args:
        float_mlp: the weights of the linear layers are float32 instead of codes that are unpacked at each call.

    Raises:
        ValueError: the model is not converted.
    """
    stacks = {path: nn.Sequential(*packed_stack(stack)) for path, stack in model.stacks().items()}
    if float_mlp:
        for stack in stacks.values():
            for number, module in enumerate(stack):
                if isinstance(module, PackedLinear):
                    stack[number] = _with_float_weight(module)
    flat = type(model).from_parts(model.config, model.num_dense, packed_tables(model), stacks)
    offset, calibration = model.logit_offset or 0.0, model.calibration

    def forward(dense: Tensor, ids: Tensor, *bags: Tensor) -> Tensor:
        logits = flat.logits(dense, _vectors(flat.tables, dense, ids, bags))
        logits = logits + offset if offset else logits
        return calibration(logits) if calibration else logits

    flat.forward = forward  # type: ignore[method-assign,assignment]
    return flat


def _vectors(tables: Any, dense: Tensor, ids: Tensor, bags: Sequence[Tensor]) -> Tensor:
    """One vector per sample and table: float32 [B, T, dim]."""
    if isinstance(tables, MixedPackedCollection):
        vectors = []
        for number, part in enumerate(tables.parts):
            own, many = tables.share(number, ids, list(zip(bags[::2], bags[1::2])))
            vectors.append(_vectors(part, dense, own, [tensor for pair in many for tensor in pair]))
        return torch.cat(vectors, dim=1).index_select(1, tables.order)
    samples, single, vectors = dense.shape[0], tables.num_single, []
    if single:
        rows = tables._values(ids, tables.row_offsets[:single], tables.rows_per_table[:single], 0)
        vectors.append(rows.view(samples, single, tables.embedding_dim))
    for number, (values, offsets) in enumerate(zip(bags[::2], bags[1::2]), start=single):
        starts = tables.row_offsets[number : number + 1]
        rows = tables._values(values, starts, tables.rows_per_table[number : number + 1], number)
        vectors.append(_pool(rows, values, offsets, tables.pooling)[:, None])
    return torch.cat(vectors, dim=1) if vectors else dense.new_empty(samples, 0, tables.embedding_dim)


def _pool(rows: Tensor, values: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """Rows [L, dim] as one vector per bag [B, dim]; only torch itself has embedding_bag."""
    begun = torch.zeros(values.shape[0] + 1, dtype=torch.int64)
    begun = begun.scatter_add(0, offsets, torch.ones_like(offsets))
    # A value's bag is the number of offsets up to it. Bag 0 would hold values before the first offset: there are none.
    bag = begun.cumsum(0)[:-1]
    summed = rows.new_zeros(offsets.shape[0] + 1, rows.shape[1])
    summed = summed.scatter_add(0, bag[:, None].expand(-1, rows.shape[1]), rows)
    if pooling == "mean":
        counts = torch.zeros(offsets.shape[0] + 1, dtype=torch.int64)
        counts = counts.scatter_add(0, bag, torch.ones_like(values)).clamp(min=1)
        summed = summed / counts.float()[:, None]
    return summed[1:]
