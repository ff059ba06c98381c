"""Weights & Biases; WANDB_PROJECT (by default dqrm), WANDB_MODE and its other variables say where."""

import os
import secrets
from collections.abc import Mapping

from dqrm.training.loggers.base import LoggedRun, Logger


class WandB(Logger):
    """A run of Weights & Biases, whose files are in RUN/wandb. A resumed run continues it."""

    module, extra = "wandb", "wandb"

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        known = run.recall("wandb")
        number = known["id"] if known else secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dqrm"),
            name=run.name,
            id=number,
            resume="allow",
            dir=str(run.folder),
            config=run.parameters(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A step of their own: what a resumed run logs again is behind W&B's counter, and would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if not known:
            run.remember("wandb", {"id": number})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
