"""Resident memory of tables in training, with and without the state of their optimizer, for each way to store them.

    python benchmarks/table_memory.py

Each variant is created in a process of its own: a model's tables are drawn, the optimizer's state is written once, and
the growth of resident memory is printed as JSON, in MB and relative to that of FP32 tables without state.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

VARIANTS = (("fp32", "sgd"), ("fp32", "adagrad"), ("bf16", "sgd"), ("int8", "sgd"), ("int8", "rowwise_adagrad"))


def growth(dtype: str, optimizer: str, rows: int, dim: int) -> dict[str, Any]:
    """MB by which resident memory grows when these tables and their state are created: measured, and by their sizes."""
    import torch

    from dqrm.bench.measure import rss_mb
    from dqrm.config import Config
    from dqrm.models.registry import build_model
    from dqrm.training.footprint import table_bytes
    from dqrm.training.step import TrainStep

    overrides = {"embedding_dim": dim, "bottom_mlp": [8, dim], "top_mlp": [1], "table_dtype": dtype}
    config = Config.load(None, {**overrides, "optimizer": optimizer, "threads": 1})
    torch.set_num_threads(1)

    def create(count: int) -> tuple[Any, Any]:
        model = build_model(config, 1, [count])
        step = TrainStep(model.train(), config)
        for value in step.optimizers[0].state[model.tables.weight].values():
            value.fill_(0)
        return model, step

    create(1000)  # compiles kernels and loads what the first model needs
    before = rss_mb()
    model, step = create(rows)
    after = rss_mb()
    if before is None or after is None:
        raise SystemExit("resident memory is not known on this system")
    counted = table_bytes(model.tables.weight, step.optimizers[0])
    return {"mb": round(after - before, 1), "counted_mb": round(sum(counted.values()) / 1e6, 1)}


def main() -> None:
    """Measure and print, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="Of the tables in FP32, in units of 10^6 bytes.")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="Embedding dims.")
    parser.add_argument("--variant", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        dtype, optimizer, rows, dim = options.variant
        print(json.dumps(growth(dtype, optimizer, int(rows), int(dim))))
        return
    found: list[dict[str, Any]] = []
    for dim in options.dims:
        rows = options.megabytes * 10**6 // (4 * dim)
        for dtype, optimizer in VARIANTS:
            command = [sys.executable, __file__, "--variant", dtype, optimizer, str(rows), str(dim)]
            measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            name = {"dim": dim, "rows": rows, "table_dtype": dtype, "optimizer": optimizer}
            found.append(name | measured)
            fp32 = next(each["mb"] for each in found if (each["dim"], each["table_dtype"]) == (dim, "fp32"))
            found[-1]["x_fp32"] = round(measured["mb"] / fp32, 4)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
