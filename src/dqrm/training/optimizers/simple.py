"""SGD and Adagrad on sparse gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.quant.storage import storage_of
from dqrm.training.optimizers.base import SparseOptimizer


class SparseSGD(SparseOptimizer):
    """w[row] -= lr * (g + l2 * w[row]) for the rows of the gradient.

    Args:
        params: parameters with sparse gradients.
        lr: learning rate.
        l2: lazy L2 (weight decay on the rows of the batch only).
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.
    """

    def __init__(self, params: Iterable[Any], lr: float, l2: float = 0.0, seed: int = 0) -> None:
        super().__init__(params, lr, l2, seed)

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        if group["l2"] or storage_of(weight).rounds:
            rows, values = kernels.sum_duplicates(rows, values)
        if group["l2"]:
            values.add_(storage_of(weight).gather(weight, rows), alpha=group["l2"])
        self._add(weight, rows, values, -group["lr"])


class SparseAdagrad(SparseOptimizer):
    """s[row] += g**2; w[row] -= lr * g / (sqrt(s[row]) + eps), with g summed over duplicates of a row first.

    Adagrad (Duchi et al. 2011). Row-wise, as FBGEMM and TorchRec do it: one accumulator per row for the mean of g**2
    over the embedding dim, so that the state is 1/dim of the table.

    Args:
        params: parameters with sparse gradients.
        lr: learning rate.
        l2: lazy L2.
        eps: added to the root.
        rowwise: one accumulator per row instead of one per weight.
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        l2: float = 0.0,
        eps: float = 1e-10,
        rowwise: bool = False,
        seed: int = 0,
        **defaults: float,
    ) -> None:
        self.rowwise = rowwise
        super().__init__(params, lr, l2, seed, eps=eps, **defaults)

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        shape = (len(weight), 1) if self.rowwise else weight.shape
        return {"sum": torch.zeros(shape, dtype=torch.float32, device=weight.device)}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        rows, values = kernels.sum_duplicates(rows, values)
        if group["l2"]:
            values.add_(storage_of(weight).gather(weight, rows), alpha=group["l2"])
        self._add(weight, rows, self._direction(weight, rows, values, group), -group["lr"])

    def _direction(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> Tensor:
        """g / (sqrt(s) + eps) of the gradients g, `values`, of rows that are each there once: in place."""
        square = values.square()
        if self.rowwise:
            square = square.mean(1, keepdim=True)
        accumulator = self.state[weight]["sum"]
        total = accumulator.index_select(0, rows).add_(square)
        accumulator.index_copy_(0, rows, total)
        return values.div_(total.sqrt_().add_(group["eps"]))
