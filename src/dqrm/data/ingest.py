"""Reads source files into staged chunks: text by blocks of lines, Parquet by rows."""

from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from dqrm.data.columns import CRITEO_COLUMNS, Plan, check_types
from dqrm.data.config import PrepareConfig
from dqrm.data.lines import Block, TextReader
from dqrm.data.sources import Damaged, Source, hash_file, read_bytes
from dqrm.data.staging import Chunker, Staging
from dqrm.errors import UserError

_COMPRESSED = (".gz", ".zst", ".zstd", ".gzip")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


def check(sources: list[Source], plan: Plan) -> None:
    """Whether every file has the columns, before any work.

    Raises:
        UserError: one has not, or its kind cannot be told.
    """
    for source in sources:
        where = str(source.path)
        if not plan.criteo and source.parquet:
            schema = _parquet_schema(source)
            plan.check(list(schema), where)
            check_types(plan, schema, where)
        elif not plan.criteo:
            try:
                plan.check(_reader(Source(source.path, False), plan).names, where)
            except Damaged as damage:
                raise UserError(f"{where}: {damage}") from None
        else:
            plan.check(CRITEO_COLUMNS, f"layout {plan.config.layout}")
        if plan.criteo and source.parquet:
            raise UserError(f"{where} is a Parquet file, but layout {plan.config.layout} is text; use layout table")


def ingest(sources: list[Source], plan: Plan, staged: Staging, advance: Callable[[int], None]) -> int:
    """Stages all rows and completes each source's counts and hash.

    `advance` is told bytes of the files as they are read. Returns how many negatives were dropped at random.

    Raises:
        UserError: the first malformed line, with file and number, unless they are skipped.
    """
    config = plan.config
    chunker = Chunker(config.chunk_rows, staged.add)
    keep = _Subsample(config)
    for source in sources:
        unit = "row" if source.parquet else "line"
        blocks = _parquet_blocks(source, plan) if source.parquet else _text_blocks(source, plan)
        told = 0
        for block in blocks:
            frame = plan.typed(block)
            if block.bad and config.on_error == "stop":
                line, reason = min(block.bad)
                raise UserError(f"{source.path}, {unit} {line}: {reason}")
            source.skipped += len(block.bad)
            frame = keep(frame)
            source.rows += frame.height
            if frame.height:
                chunker.add(frame)
            advance(source.bytes - told)
            told = source.bytes
        advance(source.bytes - told)
    chunker.finish()
    return keep.dropped


class _Subsample:
    """Drops a share of the rows with label 0; the draws depend on the seed and the order of rows only."""

    def __init__(self, config: PrepareConfig) -> None:
        self._share, self.dropped = config.subsample_negatives, 0
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, 2])))

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        if not self._share:
            return frame
        kept = (frame["label"].to_numpy() == 1) | (self._random.random(frame.height) >= self._share)
        self.dropped += int(len(kept) - kept.sum())
        return frame.filter(pl.Series(kept))


def _reader(source: Source, plan: Plan) -> TextReader:
    pieces = read_bytes(source)
    if plan.criteo:
        return TextReader(pieces, str(source.path), "\t", False, CRITEO_COLUMNS)
    separator = plan.config.delimiter or _separator(source)
    return TextReader(pieces, str(source.path), separator, plan.config.quoting, None)


def _separator(source: Source) -> str:
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    if suffixes and suffixes[-1] in _SEPARATORS:
        return _SEPARATORS[suffixes[-1]]
    raise UserError(
        f"{source.path}: the name does not tell what parts its fields, expected .csv, .tsv or .txt "
        "(also .gz or .zst), a Parquet file, or a delimiter"
    )


def _text_blocks(source: Source, plan: Plan) -> Iterator[Block]:
    last = 0
    try:
        reader = _reader(source, plan)
        for block in reader.blocks(plan.needed):
            last = max([last, *block.lines[-1:], *(line for line, _ in block.bad[-1:])])
            yield block
    except Damaged as damage:
        source.damaged = f"{damage}, after line {last}"
        if plan.config.on_error == "stop":
            raise UserError(f"{source.path}, after line {last}: {damage}") from None
        _hash_again(source)


def _hash_again(source: Source) -> None:
    """A damaged file may not have been read to its end."""
    fresh = Source(source.path, source.parquet)
    hash_file(fresh)
    source.bytes, source.sha256 = fresh.bytes, fresh.sha256


def _parquet_blocks(source: Source, plan: Plan) -> Iterator[Block]:
    row = 1
    try:
        # The name is a file's, whatever brackets are in it.
        scan = pl.scan_parquet(source.path, glob=False).select(plan.needed)
        hash_file(source)
        for frame in scan.collect_batches(chunk_size=min(plan.config.chunk_rows, 1 << 17), maintain_order=True):
            yield Block(frame, np.arange(row, row + frame.height))
            row += frame.height
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{source.path}, after row {row - 1}: cannot be read as Parquet ({error})") from None


def _parquet_schema(source: Source) -> pl.Schema:
    try:
        return pl.scan_parquet(source.path, glob=False).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{source.path} cannot be read as Parquet ({error})") from None
