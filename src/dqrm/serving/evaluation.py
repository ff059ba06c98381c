"""Metrics of a model on a split: of a run folder, an exported file or a model in memory."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.artifact.base_rate import BaseRate
from dqrm.artifact.file import Artifact
from dqrm.data.batches import Split
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.export.formats.base import Format
from dqrm.export.origin import require_dataset
from dqrm.models.calibration import Calibration
from dqrm.serving.sources import Model, is_exported_file, path_of, scored_format
from dqrm.training.environment import Log, Progress, resolve_device
from dqrm.training.evaluation import CALIBRATED, measure_on, score_split
from dqrm.training.evaluation import evaluate as evaluate_model
from dqrm.training.run import Run
from dqrm.training.threads import SHORT, given_threads, tell_threads

# For each number of threads.
_CALLS = 3
_BATCH_SIZE = 8192


def evaluate(
    model: Model,
    data: Dataset | str | Path,
    split: str = "test",
    batch_size: int | None = None,
    progress: Progress | None = None,
    verify: bool = True,
    correct_subsampling: bool = True,
    threads: int = 0,
    log: Log | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Metrics of a model on a split of the dataset that it was trained on, or of one that extends its vocabularies: see
    `training.metrics.click_metrics`.

    With `subsample_negatives` the metrics are at the log's own click rate: each negative is weighted by the number of
    negatives it represents, and a trained model's logits are corrected as in an exported file (whose own are used
    unchanged). With correct_subsampling False negatives are not reweighted, and `logit_offset` is not added.

    Args:
        model: a run folder, an exported file (.dqrm or .onnx), or a model in memory, which stays in its mode.
        batch_size: rows scored at a time; None: a run's eval_batch_size, else 8192.
        verify: compare the split, and the files of a run or an artifact, with their checksums first.
        threads: CPU threads, or the file's runtime's; 0: the fastest number as measured, at most torch's. log: called
            with the number.
        checkpoint: of a run: 'best' on validation (None) or 'last'.
        device: of a run: as in `TrainingConfig`.

    Returns:
        rows, auc, log_loss, accuracy, ne, calibration; if negatives were subsampled base_rate ("true" or "sampled"); if
        the dataset extends the model's vocabularies newer_ids: how many ids of the split (`ids`, of `all`) the model
        has no row for. They are looked up as row 0.

    Raises:
        UserError: `model` is none of these, damaged or trained on other data; the split is damaged; a prediction
            is not finite.
    """
    path, more = path_of(model), (correct_subsampling, threads, log)
    if path is not None and not is_exported_file(path):
        run, where = Run.open(path), resolve_device(device)
        dataset = run.require_vocabularies(Dataset.of(data))
        _check(dataset, split, verify, progress)
        trained, _ = run.load_model(checkpoint or "best", verify=verify)
        size = batch_size or run.config.training.eval_batch_size
        metrics = evaluate_model(trained.to(where), dataset, split, size, progress, False, *more)
        return _with_newer_ids(metrics, dataset, split)
    if checkpoint is not None:
        what = "a model in memory" if path is None else path
        raise UserError(f"--checkpoint {checkpoint} is for run folders; {what} holds one checkpoint only")
    if device not in ("auto", "cpu"):
        raise UserError(
            f"--device {device} is for run folders; exported files are evaluated on the cpu, models where they are"
        )
    if path is None:
        return _evaluate_module(model, Dataset.of(data), split, batch_size or _BATCH_SIZE, progress, verify, *more)
    return _evaluate_file(path, data, split, batch_size or _BATCH_SIZE, progress, verify, *more)


def _evaluate_module(
    model: Any, dataset: Dataset, split: str, batch_size: int, progress: Progress | None, verify: bool, *more: Any
) -> dict[str, Any]:
    """Of a model in memory: one that `dqrm.load` gave knows its dataset, others do not."""
    from dqrm.serving.loaded import LoadedModel

    if isinstance(model, LoadedModel):
        dataset = require_dataset(model._opened.content, dataset, model._opened.path)
    if verify and dataset.narrowed:
        dataset.verify("vocabulary", tell=progress)
    metrics = evaluate_model(model, dataset, split, batch_size, progress, verify, *more)
    return _with_newer_ids(metrics, dataset, split)


def _with_newer_ids(metrics: dict[str, Any], dataset: Dataset, split: str) -> dict[str, Any]:
    if not dataset.narrowed:
        return metrics
    newer, total = dataset.split(split).newer_ids()
    return {**metrics, "newer_ids": {"ids": newer, "all": total}}


def _check(dataset: Dataset, split: str, verify: bool, progress: Progress | None) -> None:
    if verify:
        dataset.verify(split, *["vocabulary"] * dataset.narrowed, tell=progress)
    dataset.validate(split)


def _evaluate_file(
    path: Path, data: Dataset | str | Path, split: str, batch_size: int, progress: Progress | None, verify: bool,
    correct_subsampling: bool, threads: int, log: Log | None,
) -> dict[str, Any]:  # fmt: skip
    kind, opened = scored_format(path), None
    if kind.is_artifact:
        opened = Artifact.open(path, verify)
    content = kind.content(path) if opened is None else opened.content
    dataset = require_dataset(content, data, path)
    _check(dataset, split, verify, progress)
    if opened is not None:  # the file that was verified, even if it was replaced since
        model = opened.model()
        metrics = evaluate_model(model, dataset, split, batch_size, progress, False, correct_subsampling, threads, log)
        return _with_newer_ids(metrics, dataset, split)
    if not correct_subsampling and Calibration.of(content):
        raise UserError(CALIBRATED)
    threads = given_threads(threads) or _runtime_threads(kind, path, dataset.split(split), batch_size)
    tell_threads(threads, log)
    logits = score_split(kind.open(path, threads), dataset, split, batch_size, progress)
    if not correct_subsampling:
        logits -= np.float32(BaseRate.of(content).offset)
    return _with_newer_ids(measure_on(logits, dataset, split, correct_subsampling), dataset, split)


def _runtime_threads(kind: Format, path: Path, part: Split, batch_size: int) -> int:
    """The faster number of a runtime's threads on this machine now, one or torch's; one if the work is short.

    A session keeps its number and holds the model, so they are measured one after the other.
    """
    most, seconds = torch.get_num_threads(), {}
    for number in (1, most) if part.rows else ():
        score, batch = kind.open(path, number), next(iter(part.batches(batch_size)))
        score(batch)  # the first call is slower
        started = time.perf_counter()
        for _ in range(_CALLS):
            score(batch)
        seconds[number] = time.perf_counter() - started
        if seconds[1] / _CALLS * part.num_batches(batch_size) < SHORT:
            return 1
    return min(seconds, key=lambda number: seconds[number], default=1)
