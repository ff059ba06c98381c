"""What receives the figures of a run while it trains."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dqrm.errors import UserError
from dqrm.files import read_json, write_json

_MEMORY = "loggers.json"


@runtime_checkable
class MetricsLogger(Protocol):
    """What `dqrm.train(..., loggers=[...])` takes. An object may also have `close(finished: bool)`, called last."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Figures of a step by name: train/loss, evaluation/auc, test/log_loss, ..."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger is made for, on rank 0.

    Attributes:
        folder: of the run.
        config: its configuration, as `Config.to_dict`.
        step: of the checkpoint that it resumes from; 0: it begins.
    """

    folder: Path
    config: dict[str, dict[str, Any]]
    step: int

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def parameters(self) -> dict[str, Any]:
        """The configuration, flat: section.field to value."""
        return {f"{section}.{name}": value for section, values in self.config.items() for name, value in values.items()}

    def recall(self, logger: str) -> dict[str, Any] | None:
        """What `remember` kept; None: nothing, as in a run that begins."""
        path = self.folder / _MEMORY
        found = read_json(path).get(logger) if path.exists() else None
        return found if isinstance(found, dict) else None

    def remember(self, logger: str, facts: dict[str, Any]) -> None:
        """Keep what a resumed run needs to continue the same run of the tracker."""
        path = self.folder / _MEMORY
        write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {logger: facts})


class Logger:
    """Base of the registered loggers."""

    module = extra = ""

    @classmethod
    def check(cls) -> None:
        """Raise UserError if the package that it needs is not installed."""
        try:
            importlib.import_module(cls.module)
        except ImportError:
            raise UserError(
                f"the logger {cls.extra} needs a package that is missing; `pip install 'dqrm[{cls.extra}]'` adds it"
            ) from None

    def __init__(self, run: LoggedRun) -> None:
        raise NotImplementedError

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """The run ends; not `finished`: it failed or was stopped, and can be resumed."""


MakeLogger = Callable[[LoggedRun], MetricsLogger]
