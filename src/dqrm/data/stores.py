"""Logs in object stores and on other file systems, by URL: `s3://bucket/logs/*.parquet`. Needs the package fsspec and,
for most of them, its driver (s3fs, gcsfs, adlfs), which finds credentials where it always does.

Text is read as it arrives. A Parquet file is copied to a temporary one without a name while it is hashed, so that it
crosses the network once and a killed process leaves nothing.
"""

import errno
import hashlib
import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dqrm.data.listing import DELTA, base_of, hidden, names_hidden, natural, require_log
from dqrm.data.partitions import partitions
from dqrm.data.sources import PARQUET, Source
from dqrm.errors import UserError
from dqrm.files import why_not_written
from dqrm.identity import FileIdentity

# Bytes asked for at a time, and those from the end of a Parquet file, which mostly hold its footer.
_BLOCK, _FOOTER = 1 << 23, 1 << 16
# What drivers call the version of an object, the surest first. Names in lower case.
_VERSIONS = (
    "etag",
    "generation",
    "md5hash",
    "lastmodified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
)
_Info = Mapping[str, Any]


@dataclass
class StoredSource(Source):
    """A file that fsspec reads. store: its file system. key: its name there. copy: of a Parquet file that has been
    read."""

    store: Any = field(default=None, repr=False)
    key: str = ""
    copy: IO[bytes] | None = field(default=None, init=False, repr=False)

    def identity(self) -> FileIdentity:
        """As `Source.identity`."""
        with _asking(self.where):
            self.store.invalidate_cache()
            try:
                info = self.store.info(self.key)
            except FileNotFoundError:
                info = None
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _identity(self.store, self.key, info, self.where)

    def pieces(self) -> Iterator[bytes]:
        """As `Source.pieces`."""
        copy: IO[bytes] | None = tempfile.TemporaryFile() if self.parquet else None  # noqa: SIM115
        size = 0
        for piece in self._read():
            size += len(piece)
            if copy is not None:
                self._write(copy, piece)
            yield piece
        assert self.state is not None
        if size != self.state.size:
            self.require_unchanged()
            raise UserError(f"cannot read {self.where}: {size} of its {self.state.size} bytes arrived; start again")
        self.copy = copy

    def scannable(self, rows: bool) -> Any:
        """As `Source.scannable`."""
        if self.copy is None and not rows:
            return io.BytesIO(self._footer())
        if self.copy is None:
            for _ in self.pieces():
                pass
        assert self.copy is not None
        self.copy.seek(0)
        return self.copy

    def release(self) -> None:
        """As `Source.release`."""
        if self.copy is not None:
            self.copy.close()
            self.copy = None

    def _read(self) -> Iterator[bytes]:
        with _asking(self.where), self.store.open(self.key, "rb", block_size=_BLOCK) as file:
            while piece := file.read(_BLOCK):
                yield piece

    def _write(self, copy: IO[bytes], piece: bytes) -> None:
        folder = Path(tempfile.gettempdir())
        try:
            copy.write(piece)
            copy.flush()
        except OSError as error:
            raise UserError(
                f"cannot copy {self.where} to {folder}: {why_not_written(error, folder)}; TMPDIR names another folder"
            ) from None

    def _footer(self) -> bytes:
        """A file of the magic bytes and the footer only: polars reads columns and the number of rows from it."""
        assert self.state is not None
        size = self.state.size
        with _asking(self.where):
            tail = self.store.cat_file(self.key, start=max(0, size - _FOOTER), end=size)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < length <= size:
                tail = self.store.cat_file(self.key, start=size - length, end=size)
        return PARQUET + tail[-length:]


def sources(url: str) -> list[StoredSource]:
    """The files that a URL, a glob or a folder names, in natural order.

    Raises:
        UserError: fsspec or the driver is missing; there is no such file, or it may not be read; a folder that is a
            table, or not complete.
    """
    store, found, base = _listed(url)
    made = []
    for name, info in found.items():
        path, where = PurePosixPath(name), store.url(name)
        state = _identity(store.files, name, info, where)
        made.append(
            StoredSource(
                Path("/", store.prefix, *path.parts[path.is_absolute() :]),
                False,
                where,
                path.relative_to(base).as_posix(),
                partitions(path, where),
                state,
                store=store.files,
                key=name,
            )
        )
    _find_parquet(made)
    return made


def urls(url: str) -> list[str]:
    """The URL of each file that `sources` would give.

    Raises:
        UserError: as `sources`.
    """
    store, found, _ = _listed(url)
    return [store.url(name) for name in found]


def matches(url: str) -> dict[str, str]:
    """The files and folders that a URL or a glob names: each URL, and its last part.

    Raises:
        UserError: fsspec or the driver is missing; the store does not answer, or has none.
    """
    store = _Store.of(url)
    found = {name: PurePosixPath(name).name for name in _matches(store, url)}
    return {store.url(name): last for name, last in found.items()}


@dataclass(frozen=True)
class _Store:
    """A file system of fsspec. root: the name in it that a URL means. prefix: what makes a URL of a name."""

    files: Any
    root: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> "_Store":
        try:
            from fsspec.core import url_to_fs
            from fsspec.registry import known_implementations
        except ImportError:
            raise UserError(f"{url} needs the package fsspec: pip install 'dqrm[stores]'") from None
        known = known_implementations.get(url.partition("://")[0], {})
        try:
            with _asking(url):
                files, root = url_to_fs(url)
                files.invalidate_cache()
        except ImportError as error:
            driver = known.get("class", "fsspec").partition(".")[0]
            why = f"the package {driver}: pip install {driver}" if driver != "fsspec" else f"another package ({error})"
            raise UserError(f"{url} needs {why}") from None
        plain = url.rstrip("/")
        return cls(files, root, plain.removesuffix(root) if plain.endswith(root) else "")

    def url(self, name: str) -> str:
        return f"{self.prefix}{name}" if self.prefix or "://" in name else str(self.files.unstrip_protocol(name))


def _matches(store: _Store, url: str) -> dict[str, _Info]:
    """What a URL names. Names with what globs give another meaning are names where nothing matches."""
    with _asking(url):
        found = dict(store.files.glob(store.root, detail=True)) if has_magic(store.root) else {}
        try:
            found = found or {store.root: store.files.info(store.root)}
        except FileNotFoundError:
            if not has_magic(store.root):
                raise
    if not found:
        raise UserError(f"no file matches '{url}'")
    return found


def _listed(url: str) -> tuple[_Store, dict[str, _Info], PurePosixPath]:
    """The files that a URL means, and the folder below which they are told apart."""
    store = _Store.of(url)
    matched, root = _matches(store, url), PurePosixPath(store.root)
    if store.root in matched:
        if _is_folder(matched[store.root]):
            return store, _walk(store, store.root, url), base_of(root)
        return store, matched, base_of(root.parent)
    fixed = next(folder for folder in root.parents if not has_magic(str(folder)))
    found: dict[str, _Info] = {}
    for name in sorted(matched, key=lambda name: (natural(PurePosixPath(name)), name)):
        path = PurePosixPath(name)
        if any(map(hidden, path.relative_to(fixed).parts)) and not names_hidden(root.relative_to(fixed), path):
            continue
        if not _is_folder(matched[name]):
            found[name] = matched[name]
        elif "**" not in store.root:
            found |= _walk(store, name, url)
    if not found:
        raise UserError(f"no file matches '{url}'")
    return store, found, base_of(fixed)


def _walk(store: _Store, folder: str, url: str) -> dict[str, _Info]:
    """The files in a folder and below, in natural order."""
    with _asking(url):
        listed = store.files.find(folder, detail=True)
    above, found, inside = PurePosixPath(folder), {}, defaultdict(set)
    for name in sorted(listed, key=lambda name: (natural(PurePosixPath(name)), name)):
        path = PurePosixPath(name)
        if _is_folder(listed[name]) or name.endswith("/") or path == above:
            continue  # an empty object that stands for a folder
        parts = path.relative_to(above).parts
        for depth, part in enumerate(parts):
            if not any(map(hidden, parts[:depth])):
                inside[above.joinpath(*parts[:depth])].add(part)
        if not any(map(hidden, parts)):
            found[name] = listed[name]
    for each, names in inside.items():
        where = store.url(str(each)) if each != above else store.url(folder)
        require_log(where, names)
        if DELTA in names:
            raise UserError(f"{where} is a Delta Lake table, which is only read from a folder on this machine; copy it")
    if not found:
        raise UserError(
            f"{store.url(folder)} holds no file (names that begin with _ or . do not count), expected a log"
        )
    return found


def _is_folder(info: _Info) -> bool:
    return bool(info.get("type") == "directory")


def _identity(files: Any, name: str, info: _Info, where: str) -> FileIdentity:
    """In place of device and inode a hash of the name, in place of the time one of the version."""
    size = info.get("size")
    if _is_folder(info) or size is None:
        raise UserError(f"{where} {'is a folder' if _is_folder(info) else 'has no known size'}, expected a file")
    known = {key.lower(): value for key, value in info.items() if value}
    version = next((known[key] for key in _VERSIONS if key in known), "")
    version = version.timestamp() if hasattr(version, "timestamp") else str(version).strip('"')
    whose = (str(files.unstrip_protocol(name)), files.storage_options.get("host"))
    return FileIdentity(_number(whose), 0, int(size), _number(str(version)), 0, 1)


def _number(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "little")


def _find_parquet(made: list[StoredSource]) -> None:
    """Tell Parquet by its first bytes, with requests at the same time where the driver can."""
    asked = [source for source in made if source.size]
    if not asked:
        return
    with _asking(asked[0].where):
        heads = asked[0].store.cat_ranges(
            [source.key for source in asked], [0] * len(asked), [len(PARQUET)] * len(asked), on_error="return"
        )
    for source, head in zip(asked, heads):
        if isinstance(head, Exception):
            with _asking(source.where):
                raise head
        source.parquet = head == PARQUET


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Inside, whatever a driver raises is one sentence; a missing package, which is an ImportError, is left alone."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        gone = os.strerror(errno.ENOENT) if isinstance(error, FileNotFoundError) else ""
        text = " ".join((getattr(error, "strerror", None) or gone or str(error)).split())
        raise UserError(f"cannot read {url}: {text[:300] or type(error).__name__}") from None
