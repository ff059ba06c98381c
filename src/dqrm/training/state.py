"""The progress of a run, as stored in a checkpoint's state.json."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dqrm.errors import UserError
from dqrm.files import ANYTHING, require
from dqrm.training.clamping import Clamping


@dataclass
class State:
    """The progress of a run; with the weights and optimizers, all that resuming needs."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    loss_rows: int = 0
    best: dict[str, Any] | None = None
    without_better: int = 0
    uncounted_epoch: int = 0
    """The last epoch (from 1) whose evaluations do not count for patience; 0: none."""
    rate_factor: float = 1.0
    finished: bool = False
    metrics_bytes: int = 0
    train_seconds: float = 0.0
    train_rows: int = 0
    clamping: Clamping = field(default_factory=Clamping)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.clamping, dict):  # as read from JSON
            self.clamping = Clamping(**self.clamping)


def check_keys(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError unless a state.json that was read has the keys of `State`, and no others."""
    known = [field.name for field in fields(State)]
    # Older runs lack some fields.
    later = ("clamping", "callbacks", "uncounted_epoch")
    require(path, content, dict.fromkeys((name for name in known if name not in later), ANYTHING))
    if unknown := [name for name in content if name not in known]:
        raise UserError(f"{path} has the unknown key '{unknown[0]}': another version of dqrm wrote it")
