"""Metrics of predicted click probabilities, in one register. To add one:

    METRICS["brier"] = Metric(lambda s: float(np.mean((s.probabilities - s.labels) ** 2)), higher_is_better=False)

It is then computed in each evaluation, logged, shown, and accepted as `select_by`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Scores:
    """Labels and predictions of one evaluation, at least one row.

    Attributes:
        labels: 0 or 1, int8 [N].
        logits: float [N]. probabilities: float64 [N].
        row_weights: of the rows as the data has them, float64 [N], above 0; None: 1 each.
        weights: the same, with each negative times the number of negatives it represents; None: 1 each.
        groups: integers [N], the group (as the user) of each row; negative: in none; None where the data has none.
    """

    labels: Array
    logits: Array
    probabilities: Array
    row_weights: Array | None
    weights: Array | None
    groups: Array | None

    @cached_property
    def positives(self) -> int:
        """Rows with label 1, whatever their weight."""
        return int(self.labels.sum())

    @property
    def both_labels(self) -> bool:
        return 0 < self.positives < len(self.labels)

    @cached_property
    def log_loss(self) -> float:
        """Mean negative log likelihood, natural logarithm, of probabilities kept in [eps, 1 - eps] of float64, as
        scikit-learn's, whose import would take over 100 MB."""
        of_label = np.where(self.labels == 1, self.probabilities, 1 - self.probabilities)
        eps = np.finfo(np.float64).eps
        return float(np.average(-np.log(np.clip(of_label, eps, 1 - eps)), weights=self.weights))

    @cached_property
    def clicks(self) -> Any:
        """Sum of the weights of rows with label 1."""
        return self.positives if self.weights is None else (self.weights * self.labels).sum()

    @cached_property
    def gauc(self) -> tuple[float | None, float | None]:
        """See `group_auc`."""
        assert self.groups is not None
        return group_auc(self.labels, self.logits, self.groups, self.row_weights)

    def mean(self, values: Array) -> float:
        """The weighted mean of values [N]."""
        return float(values.mean() if self.weights is None else (self.weights * values).sum() / self.weights.sum())


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        compute: from scores to the figure; None where it is not defined.
        higher_is_better: None for a metric that no checkpoint can be selected by.
        needs_group: only computed of data with a group column.
        needs_both_labels: not defined where all labels are equal.
        logged: in the line that training prints for each evaluation.
        legend: a short explanation; shown below tables that contain it.
    """

    compute: Callable[[Scores], float | None]
    higher_is_better: bool | None
    needs_group: bool = False
    needs_both_labels: bool = False
    logged: bool = False
    legend: str = ""


def _sigmoid(logits: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-z) is then inf, and the result 0
        probabilities: Array = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return probabilities


def roc_auc(labels: Array, logits: Array, weights: Array | None = None) -> float:
    """The share of pairs of a row with label 1 and one with label 0 in which the first has the larger logit, equal ones
    counted half: the area under the ROC curve.

    Args:
        labels: 0 or 1, both, [N]. logits: float [N]. weights: above 0, float64 [N]; a pair weighs their product.

    Returns:
        NaN where a logit is.
    """
    order = np.argsort(logits)
    logits, clicked = logits[order], labels[order] == 1
    if np.isnan(logits[-1]):
        return math.nan
    each = np.ones(1) if weights is None else weights[order]
    runs = np.flatnonzero(np.r_[True, logits[1:] != logits[:-1]])
    ones, zeros = (np.add.reduceat(each * side, runs) for side in (clicked, ~clicked))
    if weights is not None:  # as fractions, or their products might be out of range; whole numbers are exact
        ones, zeros = ones / ones.sum(), zeros / zeros.sum()
    below = np.cumsum(zeros) - zeros
    return float((ones * (below + zeros / 2)).sum() / (ones.sum() * zeros.sum()))


def _auc(scores: Scores) -> float | None:
    return roc_auc(scores.labels, scores.logits, scores.row_weights) if scores.both_labels else None


def _ne(scores: Scores) -> float | None:
    weights, negatives = scores.weights, len(scores.labels) - scores.positives
    rows = len(scores.labels) if weights is None else weights.sum()
    # Not as 1 - rate, which rounds to 0 beside a click of an overwhelming weight.
    of_zeros = negatives if weights is None else (weights * (scores.labels == 0)).sum()
    shares = scores.clicks / rows, of_zeros / rows
    if not scores.both_labels or not all(shares):
        return None
    return float(scores.log_loss / -sum(share * math.log(share) for share in shares))


def _calibration(scores: Scores) -> float | None:
    predicted = scores.probabilities if scores.weights is None else scores.weights * scores.probabilities
    return float(predicted.sum() / scores.clicks) if scores.positives else None


METRICS: dict[str, Metric] = {
    "auc": Metric(_auc, True, needs_both_labels=True, logged=True),
    "log_loss": Metric(lambda scores: scores.log_loss, False, logged=True),
    "accuracy": Metric(lambda scores: scores.mean((scores.logits > 0) == (scores.labels == 1)), True),
    "ne": Metric(
        _ne,
        False,
        needs_both_labels=True,
        logged=True,
        legend="normalized entropy, log loss over that of always predicting the observed click rate (below 1: better)",
    ),
    "calibration": Metric(_calibration, None, legend="predicted over observed clicks (1: neither too many nor few)"),
    "gauc": Metric(
        lambda scores: scores.gauc[0],
        True,
        needs_group=True,
        needs_both_labels=True,
        logged=True,
        legend="AUC within each group, averaged over impressions",
    ),
    "gauc_coverage": Metric(
        lambda scores: scores.gauc[1], None, needs_group=True, legend="fraction of impressions that gauc covers"
    ),
}
"""Metrics by name, in the order in which they are shown."""


def legend(names: Iterable[str]) -> str:
    """The legends of metrics, in one line; empty if they have none."""
    return "; ".join(f"{name}: {METRICS[name].legend}" for name in names if name in METRICS and METRICS[name].legend)


def click_metrics(
    labels: Array,
    logits: Array,
    weights: Array | None = None,
    groups: Array | None = None,
    negative_weight: float = 1.0,
) -> dict[str, Any]:
    """The metrics of one evaluation.

    Args:
        labels: 0 or 1, [N].
        logits: float, [N].
        weights: of the rows, float [N], finite and >= 0; each figure is then that of the weighted rows.
        groups: integers [N], the group (as the user) of each row; negative: in none.
        negative_weight: how many negatives each row with label 0 represents, in all figures but `rows`, and `auc` and
            `gauc`, which are of the rows as they are.

    Returns:
        rows, and each of `METRICS`: auc (None where all labels are equal); log_loss (natural logarithm); accuracy (at
        probability 0.5); ne, normalized entropy: log loss over that of always predicting the observed click rate (He et
        al. 2014; None where all labels are equal); calibration: predicted over observed clicks (None without clicks).
        With groups also gauc and gauc_coverage, see `group_auc`. All but `rows` are None where there are no rows, or
        none with weight.
    """
    computed = {name: metric for name, metric in METRICS.items() if groups is not None or not metric.needs_group}
    rows = {"rows": len(labels)}
    if weights is not None and not (weights > 0).all():
        # Rows of weight 0 are left out: they must not decide whether both labels occur.
        some = weights > 0
        labels, logits, weights = labels[some], logits[some], weights[some]
        groups = None if groups is None else groups[some]
    if len(labels) == 0:
        return rows | dict.fromkeys(computed)
    labels = labels.astype(np.int8)
    row_weights = None if weights is None else weights.astype(np.float64)
    counted = row_weights
    if negative_weight != 1:
        counted = np.where(labels == 1, 1.0, negative_weight) * (1.0 if row_weights is None else row_weights)
    scores = Scores(labels, logits, _sigmoid(logits), row_weights, counted, groups)
    values = {name: metric.compute(scores) for name, metric in computed.items()}
    return rows | {
        name: value if value is not None and math.isfinite(value) else None for name, value in values.items()
    }


def calibration_curve(
    labels: Array, logits: Array, weights: Array | None = None, bins: int = 20
) -> dict[str, list[float]]:
    """A reliability curve: rows in bins of about as many rows each, from the lowest prediction to the highest.

    Equal predictions are in one bin, so that there may be fewer.

    Args:
        labels: 0 or 1, [N]. logits: finite floats [N]. weights: of the rows, >= 0, [N]; None: 1 each.

    Returns:
        Per bin: rows, their weight; predicted, the mean probability; clicked, the share of clicks. Empty lists without
        rows.
    """
    if not len(logits):
        return {"rows": [], "predicted": [], "clicked": []}
    at = np.unique(np.linspace(0, len(logits), bins, endpoint=False).astype(np.int64))
    edges = np.unique(np.partition(logits, at)[at])
    number = np.searchsorted(edges, logits, side="right") - 1
    rows, predicted, clicked = (
        np.bincount(number, weights=each if weights is None else each * weights, minlength=len(edges))
        for each in (np.ones(len(logits)), _sigmoid(logits), labels)
    )
    some = rows > 0
    values = {"rows": rows[some], "predicted": predicted[some] / rows[some], "clicked": clicked[some] / rows[some]}
    return {name: [float(f"{value:.6g}") for value in each] for name, each in values.items()}


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
        # Each side of a group as fractions of it: in one sum over all groups, large weights would swallow small ones.
        sizes = np.diff(np.r_[begins, len(order)])
        own = np.where(clicked, np.repeat(of_ones, sizes), np.repeat(of_zeros, sizes))
        each = each / own
        of_ones, of_zeros = np.ones_like(of_ones), np.ones_like(of_zeros)
    # Runs of equal logits within a group: a pair within a run is a tie.
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
    """The number of groups that have rows of both labels: those that `group_auc` covers."""
    clicked = labels == 1
    return len(np.intersect1d(groups[clicked & (groups >= 0)], groups[~clicked & (groups >= 0)]))
