"""DLRM: deep learning recommendation model (arXiv 1906.00091, figure 1).

    dense columns ---- bottom MLP ----+
                                      +-- interaction -- top MLP -- logit
    categorical ids -- embeddings ----+

Tables and MLP weights are fake-quantized as `QATConfig` says (32 bits: plain DLRM). Table sizes come from the data.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqrm.config import ModelConfig
from dqrm.models.inputs import checked
from dqrm.models.interaction import dot_interaction, pairs
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP

# Table values drawn at once; a piece stays in the processor's cache for all three passes over it.
_PIECE = 1 << 18


def mlp(widths: Sequence[int], qat: QATConfig, last_relu: bool) -> QuantMLP:
    """Linear layers widths[0] -> widths[1] -> ..., each but possibly the last followed by ReLU."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        layers.append(
            QuantLinear(
                inputs,
                outputs,
                bits=qat.effective_mlp_bits,
                granularity=qat.linear_granularity,
                bias_bits=qat.bias_bits,
                activation_bits=qat.activation_bits,
            )
        )
        if number < len(widths) - 1 or last_relu:
            layers.append(nn.ReLU())
    return QuantMLP(*layers)


def widths(config: ModelConfig, num_dense: int, tables: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layer widths of bottom MLP (none without dense columns) and top MLP, inputs first.

    Raises:
        ValueError: neither dense columns nor tables, or nothing to interact.
    """
    if not num_dense and not tables:
        raise ValueError("the model has neither dense columns nor tables: nothing to predict from")
    vectors, dense_width = tables + (num_dense > 0), config.bottom_widths[-1] if num_dense else 0
    if config.interaction == "dot":
        width = dense_width + vectors * (vectors - 1 + 2 * config.self_interaction) // 2
    else:
        width = dense_width + tables * config.embedding_dim
    if width == 0:
        raise ValueError(
            "one table and no dense columns make no pair of vectors for interaction 'dot'; use interaction 'cat' "
            "(--interaction cat), or self_interaction"
        )
    return (num_dense, *config.bottom_widths) if num_dense else (), (width, *config.top_mlp)


class DLRM(nn.Module):
    """DLRM for any number of dense columns (none included) and any tables.

    Args:
        num_dense: dense columns.
        table_rows: rows of each table, single-valued columns first.
        multi: for each table, whether its column is multi-valued (a bag of ids per sample); default: none is.
        config: architecture.
        qat: what is quantized to how many bits.
        seed: decides all initial weights, the same on every machine and device.
        precision: 'bf16' multiplies in bf16 while training; evaluation is always FP32, as what is exported is.
        table_dtype: of the tables' master weights: torch.float32, or torch.bfloat16 for half the memory.
        table_weight: the tables' initial weights [sum(table_rows), embedding_dim], used as they are and not copied.

    Raises:
        ValueError: neither dense columns nor tables, or nothing to interact.
    """

    logit_offset: float | None = None
    """Added to each logit, so that probabilities are on the log's click rate where negatives were subsampled. None: of
    a model in training, whose logits are on the click rate of the rows that it is trained on."""
    pairs: Tensor
    bottom: Any  # QuantMLP, or None
    tables: Any
    top: Any

    def __init__(
        self,
        num_dense: int,
        table_rows: Sequence[int],
        *,
        multi: Sequence[bool] | None = None,
        config: ModelConfig | None = None,
        qat: QATConfig | None = None,
        seed: int = 0,
        precision: str = "fp32",
        table_dtype: torch.dtype = torch.float32,
        table_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        config, qat = config or ModelConfig(), qat or QATConfig()
        tables = QuantEmbeddingBagCollection(
            table_rows,
            config.embedding_dim,
            multi=multi,
            pooling=config.pooling,
            bits=qat.effective_table_bits,
            scale_period=qat.scale_period,
            scale_refresh=qat.scale_refresh,
            rescan_period=qat.rescan_period,
            _weight=torch.empty(sum(table_rows), config.embedding_dim, dtype=table_dtype)
            if table_weight is None
            else table_weight,
        )
        bottom, top = widths(config, num_dense, len(table_rows))
        below = mlp(bottom, qat, last_relu=True) if bottom else None
        self._assemble(config, num_dense, below, tables, mlp(top, qat, last_relu=False))
        for part in (self.bottom, self.top):
            if part is not None:
                part.bf16 = precision == "bf16"
        self.reset_parameters(seed, tables=table_weight is None)

    @classmethod
    def from_parts(
        cls, config: ModelConfig, num_dense: int, bottom: nn.Module | None, tables: nn.Module, top: nn.Module
    ) -> "DLRM":
        """A model of parts that are there already, in eval mode; no weights are drawn."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._assemble(config, num_dense, bottom, tables, top)
        return model.eval()

    def _assemble(
        self, config: ModelConfig, num_dense: int, bottom: nn.Module | None, tables: Any, top: nn.Module
    ) -> None:
        self.config, self.num_dense = config, num_dense
        self.bottom, self.tables, self.top = bottom, tables, top
        if config.interaction == "dot":
            vectors = len(tables.table_rows) + (num_dense > 0)
            self.register_buffer("pairs", pairs(vectors, config.self_interaction), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, seed: int, tables: bool = True) -> None:
        """Initial weights of the DLRM paper's code: tables uniform(+-sqrt(1/rows)), MLP weights
        normal(0, sqrt(2/(in+out))), biases normal(0, sqrt(1/out)).

        Drawn by numpy on the CPU, one stream per table and layer: the same on CPU and CUDA, and a table's values do not
        depend on which other tables there are. `tables` False leaves the tables as they are.
        """
        if tables:
            self._draw_tables(range(len(self.tables.table_rows)), seed)
        linear = (layer for part in (self.bottom, self.top) if part is not None for layer in part)
        for number, layer in enumerate(layer for layer in linear if isinstance(layer, nn.Linear)):
            random = np.random.default_rng([seed, 1, number])
            outputs, inputs = layer.weight.shape
            weight = random.standard_normal((outputs, inputs), np.float32) * np.float32(np.sqrt(2 / (inputs + outputs)))
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(random.standard_normal(outputs, np.float32) * np.float32(outputs**-0.5)))

    @torch.no_grad()
    def redraw_tables(self, seed: int, epoch: int = 0, tables: Sequence[int] | None = None) -> None:
        """Draw these tables (default: all) as `reset_parameters` does, in epochs above 0 with other values, and compute
        scales of all tables. Optimizer state is the caller's."""
        self._draw_tables(range(len(self.tables.table_rows)) if tables is None else tables, seed, epoch)
        self.tables.refresh_scale()

    def _draw_tables(self, numbers: Sequence[int], seed: int, epoch: int = 0) -> None:
        # The generator releases the GIL, so tables are drawn side by side.
        with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
            list(threads.map(self._draw_table, numbers, repeat(seed), repeat(epoch)))

    def _draw_table(self, number: int, seed: int, epoch: int) -> None:
        """In place and in pieces, since a second copy of a table may not fit."""
        table = self.tables.table(number)
        random = np.random.default_rng([seed, 0, number, epoch] if epoch else [seed, 0, number])
        factor = 2 / np.sqrt(self.tables.table_rows[number])
        for piece in table.split(max(1, _PIECE // table.shape[1])):
            in_place = piece.device.type == "cpu" and piece.dtype == torch.float32
            values = piece.numpy() if in_place else np.empty(piece.shape, np.float32)
            random.random(dtype=np.float32, out=values)
            values -= 0.5
            values *= factor
            if not in_place:
                piece.copy_(torch.from_numpy(values))

    def forward(self, dense: Tensor, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The logit of a click for each sample: float32 [B].

        Args:
            dense: float32 [B, num_dense]; other floating types are converted, integers refused. NaN gives NaN. None
                where the model has no dense columns.
            ids: integers [B, S], one per sample and single-valued table.
            bags: (values [L], offsets [B]) for each multi-valued table.

        Raises:
            IndexError: an id outside its table (on CPU).
            InputError, which is a UserError and a ValueError: no tensors (a numpy array: use torch.from_numpy), or of
                another dtype, shape, number of rows or device.
        """
        logits = self.sampled_logits(dense, ids, bags)
        return logits + self.logit_offset if self.logit_offset else logits

    def sampled_logits(self, dense: Tensor, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The same without `logit_offset`: on the click rate of the rows that were trained on."""
        tables, bottom = self.tables, self.bottom
        dense, ids, bags = checked(dense, ids, bags, self.num_dense, tables, bottom)
        vectors = tables(ids, bags)
        below = None if bottom is None else bottom(dense)
        logits: Tensor = self.top(self.interact(below, vectors)).squeeze(1)
        return logits

    def interact(self, dense: Tensor | None, vectors: Tensor) -> Tensor:
        """The dense vector [B, dim] beside each pair's dot product, or ('cat') beside all vectors [B, T, dim]."""
        if self.config.interaction == "cat":
            return torch.cat([*([] if dense is None else [dense]), vectors.flatten(1)], dim=1)
        return dot_interaction(dense, vectors, self.pairs, self.config.self_interaction)
