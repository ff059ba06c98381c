"""Evaluate a model on a split of a dataset."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqrm.data.batches import Batch
from dqrm.data.dataset import Dataset
from dqrm.data.subsampling import logit_offset, negative_weight
from dqrm.distributed.world import World
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.training.environment import Log, Progress
from dqrm.training.metrics import calibration_curve, click_metrics
from dqrm.training.threads import scoring_threads

CALIBRATED = (
    "the model is calibrated, on the log's own click rate; leave out --no-correct-subsampling "
    "(correct_subsampling=False)"
)
"""Why it is not evaluated on the click rate of rows whose negatives were subsampled."""


def predict_logits(
    model: ClickModel,
    dataset: Dataset,
    split: str,
    batch_size: int,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    sampled: bool = False,
    collective: bool = False,
) -> np.ndarray:
    """Logits of every row of a split in its order: float32 [rows]. The model's mode is restored afterwards.

    With share (rank, ranks), of the rank's part: whole batches, so that logits do not depend on the ranks. `sampled`:
    without the model's `logit_offset`. `collective`: as of `score_split`.
    """
    with evaluating(model, sampled) as score:
        return score_split(score, dataset, split, batch_size, progress, share, collective)


@contextmanager
def evaluating(model: ClickModel, sampled: bool) -> Iterator[Callable[[Batch], torch.Tensor]]:
    """Inside, the model is in evaluation mode; yields a function from a batch to its logits."""
    device, training = model.tables.row_offsets.device, model.training

    def score(batch: Batch) -> torch.Tensor:
        moved = batch.to(device)
        logits: torch.Tensor = (model.sampled_logits if sampled else model)(moved.dense, moved.ids, moved.bags)
        return logits

    model.eval()
    try:
        yield score
    finally:
        model.train(training)


def score_split(
    score: Callable[[Batch], torch.Tensor],
    dataset: Dataset,
    split: str,
    batch_size: int,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    collective: bool = False,
) -> np.ndarray:
    """The result of `score` for every row of a split, or of a rank's shard of its batches, in order: float32 [rows].

    `collective`: `score` is a call of all ranks, so those with fewer batches score one whose result is dropped.
    """
    part, (rank, ranks) = dataset.split(split), share
    batches = part.num_batches(batch_size)
    begin, end = batches * rank // ranks, batches * (rank + 1) // ranks
    rows = min(end * batch_size, part.rows) - min(begin * batch_size, part.rows)
    logits, done = np.empty(rows, np.float32), 0
    with torch.inference_mode():
        for batch in islice(part.batches(batch_size, start_batch=begin), end - begin):
            logits[done : done + len(batch)] = score(batch).cpu().numpy()
            done += len(batch)
            if progress:
                progress(f"evaluating {split}", done, rows)
        if collective and end - begin < -(-batches // ranks):
            score(next(iter(part.batches(batch_size))))
    return logits


def evaluate_shared(
    model: ClickModel,
    dataset: Dataset,
    split: str,
    batch_size: int,
    world: World,
    progress: Progress | None = None,
    collective: bool = False,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """`evaluate` with the split's batches shared among the ranks; all get the metrics of a single process, and its
    `metrics.calibration_curve`. `collective`: as of `score_split`.

    Raises:
        UserError: as `evaluate`, on all ranks.
    """
    share = world.rank, world.size
    own = predict_logits(model, dataset, split, batch_size, progress, share, collective=collective)
    whole = world.gather_rows(torch.from_numpy(own))

    def measured() -> tuple[dict[str, Any], dict[str, list[float]]]:
        assert whole is not None
        logits, labels, weights = whole.numpy(), dataset.split(split).labels(), dataset.split(split).weights()
        metrics = measure(logits, dataset, split)
        return metrics, calibration_curve(np.asarray(labels), logits, None if weights is None else np.asarray(weights))

    return world.on_first(measured)


def evaluate(
    model: ClickModel,
    dataset: Dataset | str | Path,
    split: str,
    batch_size: int = 8192,
    progress: Progress | None = None,
    verify: bool = True,
    correct_subsampling: bool = True,
    threads: int = 0,
    log: Log | None = None,
) -> dict[str, Any]:
    """Metrics of `model` on a split of a dataset or dataset folder: see `metrics.click_metrics`.

    With `subsample_negatives` the metrics are at the log's own click rate: each negative is weighted by the number of
    negatives it represents, and a trained model's logits are corrected as in an exported file (whose own are used
    unchanged). `base_rate` in the result is then "true"; with correct_subsampling False it is "sampled", and the
    negatives are not reweighted, as in training.

    Args:
        verify: compare the split with its checksums first; once in a process while it does not change.
        threads: CPU threads; 0: the fastest number as measured, at most torch's, which is restored afterwards.
        log: called with a line that names the number.

    Raises:
        UserError: the split is damaged, a prediction is not finite, or `model` is not a model.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "tables"):
        raise UserError(
            f"model is a {type(model).__name__}, expected a click model: dqrm.load(FILE) or "
            "dqrm.Run.open(RUN).load_model()[0]"
        )
    if not correct_subsampling and getattr(model, "calibration", None) is not None:
        raise UserError(CALIBRATED)
    dataset = Dataset.of(dataset)
    if verify:
        dataset.verify(split, tell=progress)
    sampled, part = not correct_subsampling, dataset.split(split)
    with ExitStack() as held:
        if model.tables.row_offsets.device.type == "cpu" and part.rows:
            with evaluating(model, sampled) as score, torch.inference_mode():
                first, batches = next(iter(part.batches(batch_size))), part.num_batches(batch_size)
                held.enter_context(scoring_threads(lambda: score(first), batches, threads, log))
        logits = predict_logits(model, dataset, split, batch_size, progress, sampled=sampled)
    if correct_subsampling and model.logit_offset is None and dataset.subsample_negatives:
        logits += np.float32(logit_offset(dataset.subsample_negatives))
    return measure_on(logits, dataset, split, correct_subsampling)


def measure_on(logits: np.ndarray, dataset: Dataset, split: str, true_rate: bool) -> dict[str, Any]:
    """Metrics of the logits of a split at the log's click rate, or at that of its rows; and which of the two."""
    if not dataset.subsample_negatives:
        return measure(logits, dataset, split)
    weight = negative_weight(dataset.subsample_negatives) if true_rate else 1.0
    return {**measure(logits, dataset, split, weight), "base_rate": "true" if true_rate else "sampled"}


def measure(logits: np.ndarray, dataset: Dataset, split: str, negative_weight: float = 1.0) -> dict[str, Any]:
    """Metrics of the logits of a split: of its rows as in the dataset, or with its negatives reweighted.

    Raises:
        UserError: a prediction is not finite.
    """
    if not np.isfinite(logits).all():
        raise UserError(f"the model predicts {logits[~np.isfinite(logits)][0]} on {split}: its training diverged")
    part = dataset.split(split)
    weights, groups = part.weights(), part.groups()
    return click_metrics(
        np.asarray(part.labels()),
        logits,
        None if weights is None else np.asarray(weights),
        None if groups is None else np.asarray(groups),
        negative_weight=negative_weight,
    )
