"""Source files and streams: their bytes, decompressed and hashed on the way, and whether they stayed the same."""

import hashlib
import itertools
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any

import zstandard

from dqrm.errors import UserError
from dqrm.identity import FileIdentity

_GZIP, _ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_OTHERS = {
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\x06\0\0sNaPpY": "Snappy",
    b"Obj\x01": "Avro",
    b"ARROW1\0\0": "Arrow IPC",
    b"SEQ\x06": "a Hadoop sequence file",
    b"PARE": "encrypted Parquet",
}
# Bytes read from the file at a time; small, since a compressed block may become a thousand times larger.
_READ = 1 << 18


Pieces = Iterator[bytes]


class Stream:
    """A pipe or socket: it gives its bytes once."""

    def __init__(self, path: Path, descriptor: int | None, where: str) -> None:
        self._path, self._descriptor, self._where, self._taken = path, descriptor, where, False

    def open(self) -> IO[bytes]:
        """The stream; not before it is needed, since whoever writes several may write one after the other."""
        if self._taken:
            raise UserError(f"{self._where} is a pipe and was read already; save it as a file to read it again")
        self._taken = True
        return self._path.open("rb") if self._descriptor is None else os.fdopen(os.dup(self._descriptor), "rb")


@dataclass
class Source:
    """One file of the log and what was found in it.

    path: of the file. where: its name in messages. name: what distinguishes it from the others, without folders of this
    machine. partitions: columns in its path. rows, skipped, dropped: good lines that are kept, malformed ones, and good
    ones that subsampling left out. state: what it was when it was found. stream: what is read instead of a
    file. used: the columns of the path that the dataset depends on. rest: what has not been read yet. format: what
    reads it, if neither text nor Parquet (`dqrm.data.formats`). parts: the files that it consists of, if several.
    """

    path: Path
    parquet: bool
    where: str = ""
    name: str = ""
    partitions: dict[str, str | None] = field(default_factory=dict)
    state: FileIdentity | None = None
    stream: Stream | None = None
    used: tuple[str, ...] = ()
    rest: Iterator[bytes] | None = field(default=None, repr=False)
    format: Any = None
    parts: tuple["Source", ...] = ()
    bytes: int = 0
    sha256: str = ""
    rows: int = 0
    skipped: int = 0
    dropped: int = 0
    damaged: str | None = None
    digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def __post_init__(self) -> None:
        self.where, self.name = self.where or str(self.path), self.name or self.path.name

    @property
    def size(self) -> int | None:
        """Bytes of its files; None of a stream, and of a table in memory."""
        if self.parts:
            return sum(part.size or 0 for part in self.parts)
        return self.state.size if self.state else None

    def again(self) -> "Source":
        """The same source with nothing read of it yet."""
        return replace(
            self, bytes=0, sha256="", rows=0, skipped=0, dropped=0, damaged=None, digest=hashlib.sha256(), rest=None
        )

    def record(self) -> dict[str, Any]:
        """What was found in it, for `restore`."""
        return {name: getattr(self, name) for name in _FOUND}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was found in it before."""
        for name in _FOUND:
            setattr(self, name, record[name])

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means this file: its path below the folder or glob, a folder on it, its name, or its path
        as it was given."""
        names = (self.name, self.where, self.path.name, *map(str, PurePosixPath(self.name).parents))
        wanted = pattern.rstrip("/") or pattern
        # A name may hold what a pattern gives another meaning: part[1].csv.
        return any(name == wanted or fnmatchcase(name, wanted) for name in names if name != ".")

    def describe(self) -> dict[str, Any]:
        """For dataset.json; no folder of this machine in it."""
        described = {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "rows": self.rows,
            "skipped": self.skipped,
            "damaged": self.damaged,
        }
        return (
            {**described, "partitions": {name: self.partitions[name] for name in self.used}} if self.used else described
        )

    def identity(self) -> FileIdentity:
        """What the file is now.

        Raises:
            OSError: it is gone.
        """
        return FileIdentity.of(self.path.stat())

    def pieces(self) -> Pieces:
        """The bytes of the file itself, in order.

        Raises:
            UserError: it cannot be read, or changed meanwhile.
        """
        try:
            with self.stream.open() if self.stream else self.path.open("rb") as file:
                opened = os.fstat(file.fileno())
                while block := file.read(_READ):
                    yield block
                # Standard input may be a file without a name.
                if stat.S_ISREG(opened.st_mode):
                    replace(self, state=FileIdentity.of(opened)).require_unchanged(os.fstat(file.fileno()))
        except OSError as error:
            raise UserError(f"cannot read {self.where}: {error.strerror}") from None

    def scannable(self, rows: bool) -> Any:
        """What polars is to scan, of a Parquet file: its path, or an open file. rows: whether rows are to be read, or
        only what the file says of them."""
        return self.path

    def release(self) -> None:
        """Free what `scannable` needed; the rows are read."""

    def require_unchanged(self, now: os.stat_result | None = None) -> None:
        """Whether the file is still the one that was found. now: what is known of it; none: it is looked at.

        Raises:
            UserError: it has grown, shrunk, been written to or replaced, or is gone.
        """
        for part in self.parts:
            part.require_unchanged()
        if self.state is None:
            return
        try:
            identity = FileIdentity.of(now) if now else self.identity()
        except OSError as error:
            raise UserError(f"{self.where} changed while it was read: {error.strerror}; {_STILL}") from None
        if self.state.unchanged(identity):
            return
        if identity.size != self.state.size:
            what = f"it had {self.state.size} bytes and has {identity.size}"
        else:
            what = "another file took its place" if identity.file != self.state.file else "it was written to"
        raise UserError(f"{self.where} changed while it was read: {what}; {_STILL}")


# Of a source, by reading it.
_FOUND = ("bytes", "sha256", "rows", "skipped", "dropped", "damaged")
_STILL = "start again when nothing writes to it any more"


class Damaged(Exception):
    """A compressed file that ends too early or does not decompress; what came before is good."""


def total_size(sources: list[Source]) -> int | None:
    """Bytes of all files together; None where a stream is among them, whose end nobody knows."""
    sizes = [source.size for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def is_parquet(path: Path) -> bool:
    """Whether a file begins like Parquet.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(4) == PARQUET
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed content in pieces; `source` gets size and hash of the file itself when all is read.

    Raises:
        UserError: it cannot be read, changed meanwhile, or is of a kind that is not read.
        Damaged: after the last good piece.
    """
    raw = source.rest = _raw(source)
    head = next(raw, b"")
    if head.startswith(PARQUET) and source.stream:
        raise UserError(f"{source.where} is Parquet in a pipe, which can only be read from a file; save it as one")
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            raise UserError(f"{source.where} is {kind}, expected text (also gzip or zstd) or Parquet")
    whole = itertools.chain([head] if head else [], raw)
    if head.startswith(_GZIP):
        return _inflate(whole, lambda: zlib.decompressobj(wbits=31), "gzip")
    if head.startswith(_ZSTD):
        return _inflate(whole, lambda: zstandard.ZstdDecompressor().decompressobj(), "zstd")
    return whole


def hash_file(source: Source) -> None:
    """Size and hash of a file that is read by other means; of several, the hash of their hashes."""
    if not source.parts:
        source.rest = _raw(source)
        finish(source)
        return
    for part in (part.again() for part in source.parts):
        hash_file(part)
        source.bytes += part.bytes
        source.digest.update(bytes.fromhex(part.sha256))
    source.sha256 = source.digest.hexdigest()


def finish(source: Source) -> None:
    """Read the rest of what `read_bytes` began, for size and hash of the whole."""
    for _ in source.rest or ():
        pass


def _raw(source: Source) -> Iterator[bytes]:
    for block in source.pieces():
        source.digest.update(block)
        source.bytes += len(block)
        if source.state is not None and source.bytes > source.state.size:
            source.require_unchanged()  # at once: what grows might never end
        yield block
    source.require_unchanged()
    source.sha256 = source.digest.hexdigest()


def _inflate(raw: Iterator[bytes], make: Callable[[], Any], kind: str) -> Iterator[bytes]:
    damage, inflate, begun = None, make(), False
    for block in raw:
        rest = block
        while rest and damage is None:
            # Files may be several compressed ones in a row, and padded with zeros.
            if not begun and not (rest := rest.lstrip(b"\0")):
                break
            begun = True
            try:
                data = inflate.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                damage = f"its {kind} data is damaged ({error})"
                break
            rest = b""
            if inflate.eof:
                rest, inflate, begun = inflate.unused_data, make(), False
            if data:
                yield data
        if damage:
            break
    if damage or begun:
        raise Damaged(damage or f"its {kind} data is truncated")
