"""Source files: which ones are meant, what kind they are, and their bytes, decompressed and hashed on the way."""

import glob
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from dqrm.errors import UserError

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
# Bytes read from the file at a time; small, since a compressed block may become a thousand times larger.
_READ = 1 << 18


@dataclass
class Source:
    """One file of the log and what was found in it."""

    path: Path
    parquet: bool
    bytes: int = 0
    sha256: str = ""
    rows: int = 0
    skipped: int = 0
    damaged: str | None = None
    digest: Any = field(default_factory=hashlib.sha256, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    def describe(self) -> dict[str, Any]:
        """For dataset.json; no folder of this machine in it."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "rows": self.rows,
            "skipped": self.skipped,
            "damaged": self.damaged,
        }


class Damaged(Exception):
    """A compressed file that ends too early or does not decompress; what came before is good."""


def resolve(given: Sequence[str | Path]) -> list[Source]:
    """The files meant by paths and globs: in the order given, those of one glob in natural order (day_2 before day_10).

    Raises:
        UserError: no file given, none of that name, a folder, a file that cannot be opened, or a file meant twice.
    """
    paths: list[Path] = []
    for item in given:
        text = str(item)
        if Path(text).exists() or not glob.has_magic(text):
            paths.append(Path(text))
            continue
        found = sorted((path for path in glob.glob(text, recursive=True) if Path(path).is_file()), key=_natural)
        if not found:
            raise UserError(f"no file matches '{text}'")
        paths += map(Path, found)
    if not paths:
        raise UserError("no source file was given, expected at least one")
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected files (such as '{path}/*')")
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice, and its rows would count twice")
        seen.add(path.resolve())
    return [Source(path, _head(path, 4) == _PARQUET) for path in paths]


def read_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed content in pieces; `source` gets size and hash of the file itself when all is read.

    Raises:
        Damaged: after the last good piece.
    """
    head = _head(source.path, 4)
    raw = _raw(source)
    if head.startswith(_GZIP):
        return _inflate(raw, lambda: zlib.decompressobj(wbits=31), "gzip")
    if head.startswith(_ZSTD):
        return _inflate(raw, lambda: zstandard.ZstdDecompressor().decompressobj(), "zstd")
    return raw


def hash_file(source: Source) -> None:
    """Size and hash of a file that is read by other means."""
    for _ in _raw(source):
        pass


def _raw(source: Source) -> Iterator[bytes]:
    try:
        with source.path.open("rb") as file:
            while block := file.read(_READ):
                source.digest.update(block)
                source.bytes += len(block)
                yield block
    except OSError as error:
        raise UserError(f"cannot read {source.path}: {error.strerror}") from None
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
    if damage or begun:
        raise Damaged(damage or f"its {kind} data ends too early")


def _head(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
