"""Generated data with the shape and skew of Criteo's, in the files of a dataset folder, read by the true reader."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.data import folder
from dqrm.data.batches import Batch, Shuffle, Split

# Rows drawn at a time.
_CHUNK = 65_536
# Criteo's larger tables are less skewed.
_LARGE_TABLE = 1_000_000


def write_split(path: Path, rows: int, num_dense: int, table_rows: Sequence[int], seed: int) -> Split:
    """Draw `rows` samples into the files of a training split below `path` and open it.

    Dense columns are log(1 + x) of an exponential x with a fifth missing. Ids are as `draw_ids` gives them. Labels are
    coin flips with 25.6 % ones: nothing can be learned.
    """
    info: dict[str, Any] = {
        "rows": {"train": rows},
        "schema": {
            "dense": [f"I{number}" for number in range(1, num_dense + 1)],
            "columns": [{"name": f"C{number}", "multi": False} for number in range(1, len(table_rows) + 1)],
        },
    }
    (path / "train").mkdir(parents=True)
    random = np.random.default_rng(seed)
    files = {name: (path / "train" / name).open("wb") for name in folder.arrays(info, "train")}
    try:
        for start in range(0, rows, _CHUNK):
            size = min(_CHUNK, rows - start)
            dense = np.log1p(random.exponential(20, (size, num_dense)).astype(np.float32))
            dense *= random.random(dense.shape, np.float32) >= 0.2
            dense.astype("<f4").tofile(files[folder.DENSE])
            draw_ids(random, size, table_rows).tofile(files[folder.IDS])
            (random.random(size) < 0.256).astype("u1").tofile(files[folder.LABEL])
    finally:
        for file in files.values():
            file.close()
    return Split(path, "train", info)


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
