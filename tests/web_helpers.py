"""Logs with every kind of column, trained on for a moment, and the folder that is exported of them."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import dqrm
from conftest import tiny
from dqrm.export.formats import web_runtime

NODE = shutil.which("node")
COLUMNS = {
    "label": "clicked", "categorical": ("user", "ad", "site", "tags"), "multi": ("tags",), "dense": ("price", "age"),
    "cross": ("user*ad", "ad*site*hour"), "null_values": ("NULL", "-1.0"),
}  # fmt: skip


def write_log(path: Path, rows: int = 1500, seed: int = 0) -> None:
    """Users are whole numbers, ads text beyond ASCII, sites fractions, tags several of a kind, ages may be missing."""
    random = np.random.default_rng(seed)
    pl.DataFrame(
        {
            "clicked": (random.random(rows) < 0.3).astype(int),
            "user": random.integers(0, 200, rows),
            "ad": [f"ad {number} \u00e9\u4e2d\U0001f600"[: 4 + number % 9] for number in random.integers(0, 50, rows)],
            "site": random.integers(0, 9, rows) / 8e5,
            "hour": random.integers(0, 24, rows),
            "tags": ["|".join(f"t{tag}" for tag in random.integers(0, 9, n)) for n in random.integers(0, 4, rows)],
            "price": random.exponential(20, rows),
            "age": [None if age < 10 else age for age in random.integers(0, 90, rows).tolist()],
        }
    ).write_csv(path)


def prepared(folder: Path, **options: Any) -> dqrm.Dataset:
    """A dataset of such a log. options: of PrepareConfig, over COLUMNS."""
    folder.mkdir(exist_ok=True)
    write_log(folder / "log.csv")
    return dqrm.prepare([folder / "log.csv"], folder / "data", dqrm.PrepareConfig(**{**COLUMNS, **options}))


def trained(folder: Path, **options: Any) -> Path:
    """A run on it."""
    data = prepared(folder, **options)
    dqrm.train(data, folder / "run", tiny(max_steps=20))
    return folder / "run"


def fake_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose files have other content, which is accepted: for tests that open no browser."""
    (folder / "dist").mkdir(parents=True)
    digests = {}
    for name in web_runtime.FILES:
        (folder / "dist" / name).write_bytes(name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(web_runtime, "FILES", digests)
    return folder
