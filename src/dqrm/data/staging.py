"""The log during preparation: chunks on disk, each column as the chunk's distinct keys and codes into them; where ids
are hashed, as table rows.

Later passes process distinct keys only, which are far fewer than rows, and read one column at a time.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.columns import KeyColumn, Plan

Array = NDArray[Any]


class Staging:
    """Chunks of typed rows in a folder.

    Attributes:
        rows: rows per chunk. entries: per column, entries per chunk (rows; ids, for a multi-valued column).
        distinct: per column, distinct keys per chunk; 0 where ids are hashed: its codes are table rows.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        folder.mkdir()
        self._folder, self.plan = folder, plan
        self.columns: tuple[KeyColumn, ...] = (*plan.keys, *plan.unmodelled)
        self.rows: list[int] = []
        self.entries: list[list[int]] = [[] for _ in self.columns]
        self.distinct: list[list[int]] = [[] for _ in self.columns]
        self._threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def close(self) -> None:
        self._threads.shutdown()

    def add(self, frame: pl.DataFrame) -> None:
        """Write the next chunk, a frame of `Plan.typed`."""
        names = [f"k{n}" for n in range(len(self.plan.keys))]
        names += ["g"] * (self.plan.group is not None) + ["s"] * (self.plan.split is not None)
        stored = {"label": frame["label"].implode()}
        if self.plan.weight is not None:
            stored["weight"] = frame["w"].implode()
        if self.plan.dense:
            dense = frame.select(f"d{n}" for n in range(len(self.plan.dense))).to_numpy()
            stored["dense"] = pl.Series("dense", np.ascontiguousarray(dense).reshape(-1)).implode()
        coded = self._threads.map(self._code, self.columns, (frame[name] for name in names))
        for n, (keys, codes, lengths) in enumerate(coded):
            if keys is not None:
                stored[f"keys{n}"] = keys.implode()
            stored[f"codes{n}"] = pl.Series(codes).implode()
            if lengths is not None:
                stored[f"lengths{n}"] = lengths.implode()
            self.entries[n].append(len(codes))
            self.distinct[n].append(0 if keys is None else len(keys))
        chunk = pl.DataFrame([series.alias(name) for name, series in stored.items()])
        chunk.write_ipc(self._path(len(self.rows)), compression="lz4")
        self.rows.append(frame.height)

    def read(self, chunk: int, *names: str) -> list[pl.Series]:
        """Arrays of one chunk by the name they are stored under: label, weight, dense, keys<n>, codes<n> or
        lengths<n>."""
        # Opened here: polars would take brackets in the name of a folder for a pattern.
        with self._path(chunk).open("rb") as file:
            frame = pl.read_ipc(file, columns=list(names))
        return [frame[name].explode(empty_as_null=False) for name in names]

    def codes(self, column: int) -> Iterator[tuple[pl.Series, Array, Array | None]]:
        """Per chunk: distinct keys, the code of each entry, and entries per row (None: one)."""
        for chunk in range(len(self.rows)):
            names = [f"keys{column}", f"codes{column}"]
            multi = self.columns[column].multi
            keys, codes, *lengths = self.read(chunk, *names, *([f"lengths{column}"] if multi else []))
            yield keys, codes.to_numpy(), lengths[0].to_numpy() if multi else None

    def _path(self, chunk: int) -> Path:
        return self._folder / f"{chunk:06d}.arrow"

    def _code(self, column: KeyColumn, cells: pl.Series) -> tuple[pl.Series | None, Array, pl.Series | None]:
        # By identity: a group column may be one of the model's, too.
        modelled = not any(column is other for other in self.plan.unmodelled)
        if modelled and self.plan.hashing is not None:
            return None, *self.plan.hashing[self.plan.keys.index(column)].encode(*column.entries(cells))
        return column.code(cells, self.plan.config.max_rows_per_table if modelled else None)


class Chunker:
    """Regroup frames into chunks of exactly `rows` rows."""

    def __init__(self, rows: int, sink: Callable[[pl.DataFrame], None]) -> None:
        self._rows, self._sink = rows, sink
        self._held: list[pl.DataFrame] = []
        self._count = 0

    def add(self, frame: pl.DataFrame) -> None:
        self._held.append(frame)
        self._count += frame.height
        if self._count >= self._rows:
            joined = pl.concat(self._held)
            full = self._count - self._count % self._rows
            for at in range(0, full, self._rows):
                self._sink(joined[at : at + self._rows])
            self._held, self._count = [joined[full:]], self._count - full

    def finish(self) -> None:
        if self._count:
            self._sink(pl.concat(self._held))
        self._held, self._count = [], 0
