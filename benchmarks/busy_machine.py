"""How fast does training go on the default threads, beside a process that keeps a core busy?

    python benchmarks/busy_machine.py --repeats 3

The demo's model at batch 128 and the Kaggle model at batch 2048 on a generated log, trained by `dqrm train` with 1, 2
and the default number of threads (0), on the machine as it is and beside `yes`. All alternate in every repeat; prints
JSON: samples per second of training, each repeat and their median, and the default's share of the best.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig

# Flags, and the steps of a measurement that takes some seconds.
MODELS = {
    "demo": (["--embedding-dim=16", "--bottom-mlp=128-64-16", "--top-mlp=128-64-1", "--batch-size=128"], 2000),
    "kaggle": (["--embedding-dim=16", "--bottom-mlp=512-256-64-16", "--top-mlp=512-256-1", "--batch-size=2048"], 150),
}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside, `processes` processes compute and do nothing else."""
    started = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def rate(data: Path, model: str, threads: int, scale: float) -> float:
    """Samples per second of one training."""
    flags, steps = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dqrm", "train", str(data), "-o", f"{folder}/run", "--json", *flags,
                   f"--threads={threads}", "--epochs=1000", f"--max-steps={max(1, round(steps * scale))}",
                   "--device=cpu", "--log-every=0", "--optimizer=sgd", "--learning-rate=0.1", "--callbacks=",
                   "--patience=0"]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        printed = subprocess.check_output(command, text=True, env=environment)
    return float(json.loads(printed)["samples_per_second"])


def measure(data: Path, models: list[str], threads: list[int], repeats: int, scale: float) -> list[dict[str, Any]]:
    """Every model on every machine with every number of threads."""
    rates: dict[tuple[str, int, int], list[float]] = {key: [] for key in product(models, (0, 1), threads)}
    for _ in range(repeats):
        for (model, load, count), measured in rates.items():
            with busy(load):
                measured.append(rate(data, model, count, scale))
            print(f"{model}, {load} busy, threads {count}: {measured[-1]:,.0f}", file=sys.stderr)
    best = {key[:2]: max(median(each) for other, each in rates.items() if other[:2] == key[:2]) for key in rates}
    return [
        {
            "model": model,
            "busy_processes": load,
            "threads": count,
            "samples_per_second": median(measured),
            "share_of_best": round(median(measured) / best[model, load], 3),
            "repeats": measured,
        }
        for (model, load, count), measured in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,kaggle")
    parser.add_argument("--threads", default="1,2,0", help="0: the default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(f"{folder}/log.txt", GenerateConfig(rows=50_000))
        data = prepare([f"{folder}/log.txt"], f"{folder}/data", PrepareConfig(layout="criteo-kaggle"))
        threads = [int(count) for count in options.threads.split(",")]
        variants = measure(data.path, options.models.split(","), threads, options.repeats, options.scale)
    print(json.dumps({"cores": os.cpu_count(), "variants": variants}, indent=1))


if __name__ == "__main__":
    main()
