"""The metrics that a run records: lines of metrics.jsonl, and the same values for TensorBoard."""

import json
import os
from pathlib import Path
from typing import IO, Any

from dqrm.training.environment import Log


class Recorder:
    """The metrics of a run folder, open to append to.

    Args:
        folder: of the run. size: of metrics.jsonl as recorded in the checkpoint that the run resumes from; 0: a new
            run. step: of that checkpoint.
        tensorboard: write event files, too. log: called if lines are lost.
    """

    def __init__(self, folder: Path, size: int, step: int, tensorboard: bool, log: Log) -> None:
        self._file = _open(folder / "metrics.jsonl", size, log)
        self._events = _events(folder / "tensorboard", step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl: its `kind`, `step` and figures."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._events:
            for name, value in line.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def sync(self) -> int:
        """Flush metrics.jsonl to disk; returns its size in bytes, which the checkpoint records."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _open(path: Path, size: int, log: Log) -> IO[bytes]:
    """metrics.jsonl, opened for appending, truncated to the `size` recorded in a checkpoint: later lines are rewritten.

    If it is shorter, it is cut after its last whole line, and `log` is called.
    """
    file = open(path, "a+b")  # noqa: SIM115 (open as long as the run)
    length = file.seek(0, os.SEEK_END)
    if length < size:
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
        log(f"{path} has {length} bytes, fewer than the checkpoint recorded: the missing lines are lost")
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def _events(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote after the checkpoint is written again.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
