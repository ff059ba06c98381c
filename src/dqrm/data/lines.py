"""Text files as blocks of fields, each row with its line number. The usual block costs no Python per line: only a block
of the wrong shape is parsed line by line, to report which line and why.
"""

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.ahead import ahead
from dqrm.data.sources import Damaged
from dqrm.errors import UserError

_NEWLINE, _QUOTE = 10, 34
# Text parsed at a time.
_BLOCK = 1 << 24
# A quoted field may span this many lines; what goes on longer is taken for a quote that is never closed.
_MAX_LINES = 100
_MAX_LINE = 1 << 26


@dataclass
class Block:
    """Rows of String columns, the line that each one begins on (int64), and the malformed lines among them.

    end: the line after them, from which `TextReader.blocks` goes on. typed: what the fields mean, where the reader's
    `decode` knew it; there are no fields then.
    """

    fields: pl.DataFrame
    lines: NDArray[np.int64]
    bad: list[tuple[int, str]] = field(default_factory=list)
    end: int = 0
    typed: pl.DataFrame | None = None


class TextReader:
    """Reader of delimited text.

    pieces: the bytes. separator: one byte. names: the columns of every line, or none where the first line names them.

    Attributes:
        decode: what makes typed rows of whole lines, or returns None where it cannot; None: fields are always text.
    """

    def __init__(
        self, pieces: Iterator[bytes], where: str, separator: str, quoting: bool, names: Sequence[str] | None
    ) -> None:
        self.where, self.separator, self.quoting = where, separator.encode(), quoting
        self._pieces = _coalesce(pieces)
        self._rest = b""
        self._line = 1
        self.decode: Callable[[bytes], pl.DataFrame | None] | None = None
        escaped = re.escape(self.separator)
        plain = rb'(?:"(?:[^"]++|"")*+"|[^"\n' + escaped + rb"]*+)"
        self._record = re.compile(plain + rb"(?:" + escaped + plain + rb")*+\Z")
        self.names = list(names) if names is not None else self._read_header()

    def blocks(self, wanted: Sequence[str], start: int = 0) -> Iterator[Block]:
        """The `wanted` columns of all rows from line `start` on, in order. Whatever the pieces raise at their end is
        raised at the end."""
        positions = [self.names.index(name) for name in wanted]
        for piece, last in ahead(self._pieces):
            data = self._after(piece, start) if self._line < start else piece
            joined = self._rest + data if self._rest else data
            cut = len(joined) if last else joined.rfind(b"\n") + 1
            block, self._rest = joined[:cut], joined[cut:]
            if len(self._rest) > _MAX_LINE:
                raise UserError(f"{self.where}, line {self._line}: longer than {_MAX_LINE >> 20} MiB, is it text?")
            if b"\r" in block:
                block = block.replace(b"\r\n", b"\n")
            if last:
                block = block.rstrip(b"\r\n") + b"\n" if block.strip(b"\r\n") else b""
            if block:
                yield self._parse(block, positions, wanted, last)

    def _after(self, data: bytes, start: int) -> bytes:
        """What follows the lines before `start`."""
        newlines = data.count(b"\n")
        if self._line + newlines < start:
            self._line += newlines
            return b""
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE)
        cut = int(ends[start - self._line - 1]) + 1
        self._line = start
        return data[cut:]

    def _parse(self, block: bytes, positions: list[int], wanted: Sequence[str], last: bool) -> Block:
        if self.decode is not None and (typed := self.decode(block)) is not None:
            lines = np.arange(self._line, self._line + typed.height)
            self._line += typed.height
            return Block(pl.DataFrame(), lines, [], self._line, typed)
        quotes = self.quoting and b'"' in block
        shape = self._shape(block, quotes, last)
        bad: list[tuple[int, str]] = []
        if shape is not None and _is_text(block):
            cut, starts = shape
            block, self._rest = block[:cut], block[cut:] + self._rest
            lines = self._line + starts
            used = block.count(b"\n")
        else:
            block, lines, bad, used = self._sift(block, quotes, last)
        self._line += used
        if not len(lines):
            return Block(pl.DataFrame(schema=dict.fromkeys(wanted, pl.String)), lines, bad, self._line)
        try:
            frame = pl.read_csv(
                block,
                has_header=False,
                separator=self.separator.decode(),
                quote_char='"' if quotes else None,
                infer_schema=False,
                columns=sorted(set(positions)),
            )
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{self.where}, from line {lines[0]}: cannot be parsed ({error})") from None
        if frame.height != len(lines):
            raise UserError(f"{self.where}, from line {lines[0]}: {frame.height} rows in {len(lines)} lines")
        fields = frame.select(pl.col(f"column_{at}").alias(name) for at, name in zip(positions, wanted))
        return Block(fields, lines, bad, self._line)

    def _shape(self, block: bytes, quotes: bool, last: bool) -> tuple[int, NDArray[np.int64]] | None:
        """Where the last whole record ends, and on which line of the block each begins; None if anything is wrong."""
        data = np.frombuffer(block, np.uint8)
        newlines = data == _NEWLINE
        separators = (data == self.separator[0]) | newlines
        marks = np.flatnonzero(separators)
        if not quotes:
            ends = self._ends(data, marks, int(np.count_nonzero(newlines)))
            return None if ends is None else (len(block), np.arange(len(ends)))
        inside = np.flatnonzero(data == _QUOTE)
        beside = separators | (data == _QUOTE)
        opening, closing = inside[0::2], inside[1::2]
        # A quote may stand only at a field's edge or beside another one; the block ends with a newline.
        if not (beside[opening[opening > 0] - 1].all() and beside[closing + 1].all()):
            return None
        marks = marks[np.searchsorted(inside, marks) % 2 == 0]
        if len(inside) % 2:
            outside = marks[newlines[marks]]
            if last or not len(outside):
                return None
            marks = marks[marks <= outside[-1]]
        ends = self._ends(data, marks, int(np.count_nonzero(newlines[marks])))
        if ends is None:
            return None
        cut = int(ends[-1]) + 1
        return cut, np.concatenate([[0], np.searchsorted(np.flatnonzero(newlines[:cut]), ends[:-1]) + 1])

    def _ends(self, data: NDArray[np.uint8], marks: NDArray[np.int64], newlines: int) -> NDArray[np.int64] | None:
        """The newlines among the marks, of which there are so many, if every record has as many fields as there are
        columns."""
        width = len(self.names)
        ends = marks[width - 1 :: width]
        if len(marks) % width or not (data[ends] == _NEWLINE).all():
            return None
        if width > 1 and newlines != len(ends):
            return None
        return ends

    def _sift(
        self, block: bytes, quotes: bool, last: bool
    ) -> tuple[bytes, NDArray[np.int64], list[tuple[int, str]], int]:
        """The good records of a block, their lines, the malformed lines with the reason, and how many were used."""
        texts = block.split(b"\n")[:-1]
        good: list[bytes] = []
        lines: list[int] = []
        bad: list[tuple[int, str]] = []
        at = 0
        while at < len(texts):
            text, span = texts[at], 1
            if quotes:
                while text.count(b'"') % 2 and span < _MAX_LINES and at + span < len(texts):
                    text += b"\n" + texts[at + span]
                    span += 1
                if text.count(b'"') % 2:
                    if span < _MAX_LINES and not last:
                        break  # the record may go on in the next block
                    text, span = texts[at], 1
                elif span > 1 and not self._record.match(text):
                    text, span = texts[at], 1
            reason = self._problem(text, quotes)
            if reason is None:
                good.append(text)
                lines.append(self._line + at)
            else:
                bad.append((self._line + at, reason))
            at += span
        self._rest = b"".join(text + b"\n" for text in texts[at:]) + self._rest
        return b"".join(text + b"\n" for text in good), np.array(lines, np.int64), bad, at

    def _problem(self, text: bytes, quotes: bool) -> str | None:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            return f"byte 0x{text[error.start]:02x} at position {error.start + 1} is not UTF-8 text"
        if not text:
            return f"an empty line, expected {len(self.names)} columns"
        if quotes and b'"' in text:
            if not self._record.match(text):
                closed = "a quote inside a field" if text.count(b'"') % 2 == 0 else "an unterminated quote"
                return f'{closed}, expected fields quoted as "a ""b"" c" (or quoting false, where quotes mean nothing)'
            text = re.sub(rb'"[^"]*"', b"", text)
        columns = text.count(self.separator) + 1
        return None if columns == len(self.names) else f"{columns} columns, expected {len(self.names)}"

    def _read_header(self) -> list[str]:
        data, last = next(self._pieces, (b"", True))
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{self.where} is UTF-16 text by its byte order mark, expected UTF-8")
        line, newline, rest = data.partition(b"\n")
        while self.quoting and line.count(b'"') % 2 and newline and line.count(b"\n") < _MAX_LINES:
            more, newline, rest = rest.partition(b"\n")  # a name may hold a line break
            line += b"\n" + more
        if self.quoting and line.count(b'"') % 2:
            line, newline, rest = data.partition(b"\n")
        # What follows the header is a block like any other.
        self._pieces = _chain(rest, last, self._pieces)
        self._line = 2 + line.count(b"\n")
        if not line.strip():
            for _ in self._pieces:  # damaged, rather than empty?
                pass
            which = ", line 1," if rest.strip() else ""
            raise UserError(f"{self.where}{which} is empty, expected a line with the names of the columns")
        if not newline and not last:
            raise UserError(f"{self.where}, line 1: longer than {_BLOCK >> 20} MiB, is it text?")
        reason = None
        try:
            text = line.rstrip(b"\r").replace(b"\r\n", b"\n").decode()
        except UnicodeDecodeError as error:
            reason = f"byte 0x{line[error.start]:02x} is not UTF-8 text"
        if reason is None and self.quoting and '"' in text and not self._record.match(text.encode()):
            reason = "an unterminated quote, or one inside a name"
        if reason:
            raise UserError(f"{self.where}, line 1: {reason}")
        reader = csv.reader(
            [part + "\n" for part in text.split("\n")],
            delimiter=self.separator.decode(),
            quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
        )
        try:
            return next(reader)
        except csv.Error as error:
            reason = f"the column names cannot be parsed ({error})"
            if "\r" in text:
                reason = "a carriage return inside the line, expected lines that end in LF or CR LF"
            raise UserError(f"{self.where}, line 1: {reason}") from None


def _is_text(block: bytes) -> bool:
    if block.isascii():
        return True
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def _coalesce(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Pieces of about _BLOCK bytes without a byte order mark, each with whether it is the last."""
    held: list[bytes] = []
    size, first = 0, True
    ready: bytes | None = None
    try:
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= _BLOCK:
                if ready is not None:
                    yield ready, False
                ready, first = _without_mark(b"".join(held), first), False
                held, size = [], 0
    except Damaged:  # the whole lines before still count, then the caller hears of it
        end = b"".join([ready or b"", *held])
        yield _without_mark(end[: end.rfind(b"\n") + 1], first), True
        raise
    end = b"".join(held)
    if ready is not None and end:
        yield ready, False
    elif ready is not None:
        end = ready
    yield _without_mark(end, first), True


def _without_mark(piece: bytes, first: bool) -> bytes:
    """A byte order mark at the start of a file is no part of its first column."""
    return piece.removeprefix(b"\xef\xbb\xbf") if first else piece


def _chain(rest: bytes, last: bool, pieces: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    yield rest, last
    yield from pieces
