"""Raw logs -> batches, for a model whose vocabularies are known: what `prepare` would make of each row, in the order of
the log, with no more than a block in memory.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from dqrm.data import formats, ingest, parquet_files
from dqrm.data.batches import Batch
from dqrm.data.columns import KeyColumn, Plan, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.hashing import NAME as HASH
from dqrm.data.hashing import HashedRows
from dqrm.data.listing import reads, require_same_files, resolve
from dqrm.data.sources import Source, total_size
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError

# The name of the column that a prediction adds to the kept ones.
PROBABILITY = "probability"
# Rows of Parquet at a time; more are no quicker. Several blocks are in memory: read, encoded, scored.
_BLOCK_ROWS = 1 << 16
# As many are looked up one by one: whoever scores single rows waits for each call.
_FEW_ROWS = 16
_KEY_TYPES = {"hex": pl.UInt32, "hex*hex": pl.UInt64, "id": pl.UInt32, "text": pl.String}


class RawEncoder:
    """What `prepare` would make of a row, for a model whose vocabularies are known; safe to use from several threads.

    options: how the model's own log was read. columns: the schema's, and vocabularies: theirs, in the same order, or
    the hashes of their ids. keep: columns of the log that are handed on. on_error: whether a malformed line stops, or
    is skipped and counted.

    Raises:
        UserError: columns and vocabularies that do not go together, or kept columns that cannot be.
    """

    def __init__(
        self,
        options: PrepareConfig,
        columns: Sequence[Mapping[str, Any]],
        vocabularies: Sequence[Vocabulary] | Sequence[HashedRows],
        keep: Sequence[str] = (),
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        _check_keep(keep)
        config = dataclasses.replace(options, on_error=on_error, chunk_rows=min(options.chunk_rows, _BLOCK_ROWS))
        # What a model is trained and judged by, it does not score by.
        version = min((column.get("key_version", 1) for column in columns), default=1)
        self.plan = dataclasses.replace(
            make_plan(config), split=None, label=None, weight=None, group=None, copied=tuple(keep), key_version=version
        )
        for name in keep:
            if self.plan.sparse and name != config.label:
                raise UserError(f"keep names '{name}', but of layout {config.layout} only the label can be kept")
        self.vocabularies: list[Vocabulary | HashedRows] = list(vocabularies)
        _check_columns(self.plan, columns, self.vocabularies)

    def blocks(self, source: Source, threads: ThreadPoolExecutor | None = None) -> Iterator["RawBlock"]:
        """The good rows of a source, block by block: a file's, or a table's in memory.

        Raises:
            UserError: as `ingest.typed_blocks`.
        """
        for frame in ingest.typed_blocks(source, self.plan):
            source.rows += frame.height
            yield self._encode(frame, threads)

    def _encode(self, frame: pl.DataFrame, threads: ThreadPoolExecutor | None) -> "RawBlock":
        plan, rows = self.plan, frame.height
        dense = np.empty((rows, len(plan.dense)), np.float32)
        for n in range(len(plan.dense)):
            dense[:, n] = frame[f"d{n}"].to_numpy()
        ids = np.empty((rows, sum(not key.multi for key in plan.keys)), np.int32)
        bags, entries, unseen = [], [], []
        cells = (frame[f"k{n}"] for n in range(len(plan.keys)))
        run = threads.map if threads else map
        # Single-valued columns come first in every schema.
        for n, (values, lengths) in enumerate(run(self._look_up, plan.keys, self.vocabularies, cells)):
            entries.append(len(values))
            # Every id has a row where ids are hashed.
            unseen.append(0 if plan.hashing else len(values) - int(np.count_nonzero(values)))
            if lengths is None:
                ids[:, n] = values
            else:
                counts = lengths.to_numpy().astype(np.int64)
                bags.append((torch.from_numpy(values), torch.from_numpy(np.cumsum(counts) - counts)))
        batch = Batch(torch.from_numpy(dense), torch.from_numpy(ids), tuple(bags), torch.zeros(rows))
        return RawBlock(frame.select(pl.col("^c\\d+$")), batch, entries, unseen)

    def _look_up(
        self, column: KeyColumn, vocabulary: Vocabulary | HashedRows, cells: pl.Series
    ) -> tuple[NDArray[np.int32], pl.Series | None]:
        """The table rows, and of a multi-valued column how many each row of the log has."""
        if isinstance(vocabulary, HashedRows):
            return vocabulary.encode(*column.entries(cells))
        cap = self.plan.config.max_rows_per_table
        if len(cells) > _FEW_ROWS:
            keys, codes, lengths = column.code(cells, cap)
            return vocabulary.lookup(keys)[codes], lengths
        cells, lengths = column.entries(cells)
        return vocabulary.find(cells.to_list() if cap is None else column.modulo(cells, cap).tolist()), lengths


@dataclass(frozen=True)
class RawBlock:
    """Rows of a log: the copied columns c<n>, the batch with labels of zero; and for each categorical column, how many
    ids there are, and how many of them are in no row of the vocabulary."""

    copied: pl.DataFrame
    batch: Batch
    entries: Sequence[int]
    unseen: Sequence[int]


class RawLog:
    """Logs whose rows become batches; a label is not needed, nor is the column that decided the split.

    sources: files, folders, globs of them, or pipes (`-`: standard input), whose rows come once.
    encoder: what makes batches of them.

    Attributes:
        paths: the files. size: their bytes together, None where a pipe is among them.
        schema: the kept columns and their types.
        rows, skipped: rows handed out and malformed lines, so far. damaged: what ended early, in words.

    Raises:
        UserError: an invalid file or column.
    """

    def __init__(self, sources: str | Path | Sequence[str | Path], encoder: RawEncoder) -> None:
        self._encoder, self._plan = encoder, encoder.plan
        self._given = [sources] if isinstance(sources, (str, Path)) else list(sources)
        self._found = resolve(self._given)
        self._files = files = formats.arrange(self._found, self._plan.config)
        ingest.check(files, self._plan)
        self.paths = [file.path for file in self._found if not file.stream]
        self.size = total_size(files)
        self.schema = _common_schema(files, self._plan.copied)
        self._start()

    def _start(self) -> None:
        self.rows, self.skipped = 0, 0
        self.damaged: list[str] = []
        self._entries, self._unseen = ([0] * len(self._plan.keys) for _ in range(2))

    @property
    def unseen(self) -> dict[str, float]:
        """For each categorical column, the share of the ids read so far that are in no row of its vocabulary."""
        counts = zip(self._plan.keys, self._entries, self._unseen)
        return {key.name: unseen / entries if entries else 0.0 for key, entries, unseen in counts}

    def blocks(self, advance: Callable[[int], None] | None = None) -> Iterator[tuple[pl.DataFrame, Batch]]:
        """All rows in order, block by block: the kept columns, and the batch of the same rows with labels of zero.

        advance: told bytes of the files, once the rows in them have been used; `size` in all.

        Raises:
            UserError: the first malformed line, with file and number, unless they are skipped; a file that cannot be
                read or changed meanwhile, a pipe that was read before, or a kept cell that cannot be of the common
                type.
        """
        self._start()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            for source in (file.again() for file in self._files):
                size, told = source.size, 0
                rows = parquet_files.count(source) if source.parquet and source.state else 0
                for block in self._encoder.blocks(source, threads):
                    self._count(block)
                    if len(block.batch):
                        yield self._kept(block.copied, source), block.batch
                    done = size * source.rows // max(1, rows) if size and source.parquet else source.bytes
                    done = max(done, told) if size is None else min(max(done, told), size)
                    if advance:
                        advance(done - told)
                    told = done
                self.skipped += source.skipped
                if source.damaged:
                    self.damaged.append(f"{source.where}: {source.damaged}")
                if advance:
                    advance((source.bytes if size is None else size) - told)
        require_same_files(self._given, self._found)

    def means(self, path: Path) -> str | None:
        """The given folder or glob that means the file `path` (resolved), too; None: no source does."""
        return reads(self._given, path)

    def _count(self, block: RawBlock) -> None:
        self.rows += len(block.batch)
        for n, (entries, unseen) in enumerate(zip(block.entries, block.unseen)):
            self._entries[n] += entries
            self._unseen[n] += unseen

    def _kept(self, frame: pl.DataFrame, source: Source) -> pl.DataFrame:
        try:
            kept = pl.DataFrame([frame[f"c{n}"].cast(self.schema[name]) for n, name in enumerate(self._plan.copied)])
        except pl.exceptions.PolarsError as error:
            raise UserError(
                f"{source.where}: a kept column has a different type than in other files ({error})"
            ) from None
        kept.columns = list(self._plan.copied)  # a Series without a name would be given one
        return kept


def _check_keep(keep: Sequence[str]) -> None:
    for name in keep:
        if name == PROBABILITY:
            raise UserError(f"keep names '{name}', which is the name of the predictions; rename that column of the log")
        if list(keep).count(name) > 1:
            raise UserError(f"keep names '{name}' twice, expected each column once")


def _check_columns(
    plan: Plan, columns: Sequence[Mapping[str, Any]], vocabularies: Sequence[Vocabulary | HashedRows]
) -> None:
    names = [column["name"] for column in columns]
    if names != [key.name for key in plan.keys] or len(vocabularies) != len(names):
        raise UserError(
            f"the model has the columns {', '.join(names)} and {len(vocabularies)} vocabularies, "
            f"its options expect {', '.join(key.name for key in plan.keys)}"
        )
    capped = plan.config.max_rows_per_table is not None
    for number, (column, key, vocabulary) in enumerate(zip(columns, plan.keys, vocabularies)):
        got = (column["multi"], tuple(column["parts"]), column["key"], column["hash"])
        named = HASH if plan.hashing else key.hash_name() if capped else None
        wanted = (key.multi, key.parts, key.kind, named)
        if got != wanted:
            raise UserError(f"column {key.name} of the model is {got}, its options expect {wanted}")
        if plan.hashing or isinstance(vocabulary, HashedRows):
            if plan.hashing is None or vocabulary != plan.hashing[number]:
                raise UserError(f"column {key.name} of the model is hashed as {vocabulary}, its options expect another")
            continue
        kind = pl.UInt32 if capped else _KEY_TYPES[key.kind]
        if vocabulary.rows != column["rows"] or vocabulary.keys.dtype != kind:
            raise UserError(
                f"the vocabulary of column {key.name} has {vocabulary.rows} rows and keys of type "
                f"{vocabulary.keys.dtype}, expected {column['rows']} and {kind}"
            )


def _common_schema(files: Sequence[Source], names: Sequence[str]) -> pl.Schema:
    """Types that can hold the named columns of every file; text has text."""
    common: pl.DataFrame | None = None
    for file in files:
        columns = ingest.schema(file) or dict.fromkeys(names, pl.String())
        for name in names:
            here = pl.DataFrame(schema={name: columns[name]})
            if common is None or name not in common.columns:
                common = here if common is None else common.hstack(here)
                continue
            try:
                joined = pl.concat([common.get_column(name).to_frame(), here], how="vertical_relaxed")
            except pl.exceptions.PolarsError:
                raise UserError(
                    f"column {name} of {file.where} is of type {columns[name]}, in files before it of type "
                    f"{common.schema[name]}, expected compatible types"
                ) from None
            common = common.with_columns(joined.get_column(name))
    return common.schema if common is not None else pl.Schema()
