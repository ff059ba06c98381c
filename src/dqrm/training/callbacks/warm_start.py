"""Begin with the MLP of an earlier run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.training.callbacks.base import Callback, weights_but_tables

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer
    from dqrm.training.run import Run


class WarmStart(Callback):
    """Begin with all weights but the tables' of an earlier run, as for the data of a new day.

    The MLP adapts to a new embedding space, whatever the ids of the new data are: what MEDA's continual variant (arXiv
    2407.01607) rests on. The paper keeps as many embedding spaces as there are epochs per day; here each day's tables
    are drawn by the seed of its run.

    Args:
        run: a run folder that all ranks see, of the same architecture and as many columns; its best checkpoint is read.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def _open(self) -> "Run":
        from dqrm.training.run import Run

        return Run.open(self.run)

    def check(self, config: Config) -> None:
        self._open()

    @torch.no_grad()
    def on_epoch_start(self, trainer: "Trainer") -> None:
        if trainer.state.epoch:
            return
        earlier = weights_but_tables(self._open().load_model(mapped=True)[0])
        weights = weights_but_tables(trainer.model)
        here, there = (
            {name: weight for name, weight in mine.items() if name not in other or other[name].shape != weight.shape}
            for mine, other in ((weights, earlier), (earlier, weights))
        )
        if here or there:
            raise UserError(
                f"warm_start: {self.run} has {shapes(there)}, expected this run's {shapes(here)}: the same "
                "architecture, as many columns, and the same quantizers where they learn scales"
            )
        for name, weight in weights.items():
            weight.copy_(earlier[name])


def shapes(weights: Mapping[str, Tensor]) -> str:
    """Names and shapes, for people."""
    return ", ".join(f"{name} {list(weight.shape)}" for name, weight in weights.items()) or "no other weights"
