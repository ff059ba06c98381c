"""The click rate that a file's probabilities are on: the log's, or that of the rows left by `subsample_negatives`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dqrm.data.subsampling import logit_offset


@dataclass(frozen=True)
class BaseRate:
    """Whether and how an exported file corrects for subsampled negatives.

    Attributes:
        subsample_negatives: fraction of the negatives that was dropped before training; None: unknown.
        corrected: whether the file's probabilities are on the log's own click rate nevertheless.
    """

    subsample_negatives: float | None
    corrected: bool = False

    @classmethod
    def chosen(cls, subsample_negatives: float | None, correct: bool) -> "BaseRate":
        """For a file that is to be written."""
        return cls(subsample_negatives, correct and bool(subsample_negatives))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "BaseRate":
        """As recorded in a header. Older files do not record it: their probabilities are not corrected.

        Raises:
            ValueError, TypeError or KeyError: the header holds something else.
        """
        described = content.get("subsampling")
        if described is None:
            share = (content.get("options") or {}).get("subsample_negatives")
            corrected = False
        else:
            share, corrected = described["subsample_negatives"], described["corrected"]
        if share is not None and (isinstance(share, bool) or not 0 <= share < 1):
            raise ValueError(f"subsample_negatives {str(share)[:40]}")
        if type(corrected) is not bool or (corrected and not share):
            raise ValueError("a correction of subsample_negatives without one")
        return cls(share, corrected)

    @property
    def offset(self) -> float:
        """What is added to the trained model's logits."""
        return logit_offset(self.subsample_negatives) if self.corrected and self.subsample_negatives else 0.0

    def header(self) -> dict[str, Any]:
        """What `of` reads, ready for JSON."""
        return asdict(self)

    def tell(self) -> str | None:
        """One sentence about it; None where no negatives were dropped."""
        share = self.subsample_negatives
        if share is None:
            return (
                "Whether negatives were subsampled is not known, since the dataset was gone at export: probabilities "
                "are on the click rate of the rows that were trained on"
            )
        if not share:
            return None
        kept = f"{1 - share:.6g}"
        if self.corrected:
            return (
                f"Probabilities are on the true base rate: corrected for subsample_negatives {share:g} by "
                f"p / (p + (1 - p) / {kept}), {math.log1p(-share):.6g} on the logit"
            )
        return (
            f"Probabilities are NOT on the true base rate: negatives were subsampled (subsample_negatives {share:g}), "
            f"and odds are {1 / (1 - share):.6g} times the true ones; export with --correct-subsampling corrects them"
        )
