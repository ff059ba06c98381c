"""Metrics of a run on another day than the one that it was trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dqrm.data.dataset import Dataset
from dqrm.data.folder import SPLITS
from dqrm.data.subsampling import logit_offset, negative_weight
from dqrm.errors import UserError
from dqrm.models.calibration import Calibration
from dqrm.training.environment import Progress, resolve_device
from dqrm.training.evaluation import predict_logits
from dqrm.training.metrics import click_metrics
from dqrm.training.run import Run
from dqrm.training.threads import threads_set


def measure(
    run: Run,
    dataset: Dataset,
    splits: Sequence[str] = SPLITS,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Metrics of a run's best checkpoint on all rows of these splits together, at the log's own click rate.

    dataset: that of the run, or one that extends it: ids that the run has no row for are on row 0. calibration: that of
    the file that was exported from the run.

    Returns:
        As `training.metrics.click_metrics`.

    Raises:
        UserError: a dataset of other vocabularies; a damaged checkpoint; a prediction that is not finite.
    """
    seen, options = run.require_vocabularies(dataset), run.config.training
    model, _ = run.load_model()
    share = dataset.subsample_negatives
    # The number of threads of the run: the bits of the metrics depend on it.
    with threads_set(run.info.get("threads") or options.threads):
        model.to(resolve_device(options.device))
        each = [predict_logits(model, seen, split, options.eval_batch_size, progress) for split in splits]
    logits = np.concatenate(each) + np.float32(logit_offset(share))
    if not np.isfinite(logits).all():
        raise UserError(
            f"{run.path} predicts {logits[~np.isfinite(logits)][0]} on {dataset.path}: its training diverged"
        )
    if calibration is not None:
        logits = calibration(torch.from_numpy(logits)).numpy()
    parts = [dataset.split(split) for split in splits]
    weights, groups = [part.weights() for part in parts], [part.groups() for part in parts]
    return click_metrics(
        np.concatenate([part.labels() for part in parts]),
        logits,
        None if dataset.weight is None else np.concatenate(weights),  # type: ignore[arg-type]
        None if dataset.group is None else np.concatenate(groups),  # type: ignore[arg-type]
        negative_weight=negative_weight(share),
    )
