"""Clock, memory and machine of a measurement."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.errors import UserError
from dqrm.training.environment import free_memory


class Clock:
    """The time in milliseconds, after the device has finished all pending work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()


def median(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return float(np.median(values)) if values else 0.0


def spread(samples: Sequence[float], per_step: int) -> dict[str, float]:
    """Median, percentiles and mean of `samples` (milliseconds), and samples per second at `per_step` per step."""
    low, middle, high = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    return {
        "median_ms": round(middle, 4),
        "p10_ms": round(low, 4),
        "p90_ms": round(high, 4),
        "mean_ms": round(float(np.mean(samples)), 4),
        "per_second": round(1e3 * per_step / middle, 1),
    }


def machine(device: torch.device, native: bool) -> dict[str, Any]:
    """What the figures were measured on."""
    on_cuda = device.type == "cuda"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": native,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def rss_mb() -> float | None:
    """Resident memory of this process in MB (1e6 bytes); None if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process in MB; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6, 1)


def require_memory(needed: int, device: torch.device) -> None:
    """Raise UserError if tables of `needed` bytes do not fit in what is free on `device`."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"the tables take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are free; "
            "a smaller --rows-scale shrinks them"
        )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
