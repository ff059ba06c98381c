"""Trains the Terabyte architecture at its full size with tables stored in 8 bits, and prints what each stage needed.

    python benchmarks/terabyte_int8.py -o full

49,113,849 rows of dim 64 (12.57 GB in FP32) as INT8 rows with row-wise Adagrad, on generated ids, with an INT4 forward.
The stages are commands of dqrm, each in a process of its own: training, which is killed (SIGKILL) after half of the
steps, its continuation from the checkpoint, export without vocabularies, and the evaluation of run and artifact. One
JSON object has the seconds and the peak of resident memory of each. Needs 16 GB of disk.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dqrm.bench.config import ARCHITECTURES, NUM_DENSE

ARCH = ARCHITECTURES["terabyte"]
EVALUATED = 65_536


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """A dataset folder with as many rows as the steps read, so that each batch has ids of its own."""
    from dqrm.bench.data import write_dataset

    rows = {"train": options.steps * options.batch_size, "validation": options.evaluated, "test": options.evaluated}
    write_dataset(folder / "data", rows, NUM_DENSE, ARCH.scaled(options.rows_scale), seed=1)


def train_and_die(folder: Path, options: argparse.Namespace) -> None:
    """`dqrm train`, which ends by SIGKILL one step after its first checkpoint."""
    from dqrm.config import Config
    from dqrm.training.launch import train

    half = options.steps // 2
    overrides: dict[str, Any] = {
        "embedding_dim": ARCH.embedding_dim, "bottom_mlp": list(ARCH.bottom_mlp), "top_mlp": list(ARCH.top_mlp),
        "bits": 4, "table_dtype": "int8", "optimizer": "rowwise_adagrad", "batch_size": options.batch_size,
        "shuffle": "block",
        "epochs": 1, "patience": 0, "callbacks": [], "checkpoint_every": half, "checkpoint_minutes": 0.0,
        "log_every": 0,
    }  # fmt: skip

    def progress(label: str, done: int, total: int | None) -> None:
        if label.startswith("epoch") and done == (half + 1) * options.batch_size:
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder / "data", folder / "run", Config.load(None, overrides), progress)


STAGES = {"data": write_data, "train": train_and_die}


def run_stage(command: list[str], ends: int = 0) -> dict[str, Any]:
    """Run a command in a process of its own: what it printed as JSON, its seconds and its peak of resident memory.

    Raises:
        SystemExit: it ended otherwise than with the exit status `ends`.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != ends:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}, expected {ends}")
    seconds = round(time.perf_counter() - started, 1)
    needed = {"seconds": seconds, "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1)}
    return needed | (json.loads(printed) if printed else {})


def measure(folder: Path, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All stages, one after the other, into a new folder."""
    folder.mkdir(parents=True)
    run, data, artifact = (str(folder / name) for name in ("run", "data", "model.dqrm"))
    dqrm = [sys.executable, "-m", "dqrm"]

    def stage(name: str, ends: int = 0) -> dict[str, Any]:
        return run_stage([sys.executable, __file__, *arguments, "--stage", name], ends)

    stages = {"write data": stage("data"), "train, killed at half": stage("train", -signal.SIGKILL)}
    kept = list((folder / "run/checkpoints").iterdir())
    if [path.name for path in kept] != [f"step-{options.steps // 2:09d}"]:
        raise SystemExit(f"the killed run left {kept}, expected the checkpoint of step {options.steps // 2}")
    stages["resume"] = stage_resume = run_stage([*dqrm, "train", "--resume", run, "--json"])
    stages["export"] = run_stage([*dqrm, "export", run, "-o", artifact, "--vocabulary", "none", "--json"])
    of_run = run_stage([*dqrm, "eval", run, data, "--split", "test", "--json"])
    of_artifact = run_stage([*dqrm, "eval", artifact, data, "--split", "test", "--json"])
    stages |= {"evaluate run": of_run, "evaluate artifact": of_artifact}
    checkpoint = folder / "run/checkpoints" / f"step-{options.steps:09d}"
    rows, summary = sum(ARCH.scaled(options.rows_scale)), stage_resume
    trained = [stages["train, killed at half"], stage_resume]
    return {
        "table_rows": rows,
        "embedding_dim": ARCH.embedding_dim,
        "steps": summary["steps"],
        "batch_size": options.batch_size,
        "fp32_table_bytes": 4 * rows * ARCH.embedding_dim,
        "training_peak_rss_mb": max(each["peak_rss_mb"] for each in trained),
        "step_ms": round(1e3 * summary["train_seconds"] / summary["steps"], 1),
        "checkpoint_bytes": {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())},
        "artifact_bytes": os.path.getsize(artifact),
        "largest_difference": stages["export"]["largest_difference"],
        "test": {"summary": summary["test"], "run": _metrics(of_run), "artifact": _metrics(of_artifact)},
        "stages": {name: {key: each[key] for key in ("seconds", "peak_rss_mb")} for name, each in stages.items()},
    }


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("rows", "auc", "log_loss")}


def main() -> None:
    """Measure and print, or be one of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-scale", type=float, default=1.0, help="Factor on the rows of every table.")
    parser.add_argument("--steps", type=int, default=1000, help="Training steps, 2 or more.")
    parser.add_argument("--batch-size", type=int, default=2048, help="Samples per step.")
    parser.add_argument("--evaluated", type=int, default=EVALUATED, help="Rows of validation and test each.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="A new folder for all files.")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}, expected 2 or more: the run is killed after half of them")
    if options.stage:
        STAGES[options.stage](options.output, options)
        return
    if options.output.exists():
        parser.error(f"{options.output} exists, expected the name of a new folder")
    print(json.dumps(measure(options.output, options, sys.argv[1:]), indent=2))


if __name__ == "__main__":
    main()
