"""NumPy's arrays in files, some rows at a time: .npy, and the members of .npz, stored or deflated.

An array in Fortran's order, as a transposed one is saved, has its columns one after the other. Of a deflated one
a first pass remembers the state of the decompressor at the beginning of each column; then all columns are read abreast.
So the data is decompressed twice, and neither memory nor disk has to hold it.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dqrm.errors import UserError

_READ = 1 << 18
_LOCAL_HEADER, _LOCAL_MAGIC = struct.Struct("<4s22xHH"), b"PK\x03\x04"
_ENCRYPTED = 1


class Unreadable(Exception):
    """A file that is not what its name says, in words that follow the file's name."""


class _Place(Protocol):
    """A place in the bytes of an array's file: reading moves it on, a copy moves on its own."""

    def read(self, count: int) -> bytes:
        """The next bytes: as many, fewer only at the end."""

    def copy(self) -> "_Place":
        """The same place."""


@dataclass
class _Stored:
    file: IO[bytes]
    at: int
    end: int

    def read(self, count: int) -> bytes:
        self.file.seek(self.at)
        data = self.file.read(min(count, self.end - self.at))
        self.at += len(data)
        return data

    def copy(self) -> "_Stored":
        return _Stored(self.file, self.at, self.end)


@dataclass
class _Deflated:
    packed: _Stored
    inflate: Any
    rest: bytes = b""

    def read(self, count: int) -> bytes:
        pieces = []
        while count and not self.inflate.eof:
            packed = self.rest or self.packed.read(min(_READ, count + 1024))
            piece = self.inflate.decompress(packed, count)
            self.rest = self.inflate.unconsumed_tail
            if not piece and not packed:
                break
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def copy(self) -> "_Deflated":
        return _Deflated(self.packed.copy(), self.inflate.copy(), self.rest)


@dataclass(frozen=True)
class Stored:
    """An array in a file. shape, dtype: its own. name: within the file.

    fortran: whether its columns come one after the other. begin: the place of its header; header: that one's bytes.
    checksum: CRC-32 of all its bytes, None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    begin: _Place
    header: int
    checksum: int | None

    def blocks(self, rows: int) -> Iterator[NDArray[Any]]:
        """All rows in order, at most so many at a time; the last dimension is the second or there is none.

        Raises:
            Unreadable: it is truncated or damaged.
        """
        try:
            if self.fortran and len(self.shape) == 2 and self.shape[1] > 1:
                yield from self._by_columns(rows)
            else:
                yield from self._in_order(rows)
        except zlib.error as error:
            raise Unreadable(f"is damaged: {self.name} does not decompress ({error})") from None

    def whole(self) -> NDArray[Any]:
        """All of it; for small ones."""
        blocks = list(self.blocks(1 << 20))
        return np.concatenate(blocks) if blocks else np.zeros(self.shape, self.dtype)

    def _in_order(self, rows: int) -> Iterator[NDArray[Any]]:
        place = self.begin.copy()
        checksum = zlib.crc32(self._read(place, self.header))
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        for first in range(0, self.shape[0], rows):
            count = min(rows, self.shape[0] - first)
            data = self._read(place, count * size)
            if self.checksum is not None:
                checksum = zlib.crc32(data, checksum)
            yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
        self._require(checksum)

    def _by_columns(self, rows: int) -> Iterator[NDArray[Any]]:
        length, columns = self.shape
        place, size = self.begin.copy(), self.dtype.itemsize
        checksum = zlib.crc32(self._read(place, self.header))
        starts = []
        for _ in range(columns):
            starts.append(place.copy())
            left = length * size
            while left:
                data = self._read(place, min(left, _READ))
                checksum, left = zlib.crc32(data, checksum), left - len(data)
        self._require(checksum)
        for first in range(0, length, rows):
            count = min(rows, length - first)
            parts = [np.frombuffer(self._read(start, count * size), self.dtype) for start in starts]
            yield np.stack(parts, axis=1)

    def _read(self, place: _Place, count: int) -> bytes:
        data = place.read(count)
        if len(data) < count:
            raise Unreadable(f"is truncated: {self.name} ends too early")
        return data

    def _require(self, checksum: int) -> None:
        if self.checksum is not None and checksum != self.checksum:
            raise Unreadable(f"is damaged: {self.name} has another checksum (CRC-32) than the file says")


@contextmanager
def npy(path: Path) -> Iterator[Stored]:
    """The array in a .npy file, while inside.

    Raises:
        Unreadable: it is no such file. OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        place = _Stored(file, 0, file.seek(0, io.SEEK_END))
        yield _stored(path.name, place, None, place.end)


@contextmanager
def npz(path: Path) -> Iterator[dict[str, Stored]]:
    """The arrays in a .npz file by name, while inside.

    Raises:
        Unreadable: it is no such file. OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except zipfile.BadZipFile as error:
            raise Unreadable(f"cannot be read as .npz ({error})") from None
        members = [entry for entry in entries if entry.filename.endswith(".npy")]
        yield {entry.filename.removesuffix(".npy"): _member(file, entry) for entry in members}


def _member(file: IO[bytes], entry: zipfile.ZipInfo) -> Stored:
    name = entry.filename.removesuffix(".npy")
    if entry.flag_bits & _ENCRYPTED:
        raise Unreadable(f"cannot be read: {name} is encrypted")
    file.seek(entry.header_offset)
    head = file.read(_LOCAL_HEADER.size)
    if len(head) < _LOCAL_HEADER.size or not head.startswith(_LOCAL_MAGIC):
        raise Unreadable(f"is damaged: {name} is not where the file says")
    _, names, extra = _LOCAL_HEADER.unpack(head)
    begin = entry.header_offset + _LOCAL_HEADER.size + names + extra
    packed = _Stored(file, begin, begin + entry.compress_size)
    openers: dict[int, Callable[[], _Place]] = {
        zipfile.ZIP_STORED: lambda: packed,
        zipfile.ZIP_DEFLATED: lambda: _Deflated(packed, zlib.decompressobj(-zlib.MAX_WBITS)),
    }
    if entry.compress_type not in openers:
        raise Unreadable(f"cannot be read: {name} is compressed by method {entry.compress_type}, expected deflate")
    return _stored(name, openers[entry.compress_type](), entry.CRC, entry.file_size)


def _stored(name: str, place: _Place, checksum: int | None, size: int) -> Stored:
    head = io.BytesIO(_head(name, place))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = read(head)
    except ValueError as error:
        raise Unreadable(f"cannot be read: {name} is no array of NumPy ({error})") from None
    if dtype.hasobject:
        raise Unreadable(f"cannot be read: {name} holds Python objects, expected numbers")
    expected = head.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != expected:
        raise Unreadable(f"is truncated or damaged: {name} has {size} bytes, its shape {shape} needs {expected}")
    return Stored(name, shape, dtype, fortran and len(shape) > 1, place, head.tell(), checksum)


def _head(name: str, place: _Place) -> bytes:
    """The header's bytes, and perhaps some more."""
    try:
        return place.copy().read(1 << 13)
    except zlib.error as error:
        raise Unreadable(f"is damaged: {name} does not decompress ({error})") from None


def require(array: Stored, where: str, columns: int | None, kinds: str = "iuf") -> None:
    """Whether an array has two dimensions, the second of so many columns (None: one value per row), of numbers.

    kinds: NumPy's letters for what the numbers may be: integers with a sign or without, floats, booleans.

    Raises:
        UserError: it has not.
    """
    wanted = f"[rows, {columns}]" if columns else "[rows] or [rows, 1]"
    shapes = [(columns,)] if columns else [(), (1,)]
    if not array.shape or array.shape[1:] not in shapes:
        raise UserError(f"{where}: {array.name} has the shape {list(array.shape)}, expected {wanted}")
    if array.dtype.kind not in kinds or array.dtype.itemsize > 8:
        expected = " or ".join(
            word for letter, word in (("i", "integers"), ("f", "floats"), ("b", "booleans")) if letter in kinds
        )
        raise UserError(f"{where}: {array.name} holds {array.dtype}, expected {expected}")
