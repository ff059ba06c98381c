"""The metrics that a run records: lines of metrics.jsonl, and their figures for its loggers."""

import json
import os
from pathlib import Path
from typing import IO, Any

from dqrm.training.environment import Log
from dqrm.training.loggers import Loggers


class Recorder:
    """The metrics of a run folder, open to append to.

    Args:
        folder: of the run. size: of metrics.jsonl as recorded in the checkpoint that the run resumes from; 0: a new
            run. loggers: also receive the figures. log: called if lines are lost.
    """

    def __init__(self, folder: Path, size: int, loggers: Loggers, log: Log) -> None:
        self._file = _open(folder / "metrics.jsonl", size, log)
        self._loggers = loggers

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl: its `kind`, `step` and figures."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self.tell(line["kind"], line, line["step"])

    def tell(self, kind: str, figures: dict[str, Any], step: int) -> None:
        """The figures for the loggers alone, as kind/name."""
        if found := {f"{kind}/{name}": value for name, value in figures.items() if isinstance(value, float)}:
            self._loggers.log_metrics(found, step)

    def sync(self) -> int:
        """Flush metrics.jsonl to disk; returns its size in bytes, which the checkpoint records."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self, finished: bool) -> None:
        self._file.close()
        self._loggers.close(finished)


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
