"""One run of a study, in a process of its own: it ends without the study if it fails, and with it if that is killed."""

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dqrm.artifact.file import WEIGHTS
from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.export.config import ExportConfig, PTQConfig
from dqrm.export.pipeline import export_run
from dqrm.files import write_json
from dqrm.serving.evaluation import evaluate
from dqrm.studies.imports import NONE, Imports
from dqrm.training.callbacks import Callback
from dqrm.training.environment import Log, Progress
from dqrm.training.launch import Interrupted, resolved, resume, train
from dqrm.training.run import Run, versions

SUMMARY = "summary.json"
# Seconds between two messages about progress.
_EVERY = 0.2


@dataclass(frozen=True)
class Task:
    """What a process is to do, as values that can be sent to it.

    Attributes:
        name: of the run, in messages. data: the dataset folder. folder: of the run. config: sections, of the source's
            run for PTQ. source: folder of the run to start from or to quantize. ptq: fields of PTQConfig; None: train.
        keep: which checkpoints of a finished run, 'best' or 'all'. imports: modules to import first.
    """

    name: str
    data: str
    folder: str
    config: dict[str, Any]
    source: str | None = None
    ptq: dict[str, Any] | None = None
    keep: str = "best"
    imports: Imports = NONE


def perform(task: Task, progress: Progress, log: Log, callbacks: Sequence[Callback] = ()) -> None:
    """Train, continue or leave as it is the run of a task; or quantize its source and evaluate that.

    Raises:
        UserError: it cannot be; a run was started in the folder with another configuration.
    """
    task.imports.load()
    dataset, folder = Dataset(task.data), Path(task.folder)
    if task.ptq is not None:
        assert task.source is not None
        if not (folder / SUMMARY).exists():
            folder.mkdir(parents=True, exist_ok=True)
            _quantize(Path(task.source), dataset, folder, PTQConfig(**task.ptq))
        return
    config = resolved(Config.from_dict(task.config, task.name), dataset, task.source is not None)
    if not (folder / "run.json").exists():
        train(dataset, folder, config, progress, log, callbacks=callbacks, start_from=task.source)
    else:
        _check_begun(folder, config)
        resume(folder, dataset, progress, log, callbacks=callbacks)
    if task.keep == "best":
        Run.open(folder).keep_best()


def _check_begun(folder: Path, config: Config) -> None:
    run = Run.open(folder)
    threads = run.config.training.threads  # the machine may have changed
    if replace(config, training=replace(config.training, threads=threads)) != run.config:
        raise UserError(f"{folder} was started with another configuration; name another folder with -o")


def _quantize(source: Path, dataset: Dataset, folder: Path, ptq: PTQConfig) -> None:
    """The files of a run but run.json and checkpoints, for the best checkpoint of `source` after post-training
    quantization.

    As in training, figures are of the rows as they are where negatives were subsampled.
    """
    run, packed = Run.open(source), folder / "model.dqrm"
    summary, threads = run.summary, run.config.training.threads or 1
    if summary is None:
        raise UserError(f"{source} is not finished")
    options = ExportConfig(data=str(dataset.path), vocabulary="none", correct_subsampling=False)
    exported = export_run(source, packed, options, ptq)
    splits = [split for split in ("validation", "test") if dataset.rows.get(split)]
    metrics = {split: evaluate(packed, dataset, split, correct_subsampling=False, threads=threads) for split in splits}
    packed.unlink()  # `dqrm quantize` makes it in seconds, with vocabularies
    best = summary["best"]
    if best is not None and "validation" in metrics:
        best = {"step": best["step"], "epoch": best["epoch"], "train_loss": None, "metrics": metrics["validation"]}
        line = {**metrics["validation"], "kind": "evaluation", "split": "validation", "best": True}
        line |= {"epoch": best["epoch"], "step": best["step"]}
        (folder / "metrics.jsonl").write_text(json.dumps(line, allow_nan=False) + "\n", encoding="utf-8")
    kept = {name: summary[name] for name in ("selection", "steps", "config", "seed", "data")}
    write_json(folder / SUMMARY, {
        "best": best,
        "test": metrics.get("test"),
        "stored_bytes": {"total": sum(exported["parts"][part] for part in WEIGHTS)},
        "bits_per_weight": exported["bits_per_weight"],
        "ptq": {"of": str(source), **asdict(ptq)},
        "versions": versions(),
        **kept,
    })  # fmt: skip


def child(task: Task, log_file: str, connection: Connection) -> None:
    """The process: performs the task and sends ('progress', (stage, done, total)), ('warning', text), and last
    ('finished' or 'failed' or 'stopped', text)."""
    _detach(log_file)
    sent_at = 0.0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal sent_at
        if time.monotonic() - sent_at >= _EVERY:
            sent_at = time.monotonic()
            connection.send(("progress", (stage, done, total)))

    def log(line: str) -> None:
        print(f"[{task.name}] {line}", flush=True)
        if line.startswith("Warning"):
            connection.send(("warning", line))

    try:
        perform(task, progress, log)
        outcome = ("finished", "")
    except (Interrupted, KeyboardInterrupt):
        outcome = ("stopped", "")
    except UserError as error:
        outcome = ("failed", str(error))
    except BaseException as error:  # polars' panics, too
        traceback.print_exc()
        outcome = ("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
    log(" ".join(outcome).strip())
    connection.send(outcome)


def _detach(log_file: str) -> None:
    """Leave Ctrl-C to the study, which stops its runs; print to the log; end when the study does, however it ends."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
    study = multiprocessing.parent_process()
    assert study is not None

    def follow() -> None:
        study.join()
        os._exit(1)  # nothing half-written looks finished, and the lock on the run is released

    threading.Thread(target=follow, daemon=True).start()
