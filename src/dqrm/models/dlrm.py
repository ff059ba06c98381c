"""DLRM: deep learning recommendation model (arXiv 1906.00091, figure 1).

    dense columns ---- bottom MLP ----+
                                      +-- interaction -- top MLP -- logit
    categorical ids -- embeddings ----+

Tables and MLP weights are fake-quantized as `QATConfig` says (32 bits: plain DLRM). Table sizes come from the data.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from dqrm.config import ModelConfig
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear


def mlp(widths: Sequence[int], qat: QATConfig, last_relu: bool) -> nn.Sequential:
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
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """DLRM for any number of dense columns (none included) and any tables.

    Args:
        num_dense: dense columns.
        table_rows: rows of each table, single-valued columns first.
        multi: for each table, whether its column is multi-valued (a bag of ids per sample); default: none is.
        config: architecture.
        qat: what is quantized to how many bits.
        seed: decides all initial weights, the same on every machine and device.

    Raises:
        ValueError: neither dense columns nor tables, or nothing to interact.
    """

    pairs: Tensor

    def __init__(
        self,
        num_dense: int,
        table_rows: Sequence[int],
        *,
        multi: Sequence[bool] | None = None,
        config: ModelConfig | None = None,
        qat: QATConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config, qat = config or ModelConfig(), qat or QATConfig()
        if not num_dense and not table_rows:
            raise ValueError("the model has neither dense columns nor tables: nothing to predict from")
        self.config, self.num_dense = config, num_dense
        self.bottom = mlp((num_dense, *config.bottom_mlp), qat, last_relu=True) if num_dense else None
        self.tables = QuantEmbeddingBagCollection(
            table_rows,
            config.embedding_dim,
            multi=multi,
            pooling=config.pooling,
            bits=qat.effective_table_bits,
            scale_period=qat.scale_period,
            _weight=torch.empty(sum(table_rows), config.embedding_dim),
        )
        vectors = len(table_rows) + (num_dense > 0)
        dense_width = config.bottom_mlp[-1] if num_dense else 0
        if config.interaction == "dot":
            row, column = torch.tril_indices(vectors, vectors, -1 + config.self_interaction)
            self.register_buffer("pairs", row * vectors + column, persistent=False)
            width = dense_width + len(row)
        else:
            width = dense_width + len(table_rows) * config.embedding_dim
        if width == 0:
            raise ValueError("one table and no dense columns make no pair; use self_interaction or interaction 'cat'")
        self.top = mlp((width, *config.top_mlp), qat, last_relu=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initial weights of the DLRM paper's code: tables uniform(+-sqrt(1/rows)), MLP weights
        normal(0, sqrt(2/(in+out))), biases normal(0, sqrt(1/out)).

        Drawn by numpy on the CPU, one stream per table and layer: the same on CPU and CUDA, and a table's values do not
        depend on which other tables there are.
        """
        for number, rows in enumerate(self.tables.table_rows):
            # In place, since a second copy of a table may not fit.
            table = self.tables.table(number)
            values = table.numpy() if table.device.type == "cpu" else np.empty(table.shape, np.float32)
            np.random.default_rng([seed, 0, number]).random(dtype=np.float32, out=values)
            values -= 0.5
            values *= 2 / np.sqrt(rows)
            if table.device.type != "cpu":
                table.copy_(torch.from_numpy(values))
        linear = (layer for part in (self.bottom, self.top) if part is not None for layer in part)
        for number, layer in enumerate(layer for layer in linear if isinstance(layer, nn.Linear)):
            random = np.random.default_rng([seed, 1, number])
            outputs, inputs = layer.weight.shape
            weight = random.standard_normal((outputs, inputs), np.float32) * np.float32(np.sqrt(2 / (inputs + outputs)))
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(random.standard_normal(outputs, np.float32) * np.float32(outputs**-0.5)))

    def forward(self, dense: Tensor, ids: Tensor, bags: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The logit of a click for each sample: float32 [B].

        Args:
            dense: float32 [B, num_dense].
            ids: integers [B, S], one per sample and single-valued table.
            bags: (values [L], offsets [B]) for each multi-valued table.

        Raises:
            IndexError: an id outside its table (on CPU).
        """
        vectors = self.tables(ids, bags)
        if self.bottom is None:
            return self.top(self.interact(None, vectors)).squeeze(1)
        return self.top(self.interact(self.bottom(dense), vectors)).squeeze(1)

    def interact(self, dense: Tensor | None, vectors: Tensor) -> Tensor:
        """The dense vector [B, dim] beside each pair's dot product, or ('cat') beside all vectors [B, T, dim]."""
        first = [] if dense is None else [dense]
        if self.config.interaction == "cat":
            return torch.cat([*first, vectors.flatten(1)], dim=1)
        together = vectors if dense is None else torch.cat([dense[:, None], vectors], dim=1)
        products = torch.bmm(together, together.transpose(1, 2)).flatten(1)
        return torch.cat([*first, products.index_select(1, self.pairs)], dim=1)
