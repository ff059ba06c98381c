"""`dqrm bench inference`: scoring with the packed artifact, with ONNX Runtime and with our FP32 model.

All hold the same values, which is checked before anything is measured. The calls of a variant come in blocks, and the
variants' blocks alternate: after a call the threads of a runtime (OpenMP's, ONNX Runtime's) spin for a while in wait of
the next one, which users want and other variants would suffer from. So each block begins with a pause, in which
the others' threads fall asleep, and with a few calls that are not counted.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.artifact.file import Artifact
from dqrm.bench.config import ARCHITECTURES, NUM_DENSE, BenchInferenceConfig
from dqrm.bench.data import endless, write_split
from dqrm.bench.measure import machine, median, require_memory, spread
from dqrm.bench.random_model import fp32_model, write_artifact
from dqrm.data.batches import Batch, Split
from dqrm.errors import UserError
from dqrm.export.check import compare, generate, logits_of
from dqrm.export.formats import score_file
from dqrm.export.pipeline import TOLERANCE
from dqrm.kernels import native
from dqrm.models.base import ClickModel
from dqrm.training.environment import Progress
from dqrm.training.threads import threads_set

Score = Callable[[Batch], Tensor]

TITLES = {"packed": "packed artifact", "onnx": "ONNX Runtime", "fp32": "our FP32"}
SCORED_ROWS = 1000
PROCESSES = 3
_SAMPLES = 262_144
_BLOCKS, _PAUSE_SECONDS, _UNCOUNTED = 15, 0.05, 2
# What a user would write; figures of one process, as a last line of JSON. Anonymous memory is the process's own; the
# rest is pages of files, which the system takes back when it needs memory.
_PROCESS = """
import json, sys, time
from pathlib import Path
import torch, dqrm
from dqrm.bench.measure import rss_mb
from dqrm.artifact.file import Artifact
from dqrm.export.check import generate
kind, path, artifact, rows, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
load = dqrm.load
if kind == "onnx":
    import onnxruntime
    from dqrm.export.formats import score_file
libraries = rss_mb()
start = time.perf_counter()
if kind == "onnx":
    score = score_file(Path(path), int(threads))
else:
    model = load(path)
    score = lambda batch: model(batch.dense, batch.ids, batch.bags)
seconds, loaded = time.perf_counter() - start, rss_mb()
batch = generate(Artifact.open(artifact).content["model"], int(rows))
with torch.inference_mode():
    score(batch)
figures = {"load_seconds": seconds, "libraries_mb": libraries, "loaded_mb": loaded, "scored_mb": rss_mb()}
figures["anonymous_mb"] = None
try:
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    figures["anonymous_mb"] = 1024 * int(lines["RssAnon"].split()[0]) / 1e6
except (OSError, KeyError):
    pass
print(json.dumps(figures))
"""


def run_inference(options: BenchInferenceConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what `options` says; returns the object that --json prints.

    Raises:
        UserError: the tables do not fit in memory, the folder is missing, or the variants' probabilities differ.
    """
    with (
        threads_set(max(options.threads)),
        _folder(options.folder) as folder,
        tempfile.TemporaryDirectory(prefix="dqrm-bench-") as data,
    ):
        return _run(options, folder, Path(data), progress or (lambda *_: None))


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="dqrm-bench-") as path:
            yield Path(path)
    elif not Path(given).is_dir():
        raise UserError(f"bench inference: there is no folder {given}")
    else:
        yield Path(given)


def _run(options: BenchInferenceConfig, folder: Path, data: Path, progress: Progress) -> dict[str, Any]:
    arch = ARCHITECTURES[options.arch]
    table_rows = arch.scaled(options.rows_scale)
    values, names = sum(table_rows) * arch.embedding_dim, list(options.variants)
    codes = values * options.bits // 8
    # ONNX Runtime reads the file into memory and may copy from there; an exporter holds it once or twice too.
    require_memory(4 * values * ("fp32" in names) + codes * (4 if "onnx" in names else 1), torch.device("cpu"))
    skipped: dict[str, str] = {}
    if "onnx" in names and (missing := _missing("onnx", "onnxruntime")):
        skipped["onnx"] = f"{missing} is not installed"
        names.remove("onnx")

    about = machine(torch.device("cpu"), native())  # which also compiles the kernels, where that is still to do
    files = _write_files(options, names, table_rows, folder, progress)
    opened = Artifact.open(files["packed"])
    # Before this process maps the files. FP32 tables have no file of their own.
    processes: dict[str, dict[str, Any]] = {}
    for name in (name for name in names if name in files):
        for cache in ("warm", "cold")[: 1 + hasattr(os, "posix_fadvise")]:
            progress(f"processes that load: {name}, {cache}", 0, None)
            figures = _in_processes(name, files[name], files["packed"], max(options.threads), cache == "cold")
            processes[f"{name}_{cache}"] = figures
    progress("creating the models", 0, None)
    models = _models(opened.model(), names)
    progress("generating data", 0, None)
    split = write_split(data / "data", max(_SAMPLES, *options.batch_size), NUM_DENSE, table_rows, options.seed)
    variants, difference, checked = [], 0.0, generate(opened.content["model"], SCORED_ROWS, options.seed)
    for threads in options.threads:
        torch.set_num_threads(threads)
        scores = _scores(models, names, files, threads)
        difference = max(difference, _require_equal(scores, [checked, next(split.batches(SCORED_ROWS))]))
        for batch_size in options.batch_size:
            stage = f"{threads} threads, batch {batch_size}"
            times = measure(scores, split, batch_size, options, partial(progress, stage))
            variants += _results(times, batch_size, threads)
    return {
        "variants": variants,
        "machine": about,
        "settings": _settings(options, table_rows),
        "skipped": skipped,
        "memory": {"processes": processes, "fp32_tables_mb": round(4 * values / 1e6, 1)},
        "load": {name: processes.get(f"{name}_warm", {}).get("load_seconds") for name in names},
        "artifact_bytes": files["packed"].stat().st_size,
        "onnx_bytes": _bytes(files["onnx"]) if "onnx" in files else None,
        "largest_difference": difference,
    }


def _settings(options: BenchInferenceConfig, table_rows: Sequence[int]) -> dict[str, Any]:
    return {
        **asdict(options),
        "table_rows": sum(table_rows),
        "scored_rows": SCORED_ROWS,
        "processes": PROCESSES,
        "blocks": _BLOCKS,
        "pause_seconds": _PAUSE_SECONDS,
        "ratio_to_fp32": "rows per second (by the median) over those of fp32 at the same batch size and threads",
        "page_cache": "warm: the files were just written, and every page is touched before calls are timed; "
        "processes named _cold load a file that the system was asked to forget",
    }


def _write_files(
    options: BenchInferenceConfig, names: Sequence[str], table_rows: Sequence[int], folder: Path, progress: Progress
) -> dict[str, Path]:
    """The files to measure, by variant."""
    files = {"packed": folder / f"bench-{options.arch}-int{options.bits}.dqrm"}
    progress("writing the artifact", 0, None)
    write_artifact(files["packed"], options, table_rows)
    if "onnx" in names:
        from dqrm.export.formats.onnx_writer import write_onnx

        progress("writing the ONNX file", 0, None)
        files["onnx"] = files["packed"].with_suffix(".onnx")
        write_onnx(Artifact.open(files["packed"]).model(), files["onnx"], {})
    return files


def _models(packed: ClickModel, names: Sequence[str]) -> dict[str, ClickModel]:
    """Our own variants; every page of their tables has been touched."""
    tables: Any = packed.tables
    tables.codes.view(-1)[::1024].sum()
    made = {"packed": packed, "fp32": fp32_model(packed) if "fp32" in names else packed}
    return {name: made[name] for name in names if name in made}


def _scores(
    models: Mapping[str, ClickModel], names: Sequence[str], files: Mapping[str, Path], threads: int
) -> dict[str, Score]:
    return {
        name: partial(logits_of, models[name]) if name in models else score_file(files[name], threads) for name in names
    }


def _require_equal(scores: Mapping[str, Score], batches: Sequence[Batch]) -> float:
    """The largest difference between the variants' probabilities.

    Raises:
        UserError: it is so large that they are not the same model.
    """
    largest, first = 0.0, "fp32" if "fp32" in scores else next(iter(scores))
    for batch in batches:
        expected = scores[first](batch)
        for name, score in scores.items():
            difference = compare(score(batch), expected)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"bench inference: the probabilities of {name} and {first} differ by up to {difference:.3g}, more "
                    f"than {TOLERANCE:g}: they are not the same model, so their speeds are not compared"
                )
            largest = max(largest, difference)
    return largest


def measure(
    scores: Mapping[str, Score],
    split: Split,
    batch_size: int,
    options: BenchInferenceConfig,
    progress: Callable[[int, int], None],
) -> dict[str, list[float]]:
    """Milliseconds of each variant's calls, in blocks; variants in random order within each round of blocks.

    Each variant has batches of its own, drawn beforehand, so that none finds rows in the caches that another just
    looked up.
    """
    calls = options.repeats * (10 if batch_size <= 128 else 1)
    streams = {}
    for number, (name, score) in enumerate(scores.items()):
        drawn = endless(split, batch_size, "global", options.seed + 1 + number)
        batches = list(islice(drawn, min(calls, max(1, _SAMPLES // batch_size))))
        if (
            name == "onnx"
        ):  # its type of ids; converting at each call would wake torch's threads, which spin beside its own
            batches = [replace(batch, ids=batch.ids.long()) for batch in batches]
        streams[name] = cycle(batches)
        for batch in islice(streams[name], options.warmup):
            score(batch)
    times: dict[str, list[float]] = {name: [] for name in scores}
    shuffler, blocks = random.Random(options.seed), min(_BLOCKS, calls)
    for block in range(blocks):
        progress(block, blocks)
        size = (block + 1) * calls // blocks - block * calls // blocks
        for name in shuffler.sample(list(scores), len(scores)):
            score, stream, taken = scores[name], streams[name], times[name]
            time.sleep(_PAUSE_SECONDS)
            for batch in islice(stream, _UNCOUNTED):
                score(batch)
            for batch in islice(stream, size):
                start = time.perf_counter_ns()
                score(batch)
                taken.append((time.perf_counter_ns() - start) / 1e6)
    progress(blocks, blocks)
    return times


def _results(times: Mapping[str, list[float]], batch_size: int, threads: int) -> list[dict[str, Any]]:
    """One object per variant."""
    return [
        {
            "name": TITLES[name],
            "variant": name,
            "batch_size": batch_size,
            "threads": threads,
            "calls": len(taken),
            **spread(taken, batch_size),
            "p99_ms": round(float(np.percentile(taken, 99)), 4),
            "ratio_to_fp32": round(median(times["fp32"]) / median(taken), 4) if "fp32" in times else None,
        }
        for name, taken in times.items()
    ]


def _in_processes(kind: str, path: Path, artifact: Path, threads: int, cold: bool = False) -> dict[str, Any]:
    """Seconds to load and resident memory, each the median over fresh processes; `cold`: with nothing cached."""
    runs = []
    for _ in range(PROCESSES):
        if cold:
            _forget(path)
        arguments = [sys.executable, "-c", _PROCESS, kind, str(path), str(artifact), str(SCORED_ROWS), str(threads)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"bench inference: the process that loads {path.name} failed: {reason}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: None
        if runs[0][key] is None
        else round(median([run[key] for run in runs]), 4 if key == "load_seconds" else 1)
        for key in runs[0]
    }


def _forget(path: Path) -> None:
    """Have the system drop what it has cached of a file; no process may have it mapped."""
    with path.open("rb+") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _missing(*packages: str) -> str | None:
    """The first of these packages that is not installed."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            return package
    return None


def _bytes(path: Path) -> int:
    """Of an ONNX file and of the data beside it, where it has some."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
