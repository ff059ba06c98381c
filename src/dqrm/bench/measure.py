"""Clock, memory and the machine: what a figure must be read with."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.errors import UserError


class Clock:
    """Milliseconds now, when all that was started on the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()


class Scales:
    """Watches the scales of `tables`: counts and times their exact refreshes, and on demand all else done for them.

    Attributes:
        refreshes: milliseconds of each refresh so far.
        all_ms: milliseconds of each lookup that went into its scales, refreshes included, while `timed` is set.
    """

    def __init__(self, tables: Any, clock: Clock) -> None:
        self.tables, self.timed = tables, False
        self.refreshes: list[float] = []
        self.all_ms: list[float] = []
        quantizer = tables.weight_fake_quantizer
        refresh, begin = quantizer.refresh, quantizer.before_forward

        def timed_refresh(weight: Tensor, everything: bool = False) -> None:
            start = clock()
            refresh(weight, everything)
            self.refreshes.append(clock() - start)

        def timed_begin(weight: Tensor, sparse: bool) -> None:
            start = clock() if self.timed else 0.0
            begin(weight, sparse)
            if self.timed:
                self.all_ms.append(clock() - start)

        quantizer.refresh, quantizer.before_forward = timed_refresh, timed_begin

    def full_refresh_ms(self, repeats: int = 5) -> float:
        """Median time of a refresh that reads every row."""
        for _ in range(repeats):
            self.tables.refresh_scale()
        return median(self.refreshes[-repeats:])


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
    """Resident memory of this process in MB (1e6 bytes); None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far in MB; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6, 1)


def require_memory(needed: int, device: torch.device) -> None:
    """Raise UserError if tables of `needed` bytes do not fit in what is free on `device`."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        except OSError:
            return
        if "MemAvailable" not in lines:
            return
        free = 1024 * int(lines["MemAvailable"].split()[0])
    if needed > free:
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
