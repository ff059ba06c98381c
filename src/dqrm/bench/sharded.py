"""`dqrm bench sharded`: training steps of tables that TorchRec shards, with codecs and without, alternating in one run.

This module starts one process per rank and collects what they measured; `sharded_rank` is what each of them runs.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.bench.config import BenchShardedConfig
from dqrm.bench.exchange import Host, run_ranks
from dqrm.bench.measure import machine, median, require_memory, spread
from dqrm.kernels import native
from dqrm.training.environment import Progress


def run_sharded(
    options: BenchShardedConfig,
    progress: Progress | None = None,
    hosts: Sequence[Host] | None = None,
    links: str = "loopback",
) -> dict[str, Any]:
    """Measure what `options` says; returns the object that --json prints.

    Args:
        hosts, links: where each rank runs, and the name of what joins them.

    Raises:
        UserError: TorchRec is missing or does not go with torch, the tables do not fit in memory, or a rank fails.
    """
    import dqrm.torchrec  # noqa: F401 (refused here, not by each rank)

    hosts = hosts or [Host(rank) for rank in range(options.ranks)]
    # Tables of all variants live at once, each as often on all ranks as it is sharded: once; and once more when drawn.
    table_bytes = 4 * options.tables * options.rows * max(options.dim)
    require_memory(table_bytes * (len(options.variants) + options.ranks), torch.device("cpu"))
    native()  # compile the kernels once, not once per rank
    with tempfile.TemporaryDirectory(prefix="dqrm-bench-") as folder:
        path = Path(folder)
        (path / "options.json").write_text(json.dumps(asdict(options)))
        run_ranks(path, hosts, progress or (lambda *_: None), "dqrm.bench.sharded_rank")
        ranks = [json.loads((path / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]
    about = machine(torch.device("cpu"), native()) | {"threads": options.threads}
    settings = {**asdict(options), "links": links}
    variants = [variant for dim in options.dim for variant in _variants(options, dim, ranks)]
    return {"variants": variants, "machine": about, "settings": settings}


def _variants(options: BenchShardedConfig, dim: int, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per variant of one dim: times of rank 0, bytes as the mean over the ranks, ratios to FP32."""
    variants: list[dict[str, Any]] = []
    figures = {name: [rank[f"{name}/{dim}"] for rank in ranks] for name in options.variants}
    for name, own in figures.items():
        variant: dict[str, Any] = {
            "name": f"{name}, dim {dim}",
            "variant": name,
            "dim": dim,
            "batch_size": options.batch_size,
            "steps": options.steps,
            **spread(own[0]["ms"], options.batch_size * options.ranks),
        }
        for key in ("forward_bytes", "backward_bytes", "wire_bytes"):
            variant[key] = round(float(np.mean([rank[key] for rank in own])), 2)
        variant |= {"forward_ratio": None, "backward_ratio": None, "ratio_to_fp32": None}
        if "fp32" in figures:
            plain = figures["fp32"]
            for way in ("forward", "backward"):
                sent, whole = (sum(rank[f"{way}_bytes"] for rank in part) for part in (own, plain))
                variant[f"{way}_ratio"] = round(whole / sent, 4) if sent else None
            ratios = [mine / theirs for mine, theirs in zip(own[0]["ms"], plain[0]["ms"])]
            variant["ratio_to_fp32"] = round(median(ratios), 4)
        variants.append(variant)
    return variants
