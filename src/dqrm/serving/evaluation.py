"""Metrics of an exported file on a split of the dataset that it was trained on."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.data.batches import Split
from dqrm.errors import UserError
from dqrm.export.artifact import Artifact
from dqrm.export.base_rate import BaseRate
from dqrm.export.origin import require_dataset
from dqrm.export.pipeline import score_file
from dqrm.training.environment import Log, Progress
from dqrm.training.evaluation import evaluate, measure_on, score_split
from dqrm.training.threads import SHORT, given_threads, tell_threads

# Of each number of threads.
_CALLS = 3


def evaluate_file(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    batch_size: int = 8192,
    progress: Progress | None = None,
    verify: bool = True,
    correct_subsampling: bool = True,
    threads: int = 0,
    log: Log | None = None,
) -> dict[str, Any]:
    """Metrics of an exported file, .dqrm or .onnx: see `training.evaluation.evaluate`.

    Of a dataset with `subsample_negatives`, those of the file's own probabilities on the log's click rate, whether it
    corrects them or not; with correct_subsampling False those of the trained model on the rows as they are.

    Args:
        verify: compare the artifact (an .onnx file has none) and the split with their checksums first.
        threads, log: as there; of an .onnx file, ONNX Runtime's threads.

    Raises:
        UserError: the file is damaged or of another kind, or was trained on other data.
    """
    path, opened = Path(path), None
    if path.suffix == ".dqrm":
        opened = Artifact.open(path, verify)
        content = opened.content
    elif path.suffix == ".onnx":
        from dqrm.export.formats.runtimes import onnx_content

        content = onnx_content(path)
    else:
        why = "; torch.export.load can run code that is in a .pt2, so dqrm opens none" if path.suffix == ".pt2" else ""
        raise UserError(f"{path} cannot be evaluated, expected a run folder, a .dqrm or a .onnx file{why}")
    dataset = require_dataset(content, data, path)
    if verify:
        dataset.verify(split, tell=progress)
    dataset.validate(split)
    if opened is not None:  # the very file that was compared, and no other that has its name since
        model = opened.model()
        return evaluate(model, dataset, split, batch_size, progress, False, correct_subsampling, threads, log)
    threads = given_threads(threads) or _runtime_threads(path, dataset.split(split), batch_size)
    tell_threads(threads, log)
    logits = score_split(score_file(path, threads), dataset, split, batch_size, progress)
    if not correct_subsampling:
        logits -= np.float32(BaseRate.of(content).offset)
    return measure_on(logits, dataset, split, correct_subsampling)


def _runtime_threads(path: Path, part: Split, batch_size: int) -> int:
    """On which number of its threads, one or torch's, ONNX Runtime scores faster now; one where that is done at once.

    A session keeps its number and holds the model, so that they are measured one after the other.
    """
    most, seconds = torch.get_num_threads(), {}
    for number in (1, most) if part.rows else ():
        score, batch = score_file(path, number), next(iter(part.batches(batch_size)))
        score(batch)  # its first call is slower
        started = time.perf_counter()
        for _ in range(_CALLS):
            score(batch)
        seconds[number] = time.perf_counter() - started
        if seconds[1] / _CALLS * part.num_batches(batch_size) < SHORT:
            return 1
    return min(seconds, key=lambda number: seconds[number], default=1)
