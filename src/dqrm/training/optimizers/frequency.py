"""Row-wise Adagrad that knows how often a row is updated: rare rows decay more, or learn more slowly.

Rows of rare ids are those that overfit from the second epoch on.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.quant.storage import storage_of
from dqrm.training.optimizers.simple import SparseAdagrad


class CounterAdagrad(SparseAdagrad):
    """c[row] = 1 + 2**(-d / halflife) * c[row]; w[row] = w[row] * max(0, 1 - lr * l2 * halflife / c[row])
    - lr * g / (sqrt(s[row]) + eps), s[row] as in row-wise Adagrad.

    FBGEMM's ROWWISE_ADAGRAD with counter-based regularization and decoupled weight decay (`genscript/optimizers.py`:
    rowwise_adagrad_with_counter, weight_decay_mode 2), where d is the number of steps since the row's last update; the
    bound 0 is ours. A row that is updated once in many halflives has c = 1 and decays by lr * l2 * halflife with each
    update, one of every step by lr * l2 * log(2): in between, each row decays alike per step.

    State: float32 `sum` and `row_counts` and int32 `last` [R], 12 bytes per row, and `count`, the steps so far.

    Args:
        params: parameters with sparse gradients.
        lr: learning rate.
        l2: decoupled weight decay, as above.
        eps: added to the root.
        halflife: steps after which half of a count is forgotten, above 0.
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.

    Raises:
        ValueError: a halflife that is not above 0, or a negative lr or l2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        l2: float = 0.0,
        eps: float = 1e-10,
        halflife: float = 10_000,
        seed: int = 0,
    ) -> None:
        if not halflife > 0:
            raise ValueError(f"halflife is {halflife}, expected a number of steps above 0")
        super().__init__(params, lr, l2, eps, True, seed, halflife=halflife)

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return super()._new_state(weight) | {
            "row_counts": torch.zeros(len(weight), dtype=torch.float32, device=weight.device),
            "last": torch.zeros(len(weight), dtype=torch.int32, device=weight.device),
            "count": torch.zeros((), dtype=torch.int64),
        }

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        rows, values = kernels.sum_duplicates(rows, values)
        state, halflife = self.state[weight], group["halflife"]
        state["count"] += 1
        now = int(state["count"])
        gap = now - state["last"].index_select(0, rows).double()
        counts = state["row_counts"].index_select(0, rows).double().mul_(torch.exp2(-gap / halflife)).add_(1)
        state["row_counts"].index_copy_(0, rows, counts.float())
        state["last"].index_copy_(0, rows, torch.full_like(rows, now, dtype=torch.int32))
        change = self._direction(weight, rows, values, group).mul_(-group["lr"])
        if group["l2"]:
            decay = (group["lr"] * group["l2"] * halflife / counts).clamp_(max=1).float()[:, None]
            change.sub_(storage_of(weight).gather(weight, rows).mul_(decay))
        self._add(weight, rows, change, 1.0)


class FrequencyAdagrad(SparseAdagrad):
    """Row-wise Adagrad whose learning rate of a row is lr * log(f[row] + 1) / max of log(f + 1) over its table.

    After the frequency-adaptive learning rate of Qiu et al. (arXiv 2505.05605; the formula is from a secondary summary,
    not checked against the paper): rows of rare ids learn more slowly, the most
    frequent row of each table at lr. f counts the steps in which a row had a gradient, this one included.

    State: float32 `sum` and int32 `row_steps` [R], 8 bytes per row.

    Args:
        params: parameters with sparse gradients; each is one table, unless it is that of `tables`.
        lr: learning rate.
        l2: lazy L2, added to the gradient.
        eps: added to the root.
        seed: of the stochastic rounding of bf16 weights; float32 weights need none.
    """

    def __init__(self, params: Iterable[Any], lr: float, l2: float = 0.0, eps: float = 1e-10, seed: int = 0) -> None:
        super().__init__(params, lr, l2, eps, True, seed)
        # The first row of each table, and the largest of its `row_steps`: known from these, so no state.
        self._known: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        steps = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return super()._new_state(weight) | {"row_steps": steps}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._known.clear()

    def reset_rows(self, rows: slice | Tensor) -> None:
        super().reset_rows(rows)
        self._known.clear()

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        rows, values = kernels.sum_duplicates(rows, values)
        if group["l2"]:
            values.add_(storage_of(weight).gather(weight, rows), alpha=group["l2"])
        of_rows = self.state[weight]["row_steps"]
        starts, most = self._largest(weight)
        steps = of_rows.index_select(0, rows).add_(1)
        of_rows.index_copy_(0, rows, steps)
        table = torch.searchsorted(starts, rows, right=True).sub_(1)
        most.scatter_reduce_(0, table, steps, "amax")
        factor = steps.double().log1p_().div_(most.index_select(0, table).double().log1p_()).float()[:, None]
        self._add(weight, rows, self._direction(weight, rows, values, group).mul_(factor), -group["lr"])

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The first row of each table, int64 [T], and its largest number of steps, int32 [T], changed in place."""
        if weight not in self._known:
            starts, of_rows = self._starts(weight), self.state[weight]["row_steps"]
            ends = [*starts.tolist(), len(weight)]
            most = [int(of_rows[a:b].max()) if b > a else 0 for a, b in pairwise(ends)]
            self._known[weight] = starts, torch.tensor(most, dtype=torch.int32, device=weight.device)
        return self._known[weight]

    def _starts(self, weight: Tensor) -> Tensor:
        starts = getattr(self.tables, "row_offsets", None)
        if starts is None or getattr(self.tables, "weight", None) is not weight:
            return torch.zeros(1, dtype=torch.int64, device=weight.device)
        return starts
