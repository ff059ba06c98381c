"""Latency of one row in ExecuTorch and in ONNX Runtime, one thread each, and the sizes of the files; prints JSON.

    python benchmarks/executorch_latency.py --rows-scale 0.05 --folder latency

Kaggle's layers with random weights. Blocks of calls alternate in one process. Needs dqrm[onnx] and dqrm[executorch].
Files that are in the folder from an earlier call are used again.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dqrm.artifact.file import Artifact
from dqrm.bench.config import ARCHITECTURES, BenchInferenceConfig
from dqrm.bench.measure import machine
from dqrm.bench.random_model import write_artifact
from dqrm.data.batches import Batch
from dqrm.export.check import compare, generate, logits_of
from dqrm.export.formats import formats
from dqrm.kernels import native

BLOCKS, CALLS, UNCOUNTED = 20, 100, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows-scale", type=float, default=0.05, help="tables of this share of Kaggle's rows")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(exist_ok=True)
    artifact = options.folder / "m.dqrm"
    if not artifact.exists():
        write_artifact(
            artifact, BenchInferenceConfig(arch="kaggle"), ARCHITECTURES["kaggle"].scaled(options.rows_scale)
        )
    opened = Artifact.open(artifact)
    model = opened.model()
    batch = generate(opened.content["model"], 500)
    expected = logits_of(model, batch)
    rows = [Batch(batch.dense[n : n + 1], batch.ids[n : n + 1], (), batch.labels[n : n + 1]) for n in range(CALLS)]
    scores, figures = {}, {}
    for suffix in (".onnx", ".pte"):
        path = options.folder / f"m{suffix}"
        if not path.exists():
            formats()[suffix].write(model, path, {})
        scores[suffix] = formats()[suffix].open(path, 1)
        difference = compare(scores[suffix](batch), expected)
        figures[suffix] = {"bytes": path.stat().st_size, "largest_difference": difference}
    times: dict[str, list[float]] = {suffix: [] for suffix in scores}
    for _ in range(BLOCKS):
        for suffix, score in scores.items():
            for number, row in enumerate((*rows[:UNCOUNTED], *rows)):
                start = time.perf_counter()
                score(row)
                if number >= UNCOUNTED:
                    times[suffix].append(1000 * (time.perf_counter() - start))
    for suffix, measured in times.items():
        cuts = statistics.quantiles(measured, n=100)
        figures[suffix] |= {"median_ms": cuts[49], "p90_ms": cuts[89], "p99_ms": cuts[98]}
    ratio = figures[".pte"]["median_ms"] / figures[".onnx"]["median_ms"]
    about = machine(torch.device("cpu"), native())
    print(json.dumps({"rows": sum(model.tables.table_rows), "formats": figures, "ratio": ratio, "machine": about}))


if __name__ == "__main__":
    main()
