"""Averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqrm.training.callbacks.base import Callback, weights_but_tables

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer


class EMA(Callback):
    """Evaluate, select and export an exponential moving average of all weights but the tables'; training goes on with
    its own.

    After each step, average = d * average + (1 - d) * weight, with d = min(decay, (1 + n) / (10 + n)) after n updates,
    so that a short run does not average its initial weights (Polyak averaging with the warm-up of TensorFlow's
    ExponentialMovingAverage). The running statistics of batch normalization are averaged with the weights; scales are
    those of the averages (of quantizers that clip: of their last refresh). In a checkpoint the model's weights are the
    averages, and this state has the others.

    Args:
        decay: of the average, per step, at least 0 and below 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected at least 0 and below 1")
        self.decay, self.updates = decay, 0
        # By name, the averages; inside `evaluated_weights`, and when loaded, the weights of training.
        self._held: dict[str, Tensor] = {}
        self._model: torch.nn.Module | None = None
        self._of_model: dict[str, Tensor] = {}

    def _weights(self, model: torch.nn.Module) -> dict[str, Tensor]:
        if self._model is not model:
            self._model, self._of_model = model, weights_but_tables(model)
        return self._of_model

    @torch.no_grad()
    def on_step_end(self, trainer: "Trainer", loss: Tensor) -> None:
        if self._model is not trainer.model:  # the first step of a run
            self.updates = 0
        weights = self._weights(trainer.model)
        if not self.updates:
            self._held = {name: weight.clone() for name, weight in weights.items()}
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in weights.items():
            self._held[name].lerp_(weight, 1 - decay)
        self.updates += 1

    @contextmanager
    def evaluated_weights(self, trainer: "Trainer") -> Iterator[None]:
        self._swap(trainer)
        try:
            yield
        finally:
            self._swap(trainer)

    @torch.no_grad()
    def _swap(self, trainer: "Trainer") -> None:
        if not self.updates:
            return
        for name, weight in self._weights(trainer.model).items():
            held, self._held[name] = self._held[name], weight.clone()
            weight.copy_(held)

    def on_resume(self, trainer: "Trainer") -> None:
        self._swap(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, **self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._held = {name: value for name, value in state.items() if name != "updates"}
