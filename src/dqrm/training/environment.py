"""What a run needs from its machine: a device, optional packages, and signals that stop it cleanly."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dqrm.config import TrainingConfig
from dqrm.distributed.world import RankLost
from dqrm.errors import UserError
from dqrm.training.loggers import MetricsLogger, check_loggers, logger_names

Progress = Callable[[str, int, int | None], None]
Log = Callable[[str], None]


def resolve_device(name: str) -> torch.device:
    """The torch device of a configuration's `device`.

    Raises:
        UserError: CUDA was requested but is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu' or 'auto'"
        )
    return device


def check_environment(options: TrainingConfig, loggers: Sequence[MetricsLogger] = ()) -> None:
    """Raise UserError if the requested device, or what a logger needs, is not available."""
    resolve_device(options.device)
    check_loggers(logger_names(options), loggers)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, as far as its system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


@contextmanager
def stop_signals(quiet: bool = False) -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C or SIGTERM sets the event instead of ending the process; the second ends it.

    After RankLost the next SIGTERM is ignored.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        if not quiet:
            os.write(2, b"\nStopping after this step and saving; a second signal ends at once.\n")
        for restored, handler in previous.items():
            signal.signal(restored, handler)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignored(number: int, frame: Any) -> None:
        signal.signal(number, terminated)

    terminated = previous[signal.SIGTERM]
    try:
        yield stopped
    except RankLost:  # torchrun sees the same rank end, and terminates this one before it has said why it ends
        previous[signal.SIGTERM] = ignored
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
