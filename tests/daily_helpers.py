"""Small logs of several days, whose ids come and go."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dqrm import Callback, Dataset, PrepareConfig, prepare, train
from dqrm.daily import pipeline
from dqrm.daily.config import DailyConfig, Recipe

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


def extended(logs: list[Path], folder: Path) -> list[Dataset]:
    """A dataset of each day, which extends the one before; rows of ids that are not seen for a day are given to
    others."""
    datasets: list[Dataset] = []
    for number, log in enumerate(logs):
        more = {"extend": str(datasets[-1].path), "evict_after": 1} if datasets else {}
        datasets.append(prepare([log], folder / str(number), replace(COLUMNS, **more)))
    return datasets


class First(Callback):
    """Weights, scales and optimizer state before the first step."""

    def on_epoch_start(self, trainer: Any) -> None:
        if not trainer.state.step:
            self.weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
            self.state = [
                [
                    {name: value.clone() for name, value in optimizer.state[parameter].items()}
                    for parameter in group["params"]
                ]
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            ]


def started(data: Dataset, folder: Path, config: Any, **more: Any) -> First:
    """Train; what the run began with."""
    first = First()
    train(data, folder, config, callbacks=[first], **more)
    return first


def run_days(recipe: Path, logs: str, folder: Path) -> list[dict[str, Any]]:
    """All days, all kept: what a process can be started with."""
    return pipeline.run_daily(Recipe.read(recipe), [logs], folder, DailyConfig(keep=10, gate_margin=None))
