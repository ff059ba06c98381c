"""How good predicted clicks are."""

import math
from typing import Any

import numpy as np


def click_metrics(labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """The figures of one evaluation.

    Args:
        labels: 0 or 1, [N].
        logits: float, [N].

    Returns:
        rows; auc (None where all labels are equal); log_loss (natural logarithm); accuracy (at probability 0.5);
        ne, normalized entropy: log loss over that of always predicting the observed click rate (He et al. 2014; None
        where all labels are equal); calibration: predicted over observed clicks (None without clicks). All but `rows`
        are None where there are no rows.
    """
    from scipy.special import expit
    from sklearn.metrics import log_loss, roc_auc_score

    rows = len(labels)
    if rows == 0:
        return {"rows": 0} | dict.fromkeys(("auc", "log_loss", "accuracy", "ne", "calibration"))
    labels = labels.astype(np.int8)
    probabilities = expit(logits.astype(np.float64))
    clicks = int(labels.sum())
    both = 0 < clicks < rows
    loss = float(log_loss(labels, probabilities, labels=[0, 1]))
    rate = clicks / rows
    return {
        "rows": rows,
        "auc": float(roc_auc_score(labels, logits)) if both else None,
        "log_loss": loss,
        "accuracy": float(((logits > 0) == (labels == 1)).mean()),
        "ne": loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if both else None,
        "calibration": float(probabilities.sum() / clicks) if clicks else None,
    }
