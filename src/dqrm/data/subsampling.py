"""What dropping negatives at random does to the click rate, and how it is undone.

Of `share` dropped, kept = 1 - share are left, which multiplies the odds of a click by 1 / kept. A model of the rows
that are left predicts p; on the log itself that is p / (p + (1 - p) / kept), exactly logit(p) + log(kept).
"""

import math


def logit_offset(share: float) -> float:
    """log(kept): what to add to a logit, so that it is on the click rate of the log."""
    return math.log1p(-share)


def negative_weight(share: float) -> float:
    """1 / kept: how many negatives of the log each one stands for that is left."""
    return 1 / (1 - share)
