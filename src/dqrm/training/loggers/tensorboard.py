"""TensorBoard event files in the run folder."""

from collections.abc import Mapping

from dqrm.training.loggers.base import LoggedRun, Logger


class TensorBoard(Logger):
    """Writes to RUN/tensorboard."""

    module, extra = "torch.utils.tensorboard", "tensorboard"

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after the checkpoint is written again.
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()
