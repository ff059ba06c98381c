"""Loggers: what receives the figures of a run while it trains, by name in the configuration (`training.loggers`) or as
objects with one method (`dqrm.train(..., loggers=[...])`):

    class Print:
        def log_metrics(self, metrics, step):
            print(step, metrics)

To name one in the configuration: `LOGGERS["print"] = lambda run: Print()`.
"""

from collections.abc import Callable, Mapping, Sequence

from dqrm.config import TrainingConfig
from dqrm.errors import UserError
from dqrm.options import registered
from dqrm.training.loggers.base import LoggedRun, Logger, MakeLogger, MetricsLogger
from dqrm.training.loggers.mlflow import MLflow
from dqrm.training.loggers.tensorboard import TensorBoard
from dqrm.training.loggers.wandb import WandB

__all__ = ["LOGGERS", "LoggedRun", "Logger", "Loggers", "MetricsLogger", "check_loggers", "logger_names"]

LOGGERS: dict[str, MakeLogger] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""By name, what makes the logger of a run."""


def logger_names(options: TrainingConfig) -> list[str]:
    """The loggers that a configuration names."""
    return list(dict.fromkeys((*options.loggers, *(("tensorboard",) * options.tensorboard))))


def check_loggers(named: Sequence[str], given: Sequence[MetricsLogger]) -> None:
    """Raise UserError for an unknown name, a package that is missing, or an object without the method."""
    for name in named:
        make = registered("loggers", name, LOGGERS)
        if isinstance(make, type) and issubclass(make, Logger):
            make.check()
    for logger in given:
        if not isinstance(logger, MetricsLogger):
            raise UserError(f"loggers: got a {type(logger).__name__}, expected objects with log_metrics(metrics, step)")


class Loggers:
    """All loggers of a run. One that fails is disabled with one warning: it never ends the run."""

    def __init__(
        self, named: Sequence[str], given: Sequence[MetricsLogger], run: LoggedRun, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._loggers: dict[str, MetricsLogger] = {}
        for name in named:
            self._guarded(name, lambda name=name: self._loggers.update({name: LOGGERS[name](run)}))  # type: ignore[misc]
        self._loggers |= {f"{type(logger).__name__} ({at})": logger for at, logger in enumerate(given)}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, logger in list(self._loggers.items()):
            self._guarded(name, lambda logger=logger: logger.log_metrics(metrics, step))  # type: ignore[misc]

    def close(self, finished: bool) -> None:
        for name, logger in list(self._loggers.items()):
            if close := getattr(logger, "close", None):
                self._guarded(name, lambda close=close: close(finished))  # type: ignore[misc]

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._loggers.pop(name, None)
            words = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"the logger {name} failed and is disabled; training continues ({words[:300]})")
