"""Fits a calibration on rows that the model was not trained on."""

import math

import numpy as np
from numpy.typing import NDArray

from dqrm.data.dataset import Dataset
from dqrm.data.subsampling import negative_weight
from dqrm.errors import UserError
from dqrm.models.base import ClickModel
from dqrm.models.calibration import Calibration
from dqrm.training.environment import Progress
from dqrm.training.evaluation import predict_logits

SPLIT = "validation"
_BINS = 50
_BATCH_SIZE = 8192
_Floats = NDArray[np.float64]


def fit(method: str, model: ClickModel, dataset: Dataset, progress: Progress | None = None) -> Calibration:
    """A calibration of the model's logits, fitted on the validation split with its weights.

    Args:
        method: 'platt', or 'isotonic': isotonic regression on the means of up to 50 bins of as many rows each.
        model: whose logits are on the log's own click rate; each negative counts for those that were dropped with it.

    Raises:
        UserError: the split has no rows, or rows of one label only; predictions are not finite, or do not rise with the
            share of clicks.
    """
    part = dataset.split(SPLIT)
    labels = np.asarray(part.labels(), np.float64)
    if not part.rows or labels.min() == labels.max():
        raise UserError(
            f"calibrate is '{method}', but the {SPLIT} split of {dataset.path} has {part.rows:,} rows and "
            f"{int(labels.sum()):,} clicks; expected rows of both labels"
        )
    given = part.weights()
    weights = np.ones(part.rows) if given is None else np.asarray(given, np.float64)
    weights = np.where(labels > 0, weights, weights * negative_weight(dataset.subsample_negatives))
    logits = predict_logits(model, dataset, SPLIT, _BATCH_SIZE, progress).astype(np.float64)
    if not np.isfinite(logits).all():
        raise UserError(f"the model predicts {logits[~np.isfinite(logits)][0]} on {SPLIT}: its training diverged")
    knots, values, slope = (_platt if method == "platt" else _isotonic)(logits, labels, weights)
    if not slope > 0:
        raise UserError(
            f"calibrate is '{method}', but on the {SPLIT} split of {dataset.path} the share of clicks falls as the "
            "model's predictions rise; export without it"
        )
    return Calibration(method, knots, values, slope, part.rows, SPLIT, dataset.fingerprint)


_Fitted = tuple[tuple[float, ...], tuple[float, ...], float]


def _platt(logits: _Floats, labels: _Floats, weights: _Floats) -> _Fitted:
    from sklearn.linear_model import LogisticRegression

    # Its default, an L2 penalty of 1 on the slope, keeps the slope finite where the model separates the labels.
    fitted = LogisticRegression(tol=1e-8, max_iter=1000).fit(logits[:, None], labels, weights)
    return (), (float(fitted.intercept_[0]),), float(fitted.coef_[0, 0])


def _isotonic(logits: _Floats, labels: _Floats, weights: _Floats) -> _Fitted:
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(logits, kind="stable")
    bins = np.array_split(order, min(_BINS, len(order)))
    # Rows of one logit are one knot, whatever bins they are in.
    columns = weights, weights * labels, weights * logits
    totals = np.array([[column[rows].sum() for column in columns] for rows in bins])
    totals = totals[totals[:, 0] > 0]
    prior = totals[:, 1].sum() / totals[:, 0].sum()
    # One more row of the overall click rate in each bin: none is 0 or 1.
    shares = (totals[:, 1] + prior) / (totals[:, 0] + 1)
    knots = totals[:, 2] / totals[:, 0]
    knots, inverse = np.unique(knots.round(3), return_inverse=True)
    counts = np.bincount(inverse, totals[:, 0])
    shares = isotonic_regression(np.bincount(inverse, shares * totals[:, 0]) / counts, sample_weight=counts)
    values = [math.log(share / (1 - share)) for share in shares]
    return tuple(map(float, knots)), tuple(values), float(values[0] < values[-1])
