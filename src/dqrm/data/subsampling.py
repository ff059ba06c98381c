"""Correction of the click rate for negatives that were dropped at random.

Dropping a fraction `share` keeps kept = 1 - share, which multiplies the odds of a click by 1 / kept. A model of the
remaining rows predicts p; on the log itself that is p / (p + (1 - p) / kept), exactly logit(p) + log(kept).
"""

import math


def logit_offset(share: float) -> float:
    """log(kept): what to add to a logit, so that it is on the click rate of the log."""
    return math.log1p(-share)


def negative_weight(share: float) -> float:
    """1 / kept: how many negatives of the log each one stands for that is left."""
    return 1 / (1 - share)
