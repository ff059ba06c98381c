"""Generated data with the shape and skew of Criteo's, in the files of a dataset folder, read by the true reader."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm import checksums
from dqrm.data import folder
from dqrm.data.batches import Batch, Shuffle, Split
from dqrm.data.dataset import Dataset
from dqrm.files import write_json

# Rows drawn at a time.
_CHUNK = 65_536
# Criteo's larger tables are less skewed.
_LARGE_TABLE = 1_000_000
_NO_KEYS = "vocabulary/none.parquet"


def write_split(path: Path, rows: int, num_dense: int, table_rows: Sequence[int], seed: int) -> Split:
    """Draw `rows` samples into the files of a training split below `path` and open it.

    Dense columns are log(1 + x) of an exponential x with a fifth missing. Ids are as `draw_ids` gives them. Labels are
    coin flips with 25.6 % ones: nothing can be learned.
    """
    info = {"rows": {"train": rows}, "schema": _schema(num_dense, table_rows)}
    _draw(path, "train", info, table_rows, np.random.default_rng(seed))
    return Split(path, "train", info)


def write_dataset(path: Path, rows: Mapping[str, int], num_dense: int, table_rows: Sequence[int], seed: int) -> Dataset:
    """Draw splits of so many rows as `write_split` does into a new dataset folder, and open it.

    It has no keys: its vocabularies are one empty file, so models that are trained on it are exported without them.
    """
    (path / _NO_KEYS).parent.mkdir(parents=True)
    (path / _NO_KEYS).touch()
    schema = _schema(num_dense, table_rows)
    for column, size in zip(schema["columns"], table_rows):
        column |= {"rows": int(size), "vocabulary": _NO_KEYS}
    info: dict[str, Any] = {
        "format_version": folder.FORMAT_VERSION,
        "schema": schema,
        "split": {"generated": seed},
        "rows": {name: rows.get(name, 0) for name in folder.SPLITS},
        "options": None,
    }
    info["fingerprint"] = hashlib.sha256(json.dumps(info).encode()).hexdigest()
    info["clicks"] = {
        name: _draw(path, name, info, table_rows, np.random.default_rng([seed, number]))
        for number, name in enumerate(folder.SPLITS)
    }
    files = [f"{name}/{file}" for name in folder.SPLITS for file in folder.arrays(info, name)]
    info[checksums.FILES] = checksums.list_files(path, [*files, _NO_KEYS])
    write_json(path / folder.INFO, checksums.seal(info))
    return Dataset(path)


def _schema(num_dense: int, table_rows: Sequence[int]) -> dict[str, Any]:
    return {
        "dense": [f"I{number}" for number in range(1, num_dense + 1)],
        "columns": [{"name": f"C{number}", "multi": False} for number in range(1, len(table_rows) + 1)],
    }


def _draw(path: Path, split: str, info: dict[str, Any], table_rows: Sequence[int], random: np.random.Generator) -> int:
    """Write the files of a split; returns its number of clicks."""
    (path / split).mkdir(parents=True)
    rows, num_dense, clicks = info["rows"][split], len(info["schema"]["dense"]), 0
    with ExitStack() as opened:
        files = {name: opened.enter_context((path / split / name).open("wb")) for name in folder.arrays(info, split)}
        for start in range(0, rows, _CHUNK):
            size = min(_CHUNK, rows - start)
            dense = np.log1p(random.exponential(20, (size, num_dense)).astype(np.float32))
            dense *= random.random(dense.shape, np.float32) >= 0.2
            dense.astype("<f4").tofile(files[folder.DENSE])
            draw_ids(random, size, table_rows).tofile(files[folder.IDS])
            labels = (random.random(size) < 0.256).astype("u1")
            labels.tofile(files[folder.LABEL])
            clicks += int(labels.sum())
    return clicks


def draw_ids(random: np.random.Generator, count: int, table_rows: Sequence[int]) -> NDArray[np.int32]:
    """Skewed ids int32 [count, tables]: random**3 * rows, or random**1.6 * rows in tables above a million rows."""
    sizes = np.array(table_rows, np.float32)
    power = np.where(sizes > _LARGE_TABLE, 1.6, 3.0).astype(np.float32)
    ids = (random.random((count, len(table_rows)), np.float32) ** power * sizes).astype("<i4")
    # Rounding in float32 can reach the size itself.
    return np.minimum(ids, sizes.astype("<i4") - 1, out=ids)


def endless(split: Split, batch_size: int, shuffle: Shuffle, seed: int) -> Iterator[Batch]:
    """Full batches of `split`, epoch after epoch; another seed reads the same rows in another order."""
    for epoch in count():
        yield from split.batches(batch_size, shuffle=shuffle, seed=seed, epoch=epoch, drop_last=True)
