"""The configuration of the generated click log; cheap to import."""

import math
from dataclasses import dataclass
from typing import Literal

from dqrm.options import check_fields

# Days of the logs that `like` imitates.
DAYS_OF = {"criteo-kaggle": 7, "criteo-terabyte": 24}
DRIFT = 0.1


@dataclass(frozen=True)
class GenerateConfig:
    """What `dqrm.data.synthetic.generate` draws. The same configuration gives the same bytes."""

    rows: int = 400_000
    """Lines to generate, over all days; the high-cardinality columns grow with them."""
    seed: int = 1
    """Seed of the known model and of everything drawn from it."""
    click_rate: float = 0.25
    """Fraction of lines that are clicks, between 0.01 and 0.99."""
    missing: float = 1.0
    """Factor on each column's fraction of missing fields, from 0 (none) to 1 (as in Criteo's log)."""
    like: Literal["criteo-kaggle", "criteo-terabyte"] | None = None
    """Table sizes of this log, independent columns, popularity that drifts by day; none: a log of crosses."""
    days: int | None = None
    """Days, with --like: a file for each, day_0, day_1, ... in the folder OUTPUT; none: one file of 7 or 24 days."""
    drift: float | None = None
    """Fraction of places in a table's popularity that other ids take each day, 0 to 1; none: 0.1 with --like."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if not 0.01 <= self.click_rate <= 0.99:
            raise ValueError(f"click_rate: got {self.click_rate}, expected a fraction between 0.01 and 0.99")
        if not 0 <= self.missing <= 1:
            raise ValueError(f"missing: got {self.missing}, expected a factor between 0 and 1")
        if self.like is None:
            for field in ("days", "drift"):
                if (value := getattr(self, field)) is not None:
                    raise ValueError(f"{field}: got {value}, expected none without like; name a log, as criteo-kaggle")
        if self.days is not None and not 1 <= self.days <= min(self.rows, 10_000):
            raise ValueError(f"days: got {self.days}, expected 1 to {min(self.rows, 10_000)} (a row each at least)")
        if self.drift is not None and not (math.isfinite(self.drift) and 0 <= self.drift <= 1):
            raise ValueError(f"drift: got {self.drift}, expected a fraction between 0 and 1")

    @property
    def day_count(self) -> int:
        """Days of a log with `like`: those given, or its own."""
        return self.days or DAYS_OF.get(self.like or "", 1)

    def day_rows(self, day: int) -> int:
        """Lines of a day: as equal as can be, earlier days longer."""
        share, longer = divmod(self.rows, self.day_count)
        return share + (day < longer)
