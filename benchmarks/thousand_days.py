"""Rows of a table after many days of ids that come and go, with eviction and without: counts only, no model.

    python benchmarks/thousand_days.py

Each day 4,000 ids are drawn, the popular ones more often, of 10,000 active ones, a hundredth of which is replaced by
new ids every day. Prints JSON: rows of the table and size of its vocabulary file after 10, 100 and all days.
"""

import argparse
import json
from typing import Any

import numpy as np
import polars as pl

from dqrm.data import growth
from dqrm.data.growth import Policy

ACTIVE, REPLACED, DRAWN = 10_000, 100, 4_000


def counted(keys: np.ndarray) -> pl.DataFrame:
    """A day's counts, as `dqrm prepare` makes them."""
    frame = pl.DataFrame({"key": pl.Series(keys, dtype=pl.UInt32), "first": np.arange(len(keys))})
    return frame.group_by("key").agg(pl.len().alias("count"), pl.col("first").min()).sort("key")


def simulate(days: int, evict_after: int | None) -> list[dict[str, Any]]:
    """Table and file after 10, 100 and all days."""
    draw, active = np.random.default_rng(1), np.arange(ACTIVE)
    policy, found, known = Policy(evict_after=evict_after), [], None
    for day in range(days):
        if day:
            active[draw.integers(0, ACTIVE, REPLACED)] = ACTIVE + day * REPLACED + np.arange(REPLACED)
        run = counted(active[(ACTIVE * draw.random(DRAWN) ** 3).astype(int)])
        grown = growth.next_day(*known, run, day, policy) if known else growth.first_day(run, 1)
        known = grown.vocabulary, grown.rare
        if day + 1 in (10, 100, days):
            size = len(grown.vocabulary.to_bytes())
            found.append({"days": day + 1, "rows": grown.vocabulary.rows, "vocabulary_bytes": size})
    return found


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=1000, help="Days.")
    parser.add_argument("--evict-after", type=int, default=30, help="As of dqrm prepare.")
    options = parser.parse_args()
    result = {f"evict_after {after}": simulate(options.days, after) for after in (options.evict_after, None)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
