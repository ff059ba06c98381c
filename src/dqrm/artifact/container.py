"""The file format of an artifact: a safetensors file with checksums, written in a stream.

    8 bytes      length of the header, little-endian
    header       JSON, as safetensors defines it: each tensor's dtype, shape and place; `__metadata__` has
                   format          the kind of dqrm file
                   format_version  a number; a reader refuses unknown versions
                   content         JSON text: what the tensors are
                   checksums       JSON text: SHA-256 of each tensor's bytes
                   header_sha256   of length and header, with 64 zeros in its place
    tensors      raw little-endian bytes, from a multiple of 64 on

Any safetensors reader opens it. It is written here and not by the safetensors library, which needs all tensors in
memory at once.
"""

import ctypes
import hashlib
import json
import math
import mmap
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dqrm.artifact.watch import Watch
from dqrm.errors import UserError
from dqrm.identity import FileIdentity

FORMAT_VERSION = 1
"""What is written unless the content needs a newer reader, so that an older dqrm opens what it can."""
MIXED_BITS_VERSION = 2
"""Tables of several bit widths, which lie in a tensor for each width."""
GROUPS_VERSION = 3
"""Tables whose scales are of blocks of rows, or have zero points."""
GROWING_VERSION = 4
"""Ids that are hashed to rows, or vocabularies of several days, which may have vacant rows."""
CALIBRATED_VERSION = 5
"""Probabilities that are calibrated."""
_KNOWN = (FORMAT_VERSION, MIXED_BITS_VERSION, GROUPS_VERSION, GROWING_VERSION, CALIBRATED_VERSION)
_DTYPES = {
    torch.uint8: ("U8", 1), torch.int8: ("I8", 1), torch.int16: ("I16", 2), torch.int32: ("I32", 4),
    torch.int64: ("I64", 8), torch.float32: ("F32", 4),
}  # fmt: skip
_NAMES = {name: dtype for dtype, (name, _) in _DTYPES.items()}
_BLANK = "0" * 64
# safetensors refuses longer headers.
_LONGEST_HEADER = 100_000_000
_READ = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its description, and its content in pieces, which hold its elements in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """A tensor in memory."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def bytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype][1]


def write(path: Path, kind: str, content: Any, entries: Sequence[Entry], version: int = FORMAT_VERSION) -> str:
    """Write a file, piece by piece; the caller renames it into place. Returns its header's checksum.

    Entries with wider elements should come first, so that each one is aligned.

    Raises:
        OSError: a full disk, a folder that may not be written.
    """
    described, at = {}, 0
    for entry in entries:
        described[entry.name] = {
            "dtype": _DTYPES[entry.dtype][0], "shape": list(entry.shape), "data_offsets": [at, at + entry.bytes],
        }  # fmt: skip
        at += entry.bytes

    def header(checksums: dict[str, str], own: str = _BLANK) -> bytes:
        metadata = {
            "format": kind,
            "format_version": str(version),
            "content": json.dumps(content, allow_nan=False),
            "checksums": json.dumps(checksums),
            "header_sha256": own,
        }
        text = json.dumps({"__metadata__": metadata, **described}, allow_nan=False).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text

    checksums = dict.fromkeys(described, _BLANK)
    with open(path, "wb") as file:
        file.write(header(checksums))  # of the final length
        for entry in entries:
            digest, size = hashlib.sha256(), 0
            for piece in entry.pieces():
                data = piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
                size += len(data)
            assert size == entry.bytes, (entry.name, size, entry.bytes)
            checksums[entry.name] = digest.hexdigest()
        own = hashlib.sha256(header(checksums)).hexdigest()
        file.seek(0)
        file.write(header(checksums, own))
    return own


@dataclass(frozen=True)
class Container:
    """An open file: its content, its tensors by name, and its header's checksum."""

    path: Path
    kind: str
    content: Any
    checksum: str
    entries: dict[str, dict[str, Any]]
    header_bytes: int
    _checksums: dict[str, str]
    _opened: FileIdentity
    version: int = FORMAT_VERSION

    @classmethod
    def open(cls, path: Path, kind: str) -> "Container":
        """Read and check the header; tensor data is not read.

        Raises:
            UserError: no such file; not a dqrm file; truncated; another format version; a damaged header.
        """
        made = "expected a .dqrm file that `dqrm export` wrote"
        if path.is_dir():
            raise UserError(
                f"{path} is a folder, {made}; export a run folder with "
                f"`dqrm export {shlex.quote(str(path))} -o FILE.dqrm`"
            )
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is a pipe or a device, {made}: a model is read more than once")
        try:
            with path.open("rb") as file:
                opened = FileIdentity.of_open(file)
                size = opened.size
                head = file.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or length > _LONGEST_HEADER or not length >= 2:
                    raise UserError(f"{path} is not a dqrm model, {made}")
                text = file.read(length)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if len(text) < length:
            what = "is truncated" if text[:1] == b"{" and b'"format"' in text else "is not a dqrm model"
            raise UserError(f"{path} {what}: it has {size:,} bytes, {made}")
        try:
            described = json.loads(text)
            metadata = described.pop("__metadata__")
            stored_kind, version = metadata["format"], metadata["format_version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            ours = b'"header_sha256"' in text
            raise UserError(f"{path} {'has a damaged header' if ours else 'is not a dqrm model'}, {made}") from None
        if stored_kind != kind:
            raise UserError(f"{path} is of format {str(stored_kind)[:40]!r}, not {kind}, {made}")
        if version not in map(str, _KNOWN):
            known = f"versions {_KNOWN[0]} to {_KNOWN[-1]}"
            raise UserError(
                f"{path} has format version {str(version)[:20]}, this dqrm reads {known}; "
                "another version of dqrm wrote it"
            )
        try:
            own = metadata["header_sha256"]
            blank = re.sub(rb'("header_sha256": ")[0-9a-f]{64}"', rb"\g<1>" + _BLANK.encode() + b'"', text)
            if hashlib.sha256(head + blank).hexdigest() != own:
                raise ValueError("checksum")
            content, checksums = json.loads(metadata["content"]), json.loads(metadata["checksums"])
            end = _end(list(described.values()))
            if set(checksums) != set(described):
                raise ValueError("checksums")
            _check_values([content, checksums, described])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} has a damaged header: its checksum does not match; export it again") from None
        if size != 8 + length + end:
            what = "truncated" if size < 8 + length + end else "damaged"
            raise UserError(f"{path} is {what}: it has {size:,} bytes, expected {8 + length + end:,}; export it again")
        return cls(path, kind, content, own, described, 8 + length, checksums, opened, int(version))

    def _open(self) -> IO[bytes]:
        """Reopen the file; UserError if it was replaced since its header was read."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None
        if not self._opened.unchanged(FileIdentity.of_open(file)):
            file.close()
            raise UserError(f"{self.path} was replaced while it was being read; try again")
        return file

    def tensors(
        self, wanted: Callable[[str], bool], mapped: Callable[[str], bool]
    ) -> tuple[dict[str, Tensor], Watch | None]:
        """The wanted tensors: read into memory, or memory-mapped, and then no byte is read before it is used.

        Not by the safetensors library, whose mapping the system refuses if the file is larger than the memory.

        Returns:
            The tensors, and a `Watch` on the file that they are mapped from; None if no tensor is mapped.

        Raises:
            UserError: a tensor that does not match its bytes, or a file that was replaced or cannot be mapped.
        """
        file, memory = self._open(), None
        try:
            watch, tensors = Watch(file, self.path, "the loaded model", "load it again"), {}
            for name in filter(wanted, self.entries):
                entry = self.entries[name]
                start, end = entry["data_offsets"]
                dtype, shape = _NAMES.get(entry["dtype"]), entry["shape"]
                if dtype is None or prod(shape) * dtype.itemsize != end - start:
                    raise UserError(f"{self.path} is damaged: '{name}' is {brief(entry)}; export it again")
                if prod(shape) == 0:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                elif mapped(name):
                    memory = _map(file) if memory is None else memory
                    flat = torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=self.header_bytes + start)
                    tensors[name] = flat.view(shape)
                    _expect_random_reads(tensors[name])
                else:
                    tensors[name] = _read(file, self.header_bytes + start, prod(shape), dtype).view(shape)
            watch.check()
        except (OSError, ValueError, RuntimeError) as error:
            file.close()
            raise UserError(f"{self.path} cannot be read into memory: {brief(error)}") from None
        except BaseException:
            file.close()
            raise
        if memory is None:
            file.close()
            return tensors, None
        return tensors, watch

    def read(self, name: str) -> bytes:
        """The bytes of a tensor, compared with its checksum.

        Raises:
            UserError: they differ.
        """
        content = b"".join(self.pieces(name))
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def verify(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Compare the bytes of each wanted tensor with its checksum.

        Raises:
            UserError: one differs; names it.
        """
        for name in filter(wanted, self.entries):
            digest = hashlib.sha256()
            for piece in self.pieces(name):
                digest.update(piece)
            self._compare(name, digest.hexdigest())

    def _compare(self, name: str, digest: str) -> None:
        if digest != self._checksums[name]:
            raise UserError(f"{self.path} is damaged: the checksum of '{name}' does not match; export it again")

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, a few megabytes at a time."""
        start, end = self.entries[name]["data_offsets"]
        try:
            with self._open() as file:
                file.seek(self.header_bytes + start)
                while start < end:
                    piece = file.read(min(_READ, end - start))
                    if not piece:
                        raise UserError(f"{self.path} is truncated; export it again")
                    yield piece
                    start += len(piece)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None


def _map(file: IO[bytes]) -> mmap.mmap:
    """Map a file, copy on write: writing to it, which nothing here does, would change a copy."""
    if sys.platform == "win32":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read(file: IO[bytes], at: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements from position `at` of a file, in memory: later changes of the file have no effect."""
    elements = torch.empty(count, dtype=dtype)
    rest = elements.view(torch.uint8).numpy().data
    file.seek(at)
    while rest:
        done = file.readinto(rest)  # type: ignore[attr-defined]
        if not done:
            raise OSError("it was truncated while it was read")
        rest = rest[done:]
    return elements


def brief(error: Any) -> str:
    """An error's text, no longer than a sentence: it may quote the content of a damaged file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."


def _check_values(tree: Any) -> None:
    """Raise ValueError for text that is not valid Unicode and numbers that are not finite; JSON can hold both."""
    if isinstance(tree, dict):
        _check_values([*tree, *tree.values()])
    elif isinstance(tree, list):
        for part in tree:
            _check_values(part)
    elif isinstance(tree, str):
        tree.encode()
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError("a number that is not finite")


def _end(entries: list[dict[str, Any]]) -> int:
    """The end of the last tensor; ValueError or TypeError unless all are described in the right types and stored end to
    end, each byte in one of them."""
    for entry in entries:
        start, end = entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 2**62 for number in [start, end, *entry["shape"]]):
            raise ValueError("numbers")
    at = 0
    for start, end in sorted(entry["data_offsets"] for entry in entries):
        if start != at or end < start:
            raise ValueError("offsets")
        at = end
    return at


def _expect_random_reads(tensor: Tensor) -> None:
    """Advise the system to read only the requested pages of a large mapped tensor, without read-ahead."""
    if tensor.nbytes < _READ or sys.platform == "win32":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    with suppress(AttributeError):  # a libc without madvise; it is advice, so its result does not matter
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_RANDOM))
