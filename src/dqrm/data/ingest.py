"""Reads source files into typed rows, and those into staged chunks: text by blocks of lines, Parquet by rows."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import polars as pl

from dqrm.data.columns import CRITEO_COLUMNS, Plan, check_types
from dqrm.data.config import PrepareConfig
from dqrm.data.lines import Block, TextReader
from dqrm.data.sources import Damaged, Source, hash_file, read_bytes
from dqrm.data.staging import Chunker, Staging
from dqrm.errors import UserError

# What polars raises on a file that is not the Parquet file it seems to be. A panic is no Exception of Python's.
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
# A first line that is longer is no line of Criteo's.
_FIRST_LINE = 1 << 24
# Bytes at the beginning of a file among which a sound line is looked for, where malformed ones are skipped.
_SKIPPED = 1 << 20
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
            schema = parquet_schema(source)
            plan.check(list(schema), where)
            check_types(plan, schema, where)
        elif not plan.criteo:
            try:
                plan.check(_reader(Source(source.path, False), plan).names, where)
            except Damaged as damage:
                raise UserError(f"{where}: {damage}") from None
        else:
            if plan.label is not None:
                plan.check(CRITEO_COLUMNS, f"layout {plan.config.layout}")
            if source.parquet:
                raise UserError(f"{where} is a Parquet file, but layout {plan.config.layout} is text; use layout table")
            if plan.label is None:
                names = _criteo_columns(source, plan.config.on_error == "skip")
                plan.check(names, f"{where}, which has {len(names)} columns")


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
        if source.parquet:
            hash_file(source)
        told = 0
        for typed in typed_blocks(source, plan):
            frame = keep(typed)
            source.rows += frame.height
            if frame.height:
                chunker.add(frame)
            advance(source.bytes - told)
            told = source.bytes
        advance(source.bytes - told)
    chunker.finish()
    return keep.dropped


def typed_blocks(source: Source, plan: Plan) -> Iterator[pl.DataFrame]:
    """The good rows of one file in order, a frame of `Plan.typed` per block; counts the others in `source.skipped`.

    Raises:
        UserError: the first malformed line, with file and number, unless they are skipped.
    """
    unit = "row" if source.parquet else "line"
    for block in _parquet_blocks(source, plan) if source.parquet else _text_blocks(source, plan):
        frame = plan.typed(block)
        if block.bad and plan.config.on_error == "stop":
            line, reason = min(block.bad)
            raise UserError(f"{source.path}, {unit} {line}: {reason}")
        source.skipped += len(block.bad)
        yield frame


def parquet_schema(source: Source) -> pl.Schema:
    """The columns of a Parquet file and their types.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return pl.scan_parquet(source.path, glob=False).collect_schema()
    except _UNREADABLE as error:
        raise UserError(f"{source.path} cannot be read as Parquet ({error})") from None


def parquet_rows(source: Source) -> int:
    """How many rows a Parquet file says that it has.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return int(pl.scan_parquet(source.path, glob=False).select(pl.len()).collect().item())
    except _UNREADABLE as error:
        raise UserError(f"{source.path} cannot be read as Parquet ({error})") from None


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
        names = CRITEO_COLUMNS if plan.label is not None else _criteo_columns(source, plan.config.on_error == "skip")
        return TextReader(pieces, str(source.path), "\t", False, names)
    separator = plan.config.delimiter or _separator(source)
    return TextReader(pieces, str(source.path), separator, plan.config.quoting, None)


def _criteo_columns(source: Source, skip: bool) -> tuple[str, ...]:
    """Criteo's columns, without the label where the first line has none, as in Kaggle's test.txt.

    Args:
        skip: malformed lines are skipped, so the first line that is one or the other decides.

    Raises:
        UserError: the first line is neither.
    """
    widths = (len(CRITEO_COLUMNS), len(CRITEO_COLUMNS) - 1)
    head, enough = b"", _SKIPPED if skip else 0
    with suppress(Damaged):  # reading the file will tell
        for piece in read_bytes(Source(source.path, False)):
            head += piece
            if (b"\n" in piece and len(head) > enough) or len(head) > _FIRST_LINE:
                break
    counts = [line.count(b"\t") + 1 for line in head.splitlines()] if head.strip(b"\r\n") else []
    known = [count for count in counts if count in widths]
    if counts and counts[0] not in widths and not (skip and known):
        raise UserError(
            f"{source.path}, line 1: {counts[0]} columns, expected {widths[0]}, or {widths[1]} without the label"
        )
    return CRITEO_COLUMNS[-known[0] :] if known else CRITEO_COLUMNS


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
        for frame in scan.collect_batches(chunk_size=min(plan.config.chunk_rows, 1 << 17), maintain_order=True):
            yield Block(frame, np.arange(row, row + frame.height))
            row += frame.height
    except _UNREADABLE as error:
        raise UserError(f"{source.path}, after row {row - 1}: cannot be read as Parquet ({error})") from None
