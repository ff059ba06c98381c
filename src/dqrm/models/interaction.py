"""Where the vectors of dense part and tables meet: all pairwise dot products (DLRM paper)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dqrm import kernels


class _DotInteraction(torch.autograd.Function):
    """The pairs' products without the full matrix of them, in compiled code; sums in FP32."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor | None, tables: Tensor, self_interaction: bool, width: int) -> Tensor:
        ctx.save_for_backward(dense, tables)
        ctx.self_interaction = self_interaction
        return kernels.interact(dense, tables, self_interaction, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        dense, tables = ctx.saved_tensors
        return *kernels.interact_backward(grads[0].contiguous(), dense, tables, ctx.self_interaction), None, None


def pairs(vectors: int, self_interaction: bool) -> Tensor:
    """The pairs (i, j), j < i (j <= i with `self_interaction`), i rising, as positions i * vectors + j: int64 [P]."""
    row, column = torch.tril_indices(vectors, vectors, -1 + self_interaction)
    return row * vectors + column


def dot_interaction(dense: Tensor | None, tables: Tensor, pairs: Tensor, self_interaction: bool) -> Tensor:
    """The dense vector beside each pair's dot product.

    Args:
        dense: float32 or bf16 [B, dim], vector 0; None where there are no dense columns.
        tables: float32 [B, T, dim], the vectors after it.
        pairs: as `pairs` gives them for all vectors.
        self_interaction: whether those include each vector with itself.

    Returns:
        [B, dim + P] ([B, P] without dense), of the dtype of `dense`.
    """
    if dense is not None:
        if dense.shape != (tables.shape[0], tables.shape[2]):
            raise ValueError(
                f"got {len(dense)} dense vectors of {dense.shape[-1]} values beside ids of {len(tables)} samples with "
                f"{tables.shape[2]}, expected the same number"
            )
        dense = dense.contiguous()
    if tables.dtype == torch.float32 and kernels.fits(dense, tables):
        width = len(pairs) + (0 if dense is None else dense.shape[1])
        found: Tensor = _DotInteraction.apply(dense, tables, self_interaction, width)
        return found
    together = tables if dense is None else torch.cat([dense[:, None], tables.to(dense.dtype)], dim=1)
    products = torch.bmm(together, together.transpose(1, 2)).flatten(1).index_select(1, pairs)
    return products if dense is None else torch.cat([dense, products], dim=1)
