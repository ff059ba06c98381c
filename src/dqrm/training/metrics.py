"""How good predicted clicks are."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def click_metrics(
    labels: Array,
    logits: Array,
    weights: Array | None = None,
    groups: Array | None = None,
    negative_weight: float = 1.0,
) -> dict[str, Any]:
    """The figures of one evaluation.

    Args:
        labels: 0 or 1, [N].
        logits: float, [N].
        weights: of the rows, float [N], finite and >= 0; each figure is then that of the weighted rows.
        groups: integers [N], the group (as the user) of each row; negative: in none.
        negative_weight: how many negatives each row with label 0 stands for, in all figures but `rows`, and `auc` and
            `gauc`, which are of the rows as they are.

    Returns:
        rows; auc (None where all labels are equal); log_loss (natural logarithm); accuracy (at probability 0.5);
        ne, normalized entropy: log loss over that of always predicting the observed click rate (He et al. 2014; None
        where all labels are equal); calibration: predicted over observed clicks (None without clicks). With groups also
        gauc and gauc_coverage, see `group_auc`. All but `rows` are None where there are no rows, or none with weight.
    """
    from scipy.special import expit
    from sklearn.metrics import log_loss, roc_auc_score

    found: dict[str, Any] = {"rows": len(labels)}
    found |= dict.fromkeys(("auc", "log_loss", "accuracy", "ne", "calibration"))
    if groups is not None:
        found |= dict.fromkeys(("gauc", "gauc_coverage"))
    if weights is not None and not (weights > 0).all():
        # A row without weight is no row: it must not decide whether both labels are there.
        some = weights > 0
        labels, logits, weights = labels[some], logits[some], weights[some]
        groups = None if groups is None else groups[some]
    if len(labels) == 0:
        return found
    labels = labels.astype(np.int8)
    weights = None if weights is None else weights.astype(np.float64)
    probabilities = expit(logits.astype(np.float64))
    plain = weights
    if negative_weight != 1:
        weights = np.where(labels == 1, 1.0, negative_weight) * (1.0 if weights is None else weights)
    rows: Any = len(labels) if weights is None else weights.sum()
    clicks: Any = int(labels.sum()) if weights is None else (weights * labels).sum()
    ones = int(labels.sum())
    both = 0 < ones < len(labels)
    loss = float(log_loss(labels, probabilities, labels=[0, 1], sample_weight=weights))
    # Not as 1 - rate, which is 0 beside a click of an overwhelming weight.
    shares = clicks / rows, (len(labels) - ones if weights is None else (weights * (labels == 0)).sum()) / rows
    right = (logits > 0) == (labels == 1)
    predicted = probabilities.sum() if weights is None else (weights * probabilities).sum()
    found["auc"] = float(roc_auc_score(labels, logits, sample_weight=plain)) if both else None
    found["log_loss"] = loss
    found["accuracy"] = float(right.mean() if weights is None else (weights * right).sum() / rows)
    found["ne"] = float(loss / -sum(share * math.log(share) for share in shares)) if both and all(shares) else None
    found["calibration"] = float(predicted / clicks) if ones else None
    if groups is not None:
        found["gauc"], found["gauc_coverage"] = group_auc(labels, logits, groups, plain)
    return found


def group_auc(
    labels: Array, logits: Array, groups: Array, weights: Array | None = None
) -> tuple[float | None, float | None]:
    """GAUC: the mean of the groups' own AUC, weighted by impressions, over the groups that have both labels (Zhou et
    al., Deep Interest Network, KDD 2018); and the share of all impressions that are in them.

    Equal logits count half. Impressions are rows, or the sums of their `weights`, which must be above 0.

    Args:
        labels: 0 or 1, [N]. logits: float [N]. groups: integers [N], negative: in no group. weights: float [N] or None.

    Returns:
        (GAUC, share), GAUC None where no group has both labels; both None without rows.
    """
    if len(labels) == 0:
        return None, None
    total = float(len(labels) if weights is None else weights.sum(dtype=np.float64))
    known = groups >= 0
    if not known.all():
        labels, logits, groups = labels[known], logits[known], groups[known]
        weights = None if weights is None else weights[known]
    if len(labels) == 0:
        return None, 0.0
    order = np.lexsort((logits, groups))
    groups, logits, clicked = groups[order], logits[order], labels[order] == 1
    each = np.ones(len(order)) if weights is None else weights[order].astype(np.float64)
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    begins = np.flatnonzero(new_group)
    of_ones, of_zeros = (np.add.reduceat(each * side, begins) for side in (clicked, ~clicked))
    both = (of_ones > 0) & (of_zeros > 0)
    impressions = (of_ones + of_zeros)[both]
    if not len(impressions):
        return None, 0.0
    if weights is not None:
        # Each side of a group as shares of it: in one sum over all groups, large weights would swallow small ones.
        sizes = np.diff(np.r_[begins, len(order)])
        own = np.where(clicked, np.repeat(of_ones, sizes), np.repeat(of_zeros, sizes))
        each = each / own
        of_ones, of_zeros = np.ones_like(of_ones), np.ones_like(of_zeros)
    # Runs of equal logits within a group: whoever has the other label in one is neither above nor below.
    runs = np.flatnonzero(new_group | np.r_[True, logits[1:] != logits[:-1]])
    ones, zeros = (np.add.reduceat(each * side, runs) for side in (clicked, ~clicked))
    firsts = np.flatnonzero(new_group[runs])
    lengths = np.diff(np.r_[firsts, len(runs)])
    before = np.cumsum(zeros) - zeros
    below = before - np.repeat(before[firsts], lengths)  # zeros of the same group with smaller logits
    won = np.add.reduceat(ones * (below + zeros / 2), firsts)
    aucs = won[both] / (of_ones[both] * of_zeros[both])
    return float((aucs * impressions).sum() / impressions.sum()), float(impressions.sum() / total)


def groups_with_both_labels(labels: Array, groups: Array) -> int:
    """How many groups have rows of both labels: the ones that `group_auc` covers."""
    clicked = labels == 1
    return len(np.intersect1d(groups[clicked & (groups >= 0)], groups[~clicked & (groups >= 0)]))
