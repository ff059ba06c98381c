"""Small logs of several days, whose ids come and go."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from dqrm import PrepareConfig

DATA: dict[str, Any] = {
    "categorical": ("user", "tags"), "multi": ("tags",), "dense": ("price",), "split": "random",
    "validation_fraction": 0.2, "test_fraction": 0.2,
}  # fmt: skip
COLUMNS = PrepareConfig(**DATA)


def write_day(path: Path, day: int, rows: int = 300, flip: bool = False) -> Path:
    """A log file of a day: a tenth of its users is new; users click by habit (`flip`: against it)."""
    draw = np.random.default_rng([7, day])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["label", "user", "tags", "price"])
        for _ in range(rows):
            user = int(draw.integers(4 * day, 4 * day + 40))
            tags = "|".join(f"t{tag}" for tag in draw.integers(day, day + 9, draw.integers(0, 3)))
            click = (draw.random() < (0.8 if user % 3 else 0.2)) != flip
            out.writerow([int(click), f"u{user}", tags, int(draw.integers(0, 90))])
    return path


def days(folder: Path, count: int, rows: int = 300) -> list[Path]:
    """Logs folder/dt=1/part.csv, folder/dt=2/part.csv, ..."""
    return [write_day(folder / f"dt={day}" / "part.csv", day, rows) for day in range(1, count + 1)]
