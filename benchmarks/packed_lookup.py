"""Which lookup of packed rows is the fastest, and where the time of a packed model goes?

    python benchmarks/packed_lookup.py --threads 1-2

Full Kaggle tables with random codes, INT4, batch 2048: our C kernel on the mapped file and on codes in memory, plain
torch, torch's own 4-bit bags on a copy with a scale and an offset in each row (12 bytes instead of 8; one bag per
table, stacked as the model needs them), and FP32 rows. The variants alternate; prints JSON: medians in milliseconds,
and those of the parts of the whole model at batch 1, 128 and 2048.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dqrm import kernels
from dqrm.artifact.file import Artifact
from dqrm.bench.config import ARCHITECTURES, BenchInferenceConfig
from dqrm.bench.random_model import fp32_model, write_artifact
from dqrm.data.batches import Batch
from dqrm.export.check import generate
from dqrm.models.dlrm import DLRM
from dqrm.quant.packed import PackedEmbeddingBagCollection

BATCH = 2048


def rowwise(tables: PackedEmbeddingBagCollection) -> Callable[[Tensor], Tensor]:
    """torch's own 4-bit lookup of the same codes, on a copy of them in its layout."""
    copies = []
    for number, codes in enumerate(tables.codes.split(tables.table_rows)):
        whole = torch.cat([codes % 16, codes // 16], dim=1)
        scale = tables.scale[number].half()
        tail = torch.stack([scale, -8 * scale]).view(torch.uint8).expand(len(codes), 4)
        copies.append(torch.cat([whole[:, 0::2] + 16 * whole[:, 1::2], tail], dim=1).contiguous())
    look_up = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets

    def found(ids: Tensor) -> Tensor:
        offsets = torch.arange(len(ids), dtype=torch.int32)
        columns = ids.t().contiguous()
        return torch.stack([look_up(weight, column, offsets) for weight, column in zip(copies, columns)], dim=1)

    return found


def medians(
    calls: dict[str, Callable[..., Any]], arguments: Callable[[], tuple[Any, ...]], repeats: int
) -> dict[str, float]:
    """Median milliseconds of each call; they alternate, and each has its first rounds for nothing."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 5):
        for name, call in calls.items():
            given = arguments()
            start = time.perf_counter()
            call(*given)
            if round_number >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(float(np.median(taken)), 4) for name, taken in times.items()}


def parts(model: DLRM, batch: Batch, repeats: int) -> dict[str, float]:
    """Median milliseconds of the whole model and of each of its parts."""
    vectors, dense = model.tables(batch.ids), model.bottom(batch.dense)
    together = model.interact(dense, vectors)
    calls = {
        "whole": partial(model, batch.dense, batch.ids),
        "lookup": partial(model.tables, batch.ids),
        "bottom": partial(model.bottom, batch.dense),
        "interaction": partial(model.interact, dense, vectors),
        "top": partial(model.top, together),
    }
    return medians(calls, tuple, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1-2", help="numbers of threads, joined by -")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "kaggle.dqrm"
        write_artifact(path, BenchInferenceConfig(), ARCHITECTURES["kaggle"].table_rows)
        opened = Artifact.open(path)
        model, described = opened.model(), opened.content["model"]
        mapped = model.tables
        mapped.codes.view(-1)[::1024].sum()  # every page is touched before anything is timed
        memory = copy(mapped)
        memory._buffers = {**mapped._buffers, "codes": mapped.codes.clone()}
        fp32, bags = fp32_model(model).tables, rowwise(mapped)

        def plain(ids: Tensor) -> Tensor:
            with patch.object(kernels, "BACKENDS", []):
                return mapped(ids)

        variants = {"kernel, mapped": mapped, "kernel, in memory": memory, "plain torch": plain,
                    "torch 4-bit bags": bags, "FP32 rows": fp32}  # fmt: skip
        found: dict[str, Any] = {"lookup_ms": {}, "parts_ms": {}}
        ids = generate(described, BATCH).ids
        for name, look_up in variants.items():
            error = ((look_up(ids) - mapped(ids)).abs() / mapped.scale[:, None]).max().item()
            assert error < 0.02, (name, error)  # half-precision scales of torch's bags
        for threads in map(int, options.threads.split("-")):
            torch.set_num_threads(threads)
            batches = cycle([generate(described, BATCH, seed).ids for seed in range(8)])
            found["lookup_ms"][threads] = medians(variants, lambda batches=batches: (next(batches),), options.repeats)
            for size in (1, 128, BATCH):
                batch = generate(described, size)
                found["parts_ms"][f"{threads} threads, batch {size}"] = parts(model, batch, options.repeats)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
