"""Where the vectors of dense part and tables meet: all pairwise dot products (DLRM paper)."""

import torch
from torch import Tensor

from dqrm import kernels


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
    return kernels.interact(dense, tables, pairs, self_interaction)
