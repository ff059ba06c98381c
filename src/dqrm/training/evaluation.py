"""Run a model over a split and measure it."""

from typing import Any

import numpy as np
import torch

from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.models.dlrm import DLRM
from dqrm.training.environment import Progress
from dqrm.training.metrics import click_metrics


def predict_logits(
    model: DLRM, dataset: Dataset, split: str, batch_size: int, progress: Progress | None = None
) -> np.ndarray:
    """Logits of every row of a split in its order: float32 [rows]. The model's mode is restored afterwards."""
    part, device, training = dataset.split(split), model.tables.weight.device, model.training
    logits, done = np.empty(part.rows, np.float32), 0
    model.eval()
    with torch.inference_mode():
        for batch in part.batches(batch_size):
            moved = batch.to(device)
            logits[done : done + len(batch)] = model(moved.dense, moved.ids, moved.bags).cpu().numpy()
            done += len(batch)
            if progress:
                progress(f"evaluating {split}", done, part.rows)
    model.train(training)
    return logits


def evaluate(
    model: DLRM, dataset: Dataset, split: str, batch_size: int = 8192, progress: Progress | None = None
) -> dict[str, Any]:
    """Metrics of `model` on a split: see `metrics.click_metrics`.

    Raises:
        UserError: a prediction is no finite number.
    """
    logits = predict_logits(model, dataset, split, batch_size, progress)
    if not np.isfinite(logits).all():
        raise UserError(f"the model predicts {logits[~np.isfinite(logits)][0]} on {split}: its training diverged")
    return click_metrics(np.asarray(dataset.split(split).labels()), logits)
