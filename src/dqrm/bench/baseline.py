"""Baselines: DLRM and table quantization in plain torch, as a careful user writes them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _mlp(widths: Sequence[int], last_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers if last_relu else layers[:-1])


class PlainTables(nn.Module):
    """One `nn.EmbeddingBag` per table.

    Args:
        weights: initial weight of each table, [rows, dim]; used as it is, not copied.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(len(weight), weight.shape[1], mode="sum", sparse=True, _weight=weight) for weight in weights
        )

    def forward(self, ids: Tensor) -> list[Tensor]:
        """The vector of each table, [B, dim], for ids int64 [T, B]."""
        offsets = torch.arange(ids.shape[1], device=ids.device)
        return [bag(column, offsets) for bag, column in zip(self.bags, ids)]


class PlainDLRM(nn.Module):
    """DLRM (arXiv 1906.00091) with one `nn.EmbeddingBag` per table, `nn.Linear` and dot interaction, in FP32.

    Args:
        num_dense: dense columns.
        bottom_mlp: widths of the MLP on the dense columns.
        top_mlp: widths of the MLP that predicts.
        weights: initial weight of each table, [rows, dim]; used as it is, not copied.
    """

    pairs: Tensor

    def __init__(
        self, num_dense: int, bottom_mlp: Sequence[int], top_mlp: Sequence[int], weights: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.bottom = _mlp((num_dense, *bottom_mlp), last_relu=True)
        self.tables = PlainTables(weights)
        vectors = 1 + len(weights)
        row, column = torch.tril_indices(vectors, vectors, -1)
        # Indexing products[:, row, column] instead gives the same and costs several times as much.
        self.register_buffer("pairs", row * vectors + column)
        self.top = _mlp((bottom_mlp[-1] + len(row), *top_mlp), last_relu=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Logits [B] for dense [B, D] and ids int64 [T, B]."""
        first = self.bottom(dense)
        together = torch.stack([first, *self.tables(ids)], dim=1)
        products = torch.bmm(together, together.transpose(1, 2)).flatten(1)
        return self.top(torch.cat([first, products.index_select(1, self.pairs)], dim=1)).squeeze(1)


class WholeTableQAT(nn.Module):
    """An embedding bag that fake-quantizes its whole table in every step, on one scale, as general QAT modules do.

    Args:
        rows: rows of the table.
        dim: values per row.
        bits: bits of the codes.
    """

    def __init__(self, rows: int, dim: int, bits: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim).uniform_(-(rows**-0.5), rows**-0.5))
        self.highest = 2 ** (bits - 1) - 1

    def forward(self, ids: Tensor) -> Tensor:
        """The pooled rows [B, dim] for ids [B, L]; the gradient of the weight is dense."""
        low, high = torch.aminmax(self.weight.detach())
        scale = torch.maximum(-low, high).clamp(min=1e-8) / self.highest
        # torch's own operation with a straight-through backward.
        quantized = torch.fake_quantize_per_tensor_affine(
            self.weight, scale, torch.zeros(1, dtype=torch.int32, device=ids.device), -self.highest - 1, self.highest
        )
        return F.embedding_bag(ids, quantized, mode="sum")
