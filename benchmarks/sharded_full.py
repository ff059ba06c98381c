"""Trains MLPerf's DLRM tables sharded over 4 ranks of this machine, and prints what each rank needed.

    python benchmarks/sharded_full.py -o full

The tables of MLPerf's Terabyte model (187,767,399 rows of dim 128, 96 GB in FP32) times `--rows-scale`, on generated
ids, with row-wise Adagrad, INT4 rows and INT8 gradients. Stages: `dqrm train --tables sharded`, whose last rank is
killed (SIGKILL) after half of the steps; its continuation on 2 ranks; export without vocabularies; evaluation of the
artifact. One JSON object has the seconds of each, and the peak of each rank's memory beside the bytes of its shards
(weights and optimizer state): resident (RSS), and proportional (PSS, sampled twice a second), where a page that several
processes have, of a library or a file, counts a part for each. Needs Linux, `dqrm[torchrec]`, and twice the tables'
bytes of disk.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TABLE_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976, 14,
    39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
DIM, BOTTOM, TOP = 128, (512, 256, 128), (1024, 1024, 512, 256, 1)
NUM_DENSE = 13
RESUMED_BY = 2


def table_rows(options: argparse.Namespace) -> list[int]:
    """Rows of each table; none falls below 3."""
    return [max(3, round(rows * options.rows_scale)) for rows in TABLE_ROWS]


def shard_bytes(options: argparse.Namespace, ranks: int) -> int:
    """FP32 weights of the largest shards of a rank, and 4 bytes of state a row; small tables are left out."""
    rows = sum(-(-each // ranks) for each in table_rows(options) if each >= 1000)
    return int(rows * 4 * (DIM + 1))


def write_data(options: argparse.Namespace) -> None:
    """A dataset folder with as many rows as the steps read, so that each batch has ids of its own."""
    from dqrm.bench.data import write_dataset

    rows = {"train": options.steps * options.batch_size, "validation": options.evaluated, "test": options.evaluated}
    write_dataset(options.output / "data", rows, NUM_DENSE, table_rows(options), seed=1)


def train_and_die(options: argparse.Namespace) -> None:
    """A rank of `dqrm train --tables sharded`; the last one ends by SIGKILL one step after its first checkpoint."""
    from dqrm.config import Config
    from dqrm.training.launch import train

    half = options.steps // 2
    overrides: dict[str, Any] = {
        "tables": "sharded", "embedding_dim": DIM, "bottom_mlp": list(BOTTOM), "top_mlp": list(TOP), "threads": 1,
        "optimizer": "rowwise_adagrad", "batch_size": options.batch_size, "shuffle": "block", "epochs": 1,
        "patience": 0, "callbacks": [], "checkpoint_every": half, "checkpoint_minutes": 0.0, "log_every": 0,
        "exchange_timeout": 3600.0, "eval_batch_size": 256,
    }  # fmt: skip

    def progress(label: str, done: int, total: int | None) -> None:
        last = os.environ["RANK"] == str(options.ranks - 1)
        if last and label.startswith("epoch") and done == (half + 1) * options.batch_size:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(options.output / "data", options.output / "run", Config.load(None, overrides), progress)
    except Exception as error:
        raise SystemExit(str(error)) from None


STAGES = {"data": write_data, "train": train_and_die}


def run_processes(command: Sequence[str], ends: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a command once, or as ranks: seconds, peaks of memory, and what the first one printed as JSON.

    Raises:
        SystemExit: they ended otherwise than with the exit statuses `ends`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    if len(ends) > 1:
        here |= {"WORLD_SIZE": str(len(ends)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started, processes = time.perf_counter(), []
    for rank in range(len(ends)):
        environment = os.environ | here | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(ends) > 1 else {})
        out = subprocess.DEVNULL if rank else subprocess.PIPE
        processes.append(subprocess.Popen(list(command), stdout=out, text=True, env=environment))
    assert processes[0].stdout is not None
    pids = [process.pid for process in processes]
    proportional, done = dict.fromkeys(pids, 0), threading.Event()
    sampling = threading.Thread(target=_sample, args=(proportional, done))
    sampling.start()
    printed, peaks = processes[0].stdout.read(), []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peaks.append(round(usage.ru_maxrss * 1024 / 1e6, 1))
    done.set()
    sampling.join()
    ended = [process.returncode for process in processes]
    if ended != list(ends):
        raise SystemExit(f"{' '.join(command)} ended with {ended}, expected {list(ends)}")
    seconds = round(time.perf_counter() - started, 1)
    memory = {"peak_rss_mb": peaks, "peak_pss_mb": [round(each / 1e6, 1) for each in proportional.values()]}
    return {"seconds": seconds} | memory | (json.loads(printed) if printed else {})


def _sample(peaks: dict[int, int], done: threading.Event) -> None:
    """The largest PSS of each process in bytes, until one ends: the others would then have what they shared."""
    while not done.wait(0.5):
        try:
            texts = {pid: Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in peaks}
        except OSError:
            return
        for pid, text in texts.items():
            found = [1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")]
            peaks[pid] = max([peaks[pid], *found])


def measure(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All stages, one after the other, into a new folder."""
    folder: Path = options.output
    folder.mkdir(parents=True)
    run, data, artifact = (str(folder / name) for name in ("run", "data", "model.dqrm"))
    dqrm = [sys.executable, "-m", "dqrm"]

    def stage(name: str, *ends: int) -> dict[str, Any]:
        return run_processes([sys.executable, __file__, *arguments, "--stage", name], ends)

    stages = {"write data": stage("data", 0)}
    stages["train, killed at half"] = stage("train", *[1] * (options.ranks - 1), -signal.SIGKILL)
    kept = sorted(path.name for path in (folder / "run/checkpoints").iterdir())
    if kept != [f"step-{options.steps // 2:09d}"]:
        raise SystemExit(f"the killed run left {kept}, expected the checkpoint of step {options.steps // 2}")
    stages["resume"] = resumed = run_processes([*dqrm, "train", "--resume", run, "--json"], [0] * RESUMED_BY)
    stages["export"] = run_processes([*dqrm, "export", run, "-o", artifact, "--vocabulary", "none", "--json"])
    stages["evaluate artifact"] = tested = run_processes([*dqrm, "eval", artifact, data, "--split", "test", "--json"])
    checkpoint = folder / "run/checkpoints" / f"step-{options.steps:09d}"
    shards = {ranks: shard_bytes(options, ranks) / 1e6 for ranks in (options.ranks, RESUMED_BY)}
    by_ranks = {"train, killed at half": options.ranks, "resume": RESUMED_BY}

    def beside(kind: str) -> dict[str, list[float]]:
        return {
            name: [round(peak - shards[ranks], 1) for peak in stages[name][kind]] for name, ranks in by_ranks.items()
        }

    return {
        "table_rows": sum(table_rows(options)),
        "embedding_dim": DIM,
        "steps": resumed["steps"],
        "batch_size": options.batch_size,
        "shard_mb": {str(ranks): round(size, 1) for ranks, size in shards.items()},
        "peak_rss_mb_beside_shards": beside("peak_rss_mb"),
        "peak_pss_mb_beside_shards": beside("peak_pss_mb"),
        "step_ms": round(1e3 * resumed["train_seconds"] / resumed["steps"], 1),
        "checkpoint_bytes": {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())},
        "artifact_bytes": os.path.getsize(artifact),
        "largest_difference": stages["export"]["largest_difference"],
        "test": {"summary": _metrics(resumed["test"]), "artifact": _metrics(tested)},
        "stages": {
            name: {key: each[key] for key in ("seconds", "peak_rss_mb", "peak_pss_mb")} for name, each in stages.items()
        },
    }


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("rows", "auc", "log_loss")}


def main() -> None:
    """Measure and print, or be one of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-scale", type=float, default=0.125, help="Factor on the rows of every table.")
    parser.add_argument("--ranks", type=int, default=4, help="Ranks of the first half; the second has 2.")
    parser.add_argument("--steps", type=int, default=500, help="Training steps, 2 or more.")
    parser.add_argument("--batch-size", type=int, default=512, help="Samples per step, of all ranks together.")
    parser.add_argument("--evaluated", type=int, default=16_384, help="Rows of validation and test each.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="A new folder for all files.")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.steps, options.ranks) < 2:
        parser.error(f"--steps is {options.steps} and --ranks {options.ranks}, expected 2 or more of each")
    if options.stage:
        STAGES[options.stage](options)
        return
    if options.output.exists():
        parser.error(f"{options.output} exists, expected the name of a new folder")
    print(json.dumps(measure(options, sys.argv[1:]), indent=2))


if __name__ == "__main__":
    main()
