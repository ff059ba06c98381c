"""The log during preparation: chunks on disk, each column as the chunk's distinct keys and codes into them; where ids
are hashed, as table rows.

Later passes process distinct keys only, which are far fewer than rows, and read one column at a time.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.columns import KeyColumn, Plan
from dqrm.data.journal import Journal
from dqrm.files import flush

Array = NDArray[Any]


class Staging:
    """Chunks of typed rows in a folder: those of the log, or of one of its parts.

    Attributes:
        rows: rows per chunk. entries: per column, entries per chunk (rows; ids, for a multi-valued column).
        distinct: per column, distinct keys per chunk; 0 where ids are hashed: its codes are table rows.
        notes: what `add` was told with each group of chunks.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan = folder, plan
        self.columns: tuple[KeyColumn, ...] = (*plan.keys, *plan.unmodelled)
        self.rows: list[int] = []
        self.entries: list[list[int]] = [[] for _ in self.columns]
        self.distinct: list[list[int]] = [[] for _ in self.columns]
        self.notes: list[Any] = []
        self._journal = Journal(folder / "staged.jsonl")
        for line in self._journal.lines:
            self._count(line)

    def add(self, frames: Sequence[pl.DataFrame], note: Any) -> None:
        """Write the next chunks, frames of `Plan.typed`. After a kill all of them are there, with the note, or none."""
        chunks = [self._write(len(self.rows) + n, frame) for n, frame in enumerate(frames)]
        line = {"chunks": chunks, "note": note}
        self._journal.add(line)
        self._count(line)

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
        return self.folder / f"{chunk:06d}.arrow"

    def _count(self, line: dict[str, Any]) -> None:
        for rows, entries, distinct in line["chunks"]:
            self.rows.append(rows)
            for n in range(len(self.columns)):
                self.entries[n].append(entries[n])
                self.distinct[n].append(distinct[n])
        self.notes.append(line["note"])

    def _write(self, chunk: int, frame: pl.DataFrame) -> tuple[int, list[int], list[int]]:
        names = [f"k{n}" for n in range(len(self.plan.keys))]
        names += ["g"] * (self.plan.group is not None) + ["s"] * (self.plan.split is not None)
        stored = {"label": frame["label"].implode()}
        if self.plan.weight is not None:
            stored["weight"] = frame["w"].implode()
        if self.plan.dense:
            dense = frame.select(f"d{n}" for n in range(len(self.plan.dense))).to_numpy()
            stored["dense"] = pl.Series("dense", np.ascontiguousarray(dense).reshape(-1)).implode()
        entries, distinct = [], []
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            coded = threads.map(self._code, self.columns, (frame[name] for name in names))
            for n, (keys, codes, lengths) in enumerate(coded):
                if keys is not None:
                    stored[f"keys{n}"] = keys.implode()
                stored[f"codes{n}"] = pl.Series(codes).implode()
                if lengths is not None:
                    stored[f"lengths{n}"] = lengths.implode()
                entries.append(len(codes))
                distinct.append(0 if keys is None else len(keys))
        # Not compressed: packing and unpacking would take longer than writing and reading what it saves, a quarter.
        pl.DataFrame([series.alias(name) for name, series in stored.items()]).write_ipc(self._path(chunk))
        flush(self._path(chunk))
        return frame.height, entries, distinct

    def _code(self, column: KeyColumn, cells: pl.Series) -> tuple[pl.Series | None, Array, pl.Series | None]:
        # By identity: a group column may be one of the model's, too.
        modelled = not any(column is other for other in self.plan.unmodelled)
        if modelled and self.plan.hashing is not None:
            return None, *self.plan.hashing[self.plan.keys.index(column)].encode(*column.entries(cells))
        return column.code(cells, self.plan.config.max_rows_per_table if modelled else None)


class Chunker:
    """Regroup frames into chunks of `rows` rows or more, but less than twice as many; or fewer, where they have `size`
    bytes already.

    Chunks end where a frame ends, so that what was read and what was staged can be told in one place.
    """

    def __init__(self, rows: int, size: int | None = None) -> None:
        self._rows, self._size = rows, size
        self._held: list[pl.DataFrame] = []
        self._count = 0
        self._bytes = 0.0

    def add(self, frame: pl.DataFrame) -> list[pl.DataFrame]:
        """The chunks that are full with these rows; none, while there are too few."""
        if frame.height:
            self._held.append(frame)
            self._count += frame.height
            self._bytes += frame.estimated_size() if self._size is not None else 0
        full = self._count >= self._rows or (self._size is not None and self._bytes >= self._size)
        return self.rest() if full else []

    def rest(self) -> list[pl.DataFrame]:
        """The chunks of all rows that are left."""
        if not self._count:
            return []
        joined, pieces = pl.concat(self._held), max(1, self._count // self._rows)
        if self._size is not None:
            pieces = min(self._count, max(pieces, int(self._bytes // self._size)))
        ends = [self._count * n // pieces for n in range(pieces + 1)]
        self._held, self._count, self._bytes = [], 0, 0.0
        return [joined[begin:end] for begin, end in itertools.pairwise(ends)]
