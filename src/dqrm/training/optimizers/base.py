"""Optimizers for sparse gradients: a step reads and writes the rows of the batch, never a whole table.

They are ordinary `torch.optim.Optimizer`s on parameters whose `.grad` is a sparse COO tensor, as tables of click models
and `QuantEmbeddingBag(sparse=True)` have. torch's own SGD and Adagrad refuse weight decay on such gradients, and
torch has no row-wise Adagrad.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dqrm.quant.embedding import QuantizedTables
from dqrm.quant.storage import storage_of


class SparseOptimizer(Optimizer):
    """Base class: lazy L2 and the loop over parameters; `_update` of a subclass updates the rows of a gradient only.

    The state of rows is kept in `self.state[weight]`, as tensors with as many rows as the weight.

    Attributes:
        tables: the module whose only parameter with sparse gradients this optimizer updates; its scales are then raised
            with the rows, which saves reading them once more in the next forward.
    """

    tables: QuantizedTables | None = None
    catches_up = False
    """Whether rows also move in steps without a gradient for them: `catch_up` then comes before each forward, with the
    rows of the whole batch."""

    def __init__(self, params: Iterable[Any], lr: float, l2: float, seed: int, **defaults: float) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}, expected 0 or more")
        if not l2 >= 0:
            raise ValueError(f"l2 is {l2}, expected 0 or more")
        super().__init__(params, {"lr": lr, "l2": l2, **defaults})
        self.seed = seed
        for group in self.param_groups:
            for weight in group["params"]:
                if storage_of(weight).rounds:  # the random bits of a step depend on the step count
                    self.state[weight]["steps"] = torch.zeros((), dtype=torch.int64)
                self.state[weight] |= self._new_state(weight)

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a weight [R, dim] before its first step."""
        return {}

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, but the state keeps its dtypes: torch would cast it to that of a bf16 weight."""
        super().load_state_dict(state_dict)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"]):
            for weight, number in zip(mine["params"], saved["params"]):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[weight][name] = value.clone().to(weight.device if value.dim() else "cpu")

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        """Change `weight` [R, dim] in these rows, int64 [N], by their gradients `values`, float32 [N, dim]."""
        raise NotImplementedError

    def reset_rows(self, rows: slice | Tensor) -> None:
        """Reset the state of these rows (a slice, or int64 [N]) of the first parameter to that of a new optimizer
        (0)."""
        weight = self.param_groups[0]["params"][0]
        for value in self.state[weight].values():
            if isinstance(value, Tensor) and value.dim() and len(value) == len(weight):
                value[rows] = 0

    def catch_up(self, rows: Tensor) -> None:
        """Bring rows (int64 [N], repeated or not) of the first parameter up to the last step."""

    def catch_up_all(self) -> None:
        """`catch_up` of all rows of all parameters, in one pass: before an evaluation, a copy, an export."""

    def _add(self, weight: Tensor, rows: Tensor, values: Tensor, factor: float) -> None:
        """weight[rows] += factor * values; no row twice where the storage rounds."""
        storage, seed = storage_of(weight), 0
        if storage.rounds:
            steps = self.state[weight]["steps"]
            steps += 1
            seed = (self.seed * 0x9E3779B1 + int(steps) * 0x85EBCA77) % 2**32
        quantizer = None if self.tables is None else self.tables.weight_fake_quantizer
        ranges = None if quantizer is None else quantizer.ranges_to_raise(weight)
        raised, others = storage.update(weight, rows, values, factor, seed, ranges)
        if raised and quantizer is not None:
            quantizer.raised(weight)
        if self.tables is not None and others is not None and len(others):
            self.tables.rows_changed(torch.cat([rows, others]))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the rows that the gradients name.

        Raises:
            ValueError: a gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not parameter.grad.is_sparse:
                    raise ValueError(f"{type(self).__name__} got a dense gradient, expected one of sparse tables")
                rows, values = parameter.grad._indices()[0], parameter.grad._values()
                self._update(parameter, rows, values.float(), group)
        return loss

    @torch.no_grad()
    def step_rows(self, rows: Tensor, values: Tensor) -> None:
        """One update of the first parameter by a gradient that is not in its `.grad`.

        Args:
            rows: int64 [N].
            values: float32 [N, dim], whatever the dtype of the weight.
        """
        group = self.param_groups[0]
        self._update(group["params"][0], rows, values, group)
