"""Lazy Adam on sparse gradients: rows without a gradient stay as they are, and so do their moments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.quant.storage import storage_of
from dqrm.training.optimizers.base import SparseOptimizer


def check_adam(betas: tuple[float, float], eps: float, least_eps: str = "0 or more") -> None:
    """Raise ValueError for a beta outside [0, 1) or an eps below 0 (or of 0, where `least_eps` is 'above 0')."""
    for number, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{number}] is {beta}, expected at least 0 and below 1")
    if not eps >= 0 or (eps == 0 and least_eps == "above 0"):
        raise ValueError(f"eps is {eps}, expected {least_eps}")


def new_moments(weight: Tensor, rowwise: bool = False) -> dict[str, Tensor]:
    """Moments of a weight [R, dim] before its first step: float32 zeros of its shape; row-wise, the second [R, 1]."""
    shapes = {"exp_avg": weight.shape, "exp_avg_sq": (len(weight), 1) if rowwise else weight.shape}
    return {name: torch.zeros(shape, dtype=torch.float32, device=weight.device) for name, shape in shapes.items()}


def update_moments(
    state: dict[str, Tensor], rows: Tensor, values: Tensor, square: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Update the moments of these rows (int64 [N], no duplicates) by their gradients and squared gradients, float32
    [N, dim] (row-wise, squares [N, 1]). Returns copies of both moments' rows."""
    moments = []
    for name, beta, added in (("exp_avg", group["beta1"], values), ("exp_avg_sq", group["beta2"], square)):
        moments.append(state[name].index_select(0, rows).mul_(beta).add_(added, alpha=1 - beta))
        state[name].index_copy_(0, rows, moments[-1])
    return moments[0], moments[1]


class SparseAdam(SparseOptimizer):
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g**2; w -= lr * m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps).

    Adam (Kingma and Ba 2015, arXiv 1412.6980) for the rows of a gradient, g summed over duplicates of a row first and
    t the steps in which this row had a gradient. `torch.optim.SparseAdam` and FBGEMM correct by the number of all
    steps, so there a row's first update is not of size lr: half of that in step 10, 3.2 times as much after thousands.

    Row-wise, as FBGEMM's PARTIAL_ROWWISE_ADAM: one v per row for the mean of g**2 over the embedding dim.

    State: float32 `exp_avg` of the weight's shape, `exp_avg_sq` likewise or, row-wise, [R, 1], and int32 `row_steps`
    [R]: 8 bytes per weight (4 row-wise) and 4 (8) per row.

    Args:
        params: parameters with sparse gradients.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root.
        l2: lazy L2, added to the gradient.
        rowwise: one second moment per row instead of one per weight.
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.

    Raises:
        ValueError: a beta outside [0, 1), or a negative lr, eps or l2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        rowwise: bool = False,
        seed: int = 0,
    ) -> None:
        check_adam(betas, eps)
        self.rowwise = rowwise
        super().__init__(params, lr, l2, seed, beta1=betas[0], beta2=betas[1], eps=eps)

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        steps = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return {**new_moments(weight, self.rowwise), "row_steps": steps}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        rows, values = kernels.sum_duplicates(rows, values)
        if group["l2"]:
            values.add_(storage_of(weight).gather(weight, rows), alpha=group["l2"])
        state, beta1, beta2 = self.state[weight], group["beta1"], group["beta2"]
        steps = state["row_steps"].index_select(0, rows).add_(1)
        state["row_steps"].index_copy_(0, rows, steps)
        age = steps.double()[:, None]  # in float32, 1 - b2**t of a row's first steps would lose half of its digits
        square = values.square()
        if self.rowwise:
            square = square.mean(1, keepdim=True)
        first, second = update_moments(state, rows, values, square, group)
        root = second.sqrt_().mul_((1 - beta2**age).rsqrt_().float()).add_(group["eps"])
        self._add(weight, rows, first.mul_((1 / (1 - beta1**age)).float()).div_(root), -group["lr"])
