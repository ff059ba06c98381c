"""Adam with L2 on whole tables, as a dense `torch.optim.Adam` makes it, at the cost of the rows in use.

In a dense Adam every row moves in every step: its first moment goes on, and L2 is a gradient of its own, which Adam
scales up where there is no other, so that a row that no batch looks up decays to nothing in a few hundred steps. Here a
row is brought up to date when it is looked up next, before the forward (`catch_up`), from the number of steps since
then; `kernels.idle_adam` says how. One pass over the tables (`catch_up_all`) comes before an evaluation.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels.layout import IdleCourse, idle_fades, idle_powers
from dqrm.quant.storage import FP32, storage_of
from dqrm.training.optimizers.adam import check_adam, new_moments
from dqrm.training.optimizers.base import SparseOptimizer

# Steps whose learning rates are remembered one by one; of a longer run, that of every 2nd, 4th, ... step.
_ENTRIES = 1 << 16
# Rows brought up to date at once.
_CHUNK = 1 << 16


class DenseAdam(SparseOptimizer):
    """g = gradient (0 without one) + l2 w; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g**2;
    w -= lr * m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps), for every row in every step t.

    What `torch.optim.Adam(weight_decay=l2)` gives on a dense gradient, though only rows of a batch are touched. Say
    `catch_up(rows)` before the forward that looks them up, else it sees them as they were left; `catch_up_all()` before
    an evaluation. To 2e-3 of the way that a weight has gone since its last gradient; docs/numerics.md says where the
    error comes from.

    State: float32 `exp_avg` and `exp_avg_sq` of the weight's shape and int32 `last` [R], the steps that a row has seen:
    8 bytes per weight and 4 per row; `alpha` and `root`, the course of the learning rate and of the bias corrections
    (0.5 MB); `count`, `flushed` and `stride`: steps so far, at the last `catch_up_all`, and of an entry of the course.

    Args:
        params: parameters with sparse gradients.
        lr: learning rate; that of each step is remembered.
        betas: b1 and b2.
        eps: added to the root; above 0, since rows that never had a gradient have no second moment.
        l2: L2 on all rows, added to the gradient.
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.

    Raises:
        ValueError: a beta outside [0, 1), an eps that is not above 0, or a negative lr or l2.
    """

    catches_up = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_adam(betas, eps, "above 0")
        super().__init__(params, lr, l2, seed, beta1=betas[0], beta2=betas[1], eps=eps)

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return new_moments(weight) | {
            "last": torch.zeros(len(weight), dtype=torch.int32, device=weight.device),
            "alpha": torch.zeros(_ENTRIES, dtype=torch.float32, device=weight.device),
            "root": torch.zeros(_ENTRIES, dtype=torch.float32, device=weight.device),
            "count": torch.zeros((), dtype=torch.int64),
            "flushed": torch.zeros((), dtype=torch.int64),
            "stride": torch.ones((), dtype=torch.int64),
        }

    @torch.no_grad()
    def catch_up(self, rows: Tensor) -> None:
        group = self.param_groups[0]
        self._catch_up(group["params"][0], rows, group)

    @torch.no_grad()
    def catch_up_all(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                for start in range(0, len(weight), _CHUNK):
                    stop = min(start + _CHUNK, len(weight))
                    self._catch_up(weight, torch.arange(start, stop, device=weight.device), group)
                state["flushed"].copy_(state["count"])

    def reset_rows(self, rows: slice | Tensor) -> None:
        """These rows of the first parameter are new: no step so far is theirs."""
        state = self.state[self.param_groups[0]["params"][0]]
        state["exp_avg"][rows] = 0
        state["exp_avg_sq"][rows] = 0
        state["last"][rows] = int(state["count"])

    def _catch_up(self, weight: Tensor, rows: Tensor, group: dict[str, Any]) -> None:
        state, storage, course = self.state[weight], storage_of(weight), self._course(weight, group)
        now, parts = int(state["count"]), (state["exp_avg"], state["exp_avg_sq"], state["last"])
        if storage is FP32:
            rows = kernels.idle_adam(weight, *parts, rows, now, course)
        else:
            rows = torch.unique(rows[state["last"].index_select(0, rows) < now])
            before = storage.gather(weight, rows)
            after, (first, second, last) = before.clone(), (part.index_select(0, rows) for part in parts)
            kernels.idle_adam(after, first, second, last, torch.arange(len(rows), device=rows.device), now, course)
            for part, values in zip(parts, (first, second, last)):
                part.index_copy_(0, rows, values)
            self._add(weight, rows, after.sub_(before), 1.0)
        if self.tables is not None and len(rows):
            self.tables.rows_changed(rows)

    def _course(self, weight: Tensor, group: dict[str, Any]) -> IdleCourse:
        state, beta1, beta2, l2 = self.state[weight], group["beta1"], group["beta2"], group["l2"]
        powers, fades = idle_powers(beta2, l2, weight.device), idle_fades(beta1, beta2, l2, weight.device)
        stride = int(state["stride"])
        return IdleCourse(state["alpha"], state["root"], powers, fades, stride, beta1, beta2, group["eps"], l2)

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        rows, values = kernels.sum_duplicates(rows, values)
        self._catch_up(weight, rows, group)
        state = self.state[weight]
        alpha, root = self._count(weight, group)
        if group["l2"]:
            values.add_(storage_of(weight).gather(weight, rows), alpha=group["l2"])
        moments, betas = (state["exp_avg"], state["exp_avg_sq"]), (group["beta1"], group["beta2"])
        values = kernels.adam_moments(*moments, rows, values, *betas, root, group["eps"])
        state["last"].index_copy_(0, rows, torch.full_like(rows, int(state["count"]), dtype=torch.int32))
        self._add(weight, rows, values, -alpha)

    def _count(self, weight: Tensor, group: dict[str, Any]) -> tuple[float, float]:
        """One more step: its rate over 1 - b1**t, and 1 / sqrt(1 - b2**t)."""
        state = self.state[weight]
        done, stride = int(state["count"]), int(state["stride"])
        alpha = group["lr"] / (1 - group["beta1"] ** (done + 1))
        root = (1 - group["beta2"] ** (done + 1)) ** -0.5
        if done >= stride * _ENTRIES:
            for line in (state["alpha"], state["root"]):
                line[: _ENTRIES // 2] = line[::2].clone()
            stride *= 2
            state["stride"].fill_(stride)
        if done % stride == 0:
            state["alpha"][done // stride] = alpha
            state["root"][done // stride] = root
        state["count"] += 1
        return alpha, root
