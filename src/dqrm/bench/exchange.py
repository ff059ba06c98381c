"""`dqrm bench exchange`: training steps of several ranks, variants alternating in one run.

This module starts one process per rank and collects what they measured; `exchange_rank` is what each of them runs.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.bench.config import ARCHITECTURES, BenchExchangeConfig
from dqrm.bench.measure import machine, median, require_memory, spread
from dqrm.errors import UserError
from dqrm.kernels import native
from dqrm.training.environment import Progress

_NAMESPACE_PORT = 29500  # nothing else runs in a new namespace


@dataclass(frozen=True)
class Host:
    """Where one rank runs.

    Attributes:
        rank: its number, from 0.
        prefix: what to put before a command so that it runs there; nothing on loopback.
        address: its IPv4 address.
        interface: the interface to bind to and to count on.
    """

    rank: int
    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


def run_exchange(
    options: BenchExchangeConfig,
    progress: Progress | None = None,
    hosts: Sequence[Host] | None = None,
    links: str = "loopback",
) -> dict[str, Any]:
    """Measure what `options` says; returns the object that --json prints.

    Args:
        hosts, links: where each rank runs, and the name of what joins them.

    Raises:
        UserError: the tables do not fit in memory, or a rank fails.
    """
    hosts = hosts or [Host(rank) for rank in range(options.ranks)]
    progress = progress or (lambda *_: None)
    arch = ARCHITECTURES[options.arch]
    table_rows = arch.scaled(options.rows_scale)
    table_bytes = 4 * sum(table_rows) * arch.embedding_dim
    # A dense gradient is as large as its table, and so is what is exchanged of it.
    require_memory(options.ranks * table_bytes * (3 if "dense" in options.variants else 1), torch.device("cpu"))
    native()  # compile the kernels once, not once per rank
    with tempfile.TemporaryDirectory(prefix="dqrm-bench-") as folder:
        path = Path(folder)
        (path / "options.json").write_text(json.dumps(asdict(options)))
        run_ranks(path, hosts, progress, "dqrm.bench.exchange_rank")
        ranks = [json.loads((path / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]
    about = machine(torch.device("cpu"), native()) | {"threads": options.threads}
    settings = {**asdict(options), "links": links, "table_rows": sum(table_rows)}
    return {"variants": _variants(options, ranks), "machine": about, "settings": settings}


def run_ranks(path: Path, hosts: Sequence[Host], progress: Progress, module: str) -> None:
    """Start a process per rank and wait for all; the first that fails ends the others."""
    port = _NAMESPACE_PORT if hosts[0].prefix else _free_port()
    processes = []
    try:
        for host in hosts:
            environment = os.environ | {
                "RANK": str(host.rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": str(host.rank),
                "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [*host.prefix, sys.executable, "-m", module, str(path), host.interface]
            with (path / f"rank{host.rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        while running := [process for process in processes if process.poll() is None]:
            _refuse_failed(path, processes)
            with contextlib.suppress(OSError, ValueError):
                progress(*json.loads((path / "progress.json").read_text()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(0.2)
        _refuse_failed(path, processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _refuse_failed(path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(processes):
        if process.returncode:
            lines = (path / f"rank{rank}.log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"rank {rank} ended: {lines[-1] if lines else f'code {process.returncode}'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _variants(options: BenchExchangeConfig, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per variant: times of rank 0, bytes as the mean over the ranks."""
    variants = []
    times = {name: ranks[0][name]["ms"] for name in options.variants}
    for name in options.variants:
        own = [rank[name] for rank in ranks]
        variant: dict[str, Any] = {
            "name": own[0]["title"],
            "variant": name,
            "batch_size": options.batch_size,
            "steps": own[0]["steps"],
            **spread(times[name], options.batch_size * options.ranks),
        }
        for key in ("payload_bytes", "counted_bytes", "wire_bytes", "waited_ms", "cpu_ms"):
            values = [rank[key] for rank in own]
            variant[key] = None if None in values else round(float(np.mean(values)), 2)
        parts = [rank["payload_parts"] or {} for rank in own]
        variant["payload_parts"] = {part: round(float(np.mean([each[part] for each in parts])), 2) for part in parts[0]}
        # The variants of one round ran under the same conditions.
        both = "fp32" in times and len(times["fp32"]) == len(times[name])
        ratios = [mine / theirs for mine, theirs in zip(times[name], times["fp32"])] if both else []
        if not ratios and "fp32" in times:
            ratios = [median(times[name]) / median(times["fp32"])]
        variant["ratio_to_fp32"] = round(median(ratios), 4) if ratios else None
        variants.append(variant)
    return variants
