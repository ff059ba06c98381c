"""Source files -> typed rows -> staged chunks: text by blocks of lines, Parquet by rows."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from dqrm.data import parquet_files, sparse_text
from dqrm.data.ahead import ahead
from dqrm.data.budget import Budget
from dqrm.data.columns import CRITEO_COLUMNS, Plan, check_types
from dqrm.data.config import PrepareConfig
from dqrm.data.criteo_lines import decoder
from dqrm.data.formats import format_of
from dqrm.data.formats.base import BLOCK_ROWS
from dqrm.data.lines import Block, TextReader
from dqrm.data.partitions import complete, in_file, offered
from dqrm.data.sources import Damaged, Source, finish, hash_file, read_bytes
from dqrm.data.sparse_text import SparseReader
from dqrm.data.staging import Chunker, Staging
from dqrm.data.tables import TableSource
from dqrm.errors import UserError

# A first line that is longer is no line of Criteo's.
_FIRST_LINE = 1 << 24
# Bytes at the beginning of a file among which a sound line is looked for, where malformed ones are skipped.
_SKIPPED = 1 << 20
_COMPRESSED = (".gz", ".zst", ".zstd", ".gzip")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}


def check(sources: list[Source], plan: Plan) -> None:
    """Whether every file has the columns, before any work. Of a stream nothing is read: its turn comes later.

    Raises:
        UserError: one has not, or its kind cannot be told.
    """
    for source in sources:
        source.used = tuple(name for name in plan.used if name in source.partitions)
        if isinstance(source, TableSource):
            source.check(plan)
            continue
        if source.format:
            kinds = source.format.check(source, plan.config)
            plan.check(offered(list(kinds), source.partitions), source.where)
            check_types(plan, pl.Schema({**dict.fromkeys(source.partitions, pl.String()), **kinds}), source.where)
            continue
        if source.parquet and (plan.criteo or plan.sparse):
            raise UserError(
                f"{source.where} is a Parquet file, but layout {plan.config.layout} is text; use layout table"
            )
        if source.parquet:
            _check_parquet(source, plan)
        elif source.stream:
            _ = plan.criteo or plan.sparse or plan.config.delimiter or _separator(source)
        else:
            try:
                _reader(source.again(), plan)
            except Damaged as damage:
                raise UserError(f"{source.where}: {damage}") from None


def _check_parquet(source: Source, plan: Plan) -> None:
    schema = parquet_files.schema(source)
    plan.check(offered(list(schema), source.partitions), source.where)
    # What is in the file counts, where both have a column.
    check_types(plan, pl.Schema({**dict.fromkeys(source.partitions, pl.String()), **schema}), source.where)


def ingest(
    sources: list[Source], plan: Plan, staged: Staging, advance: Callable[[int], None], share: range | None = None
) -> None:
    """Stage all rows, of the sources in `share` if it is given, and complete each source's counts and hash.

    It resumes behind what is staged. Of the source that was being read then the bytes are read once more, for its hash,
    but not parsed. `advance` is told bytes of the files as they are read.

    Raises:
        UserError: the first malformed line, with file and number, unless they are skipped.
    """
    chunker, told = Chunker(plan.config.chunk_rows, Budget(plan.config.memory).chunk_bytes), 0
    share = range(len(sources)) if share is None else share
    done, start = _resume(sources, staged)
    finished: list[Any] = []
    for number in share:
        source, before = sources[number], told
        if number not in done:
            if _read_apart(source):
                hash_file(source)
            keep = _Subsample(plan.config, sources, number)
            with closing(ahead(_typed(source, plan, start))) as blocks:
                for block in blocks:
                    frame = keep(block.frame)
                    source.rows += frame.height
                    source.dropped += block.frame.height - frame.height
                    source.skipped += block.bad
                    if chunks := chunker.add(frame):
                        staged.add(chunks, {"sources": finished, "in": [number, source.record()], "next": block.end})
                        finished = []
                    advance(before + source.bytes - told)
                    told = before + source.bytes
            finished.append([number, source.record()])
            start = 0
        advance(before + source.bytes - told)
        told = before + source.bytes
    if finished:
        staged.add(chunker.rest(), {"sources": finished})


def _resume(sources: list[Source], staged: Staging) -> tuple[set[int], int]:
    """The sources that are staged, which get their counts and hashes, and the line or row at which to resume."""
    done = set()
    for note in staged.notes:
        for number, record in note["sources"]:
            sources[number].restore(record)
            done.add(number)
    last = staged.notes[-1] if staged.notes else {}
    if "in" not in last:
        return done, 0
    number, record = last["in"]
    sources[number].restore({**record, "bytes": 0})
    return done, last["next"]


def _read_apart(source: Source) -> bool:
    """Whether the bytes are read for the rows by others, so that they have to be read once more for their hash."""
    if source.format:
        return not source.format.streamed
    return source.parquet and not isinstance(source, TableSource)


@dataclass(frozen=True)
class _Typed:
    """Good rows, how many malformed ones were among them, and the line or row that follows."""

    frame: pl.DataFrame
    bad: int
    end: int


def typed_blocks(source: Source, plan: Plan) -> Iterator[pl.DataFrame]:
    """The good rows of one file in order, a frame of `Plan.typed` per block; counts the others in `source.skipped`.

    Raises:
        UserError: the first malformed line, with file and number, unless they are skipped.
    """
    for block in _typed(source, plan, 0):
        source.skipped += block.bad
        yield block.frame


def _typed(source: Source, plan: Plan, start: int) -> Iterator[_Typed]:
    unit = "row" if source.parquet or source.format else "line"
    for block in _blocks(source, plan, start):
        try:
            frame = plan.typed(block) if block.typed is None else block.typed
        except pl.exceptions.PanicException as error:
            raise UserError(f"{source.where}: a column has values that cannot be converted ({error})") from None
        if block.bad and plan.config.on_error == "stop":
            line, reason = min(block.bad)
            raise UserError(f"{source.where}, {unit} {line}: {reason}")
        yield _Typed(frame, len(block.bad), block.end)


def _blocks(source: Source, plan: Plan, start: int) -> Iterator[Block]:
    """The rows from line or row `start` on; 0: all."""
    if isinstance(source, TableSource):
        return _table_blocks(source, plan)
    if source.format:
        return _format_blocks(source, plan, start)
    return _parquet_blocks(source, plan, start) if source.parquet else _text_blocks(source, plan, start)


def _table_blocks(source: TableSource, plan: Plan) -> Iterator[Block]:
    row = 1
    try:
        for frame in source.blocks(plan, min(plan.config.chunk_rows, BLOCK_ROWS)):
            yield Block(frame, np.arange(row, row + frame.height), end=row + frame.height)
            row += frame.height
    except parquet_files.UNREADABLE as error:
        raise UserError(f"{source.where}, after row {row - 1}: cannot be read ({error})") from None


def schema(source: Source) -> pl.Schema | None:
    """The columns of a source, those of its path included, and their types; None where all are text.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(source, TableSource):
        return source.schema
    if not (source.parquet or source.format):
        return None
    kinds = source.format.schema(source) if source.format else parquet_files.schema(source)
    return pl.Schema({**dict.fromkeys(source.partitions, pl.String()), **kinds})


class _Subsample:
    """Drop a fraction of the rows with label 0; the draws depend on the seed and the order of rows only.

    Each file has a stream of its own, that of the first as if there were no others: which process reads the files
    before it does not matter. With sources that are read only once, which cannot be in parts, all have one.
    """

    def __init__(self, config: PrepareConfig, sources: Sequence[Source], number: int) -> None:
        self._share = config.subsample_negatives
        once = any(source.stream or isinstance(source, TableSource) for source in sources)
        drawn = sources if once else sources[number : number + 1]
        bits = np.random.PCG64(np.random.SeedSequence([config.seed, 2])).jumped(0 if once else number)
        bits.advance(sum(source.rows + source.dropped for source in drawn))
        self._random = np.random.Generator(bits)

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        if not self._share:
            return frame
        kept = (frame["label"].to_numpy() == 1) | (self._random.random(frame.height) >= self._share)
        return frame.filter(pl.Series(kept))


def with_fields(sources: list[Source], config: PrepareConfig) -> PrepareConfig:
    """The configuration with what the files say in it: libffm's fields, by reading them once where it names none.

    Raises:
        UserError: there is no field, or a stream, which can be read only once.
    """
    if (known := format_of(config)) is not None and sources[0].format:
        return known.complete(sources, config)
    if config.layout != "libffm" or config.categorical:
        return config
    for source in sources:
        if source.stream or isinstance(source, TableSource):
            raise UserError(
                f"{source.where} can be read only once; name the fields of its features, as in --categorical 0,1,2"
            )
    fields = sparse_text.fields(
        [(source.where, partial(read_bytes, source.again())) for source in sources if not source.parquet]
    )
    if not fields:
        raise UserError(f"no feature in {sources[0].where}, expected lines such as '1 0:3:1 1:17:1' (layout libffm)")
    return replace(config, categorical=fields)


def _reader(source: Source, plan: Plan) -> TextReader | SparseReader:
    """A reader of a text source from its first byte, usable once.

    Raises:
        UserError: it is empty, lacks a column, or its delimiter cannot be told.
    """
    if plan.sparse:
        config = plan.config
        features = SparseReader(_nonempty(read_bytes(source)), source.where, config.layout, config.categorical)
        plan.check(offered(features.names, source.partitions), source.where)
        return features
    names: tuple[str, ...] | None = None
    if plan.criteo:
        pieces, separator, quoting = _nonempty(read_bytes(source)), "\t", False
        names = CRITEO_COLUMNS
        if plan.label is None:
            names, pieces = _criteo_columns(pieces, source.where, plan.config.on_error == "skip")
    else:
        separator, quoting = plan.config.delimiter or _separator(source), plan.config.quoting
        pieces = read_bytes(source)
    reader = TextReader(pieces, source.where, separator, quoting, names)
    where = source.where
    if plan.criteo:
        labelled = f"layout {plan.config.layout}"
        where = labelled if plan.label is not None else f"{where}, which has {len(reader.names)} columns"
    plan.check(offered(reader.names, source.partitions), where, text=not plan.criteo)
    if not set(plan.needed) & set(source.partitions):
        reader.decode = decoder(plan, reader.names)
    return reader


def _nonempty(pieces: Iterator[bytes]) -> Iterator[bytes]:
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise Damaged("it is empty, expected rows")


def _criteo_columns(pieces: Iterator[bytes], where: str, skip: bool) -> tuple[tuple[str, ...], Iterator[bytes]]:
    """Criteo's columns, without the label where the first line has none, as in Kaggle's test.txt, and all the pieces.

    Args:
        skip: malformed lines are skipped, so the first line that is one or the other decides.

    Raises:
        UserError: the first line is neither.
    """
    widths = (len(CRITEO_COLUMNS), len(CRITEO_COLUMNS) - 1)
    head, enough = b"", _SKIPPED if skip else 0
    held: list[bytes] = []
    rest = pieces
    try:
        for piece in pieces:
            held.append(piece)
            head += piece
            if (b"\n" in piece and len(head) > enough) or len(head) > _FIRST_LINE:
                break
    except Damaged as damage:  # told where the good lines end
        rest = _raising(damage)
    counts = [line.count(b"\t") + 1 for line in head.splitlines()] if head.strip(b"\r\n") else []
    known = [count for count in counts if count in widths]
    if counts and counts[0] not in widths and not (skip and known):
        raise UserError(f"{where}, line 1: {counts[0]} columns, expected {widths[0]}, or {widths[1]} without the label")
    return CRITEO_COLUMNS[-known[0] :] if known else CRITEO_COLUMNS, itertools.chain(held, rest)


def _raising(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""


def _separator(source: Source) -> str:
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    if suffixes and suffixes[-1] in _SEPARATORS:
        return _SEPARATORS[suffixes[-1]]
    if ".parquet" in suffixes:
        raise UserError(
            f"{source.where} is a pipe, expected a file: Parquet cannot be read from one"
            if source.stream
            else f"{source.where} does not begin as Parquet does, expected Parquet, or for text another name (.csv)"
        )
    if source.stream:
        raise UserError(f"{source.where} has no name to infer a delimiter from; give it, as in --delimiter ','")
    raise UserError(
        f"{source.where}: cannot infer the delimiter from the name, expected .csv, .tsv or .txt "
        "(also .gz or .zst), a Parquet file, or a delimiter, as in --delimiter ','"
    )


def _text_blocks(source: Source, plan: Plan, start: int) -> Iterator[Block]:
    last = max(0, start - 1)
    try:
        reader = _reader(source, plan)
        for block in _with_partitions(lambda wanted: reader.blocks(wanted, start), reader.names, source, plan):
            last = max([last, *block.lines[-1:], *(line for line, _ in block.bad[-1:])])
            yield block
    except Damaged as damage:
        _damaged(source, plan, f"{damage}, after line {last}")


def _damaged(source: Source, plan: Plan, what: str) -> None:
    source.damaged = what
    if plan.config.on_error == "stop":
        reason, _, last = what.rpartition(", ")
        raise UserError(f"{source.where}, {last}: {reason}") from None
    finish(source)


def _parquet_blocks(source: Source, plan: Plan, start: int) -> Iterator[Block]:
    names, rows = list(parquet_files.schema(source)), min(plan.config.chunk_rows, BLOCK_ROWS)
    first = max(1, start)
    yield from _with_partitions(lambda wanted: parquet_files.blocks(source, wanted, rows, first), names, source, plan)
    source.require_unchanged()  # since it was found, and before it was hashed


def _format_blocks(source: Source, plan: Plan, start: int) -> Iterator[Block]:
    known, rows, last = source.format, min(plan.config.chunk_rows, BLOCK_ROWS), 0
    names = list(known.schema(source))
    try:
        for block in _with_partitions(lambda wanted: known.blocks(source, wanted, rows), names, source, plan):
            last = max([last, *block.lines[-1:]])
            if block.end > start:
                yield _after(block, start)
    except Damaged as damage:
        _damaged(source, plan, f"{damage}, after row {last}")
    source.require_unchanged()


def _after(block: Block, start: int) -> Block:
    """What is not before row `start` of a block."""
    keep = block.lines >= start
    if keep.all():
        return block
    bad = [(row, reason) for row, reason in block.bad if row >= start]
    return Block(block.fields.filter(pl.Series(keep)), block.lines[keep], bad, block.end)


def _with_partitions(
    read: Callable[[Sequence[str]], Iterator[Block]], names: Sequence[str], source: Source, plan: Plan
) -> Iterable[Block]:
    wanted = in_file(plan.needed, names, source.partitions)
    return complete(read(wanted), plan.needed, source.partitions, source.where)
