"""Resolve sources: files, globs, folders as Spark and Hive write them, pipes."""

import glob
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from dqrm.data.partitions import is_partition, partitions
from dqrm.data.sources import Source, Stream, is_parquet
from dqrm.errors import UserError
from dqrm.identity import FileIdentity

STDIN = "-"
_DESCRIPTOR = re.compile(r"/dev/(?:stdin|fd/(\d+))|/proc/(?:self|thread-self|\d+)/fd/(\d+)")
# Files that say something about a table and hold no rows of it. A shell's own glob names them too.
_MARKERS = re.compile(r"_(SUCCESS|metadata|common_metadata|committed_.*|started_.*)|.*\.crc")
# Folders in a folder that says which of its files count: reading all would bring deleted rows back.
_TABLES = {".hoodie": "a Hudi"}
DELTA = "_delta_log"
# Of Hadoop's output committer: where tasks write until the job is committed, and what then marks a folder as whole.
_UNCOMMITTED, _COMMITTED = "_temporary", "_SUCCESS"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
_FILE = "file://"
# Of a dataset of Hugging Face.
_HUB = "hf:"
_Folder = TypeVar("_Folder", bound=PurePath)


def resolve(given: Sequence[str | Path]) -> list[Source]:
    """The sources named by paths, globs and folders: in the order given, those of one glob or folder in natural order
    (day_2 before day_10). `-` is standard input. Pipes are not read yet. A Delta Lake table is the files of its newest
    version, `hf:NAME` a dataset of Hugging Face, split by split (`dqrm.data.formats`); what a URL names is read by
    fsspec (`dqrm.data.stores`).

    Raises:
        UserError: none given, none of that name, a file that cannot be opened, a device, or a source meant twice.
    """
    sources: list[Source] = []
    for item in map(local, given):
        if item.startswith(_HUB):
            sources += _hub(item)
        else:
            sources += _stored(item) if is_url(item) else [_source(path, base) for path, base in _expand(item)]
    if not sources:
        only = f", got only {', '.join(map(str, given))}, Spark's marker files" if given else ""
        raise UserError(f"no source file was given{only}; expected at least one")
    seen: set[tuple[int, int]] = set()
    for source in sources:
        if source.state is None:
            continue
        if source.state.file in seen:
            raise UserError(f"{source.where} is given twice, and its rows would count twice")
        seen.add(source.state.file)
        if source.stream:
            source.state = None  # a pipe has none of its own
    _tell_apart(sources)
    return sources


def require_same_files(given: Sequence[str | Path], sources: Sequence[Source]) -> None:
    """Check that the globs and folders still name the same sources.

    Raises:
        UserError: a file appeared or disappeared while they were read.
    """
    before = {
        str(source.path) if source.stream else source.where for source in sources if source.state or source.stream
    }
    now = {name for item in map(local, given) for name in _names(item)}
    for name in sorted(before ^ now, key=lambda name: natural(Path(name))):
        what = "is new" if name in now else "is gone"
        raise UserError(
            f"the source files changed while they were read: {name} {what}; start again when nothing writes there"
        )


def is_url(text: str) -> bool:
    """Whether a source is named by a URL, unless a file has that name."""
    return _URL.fullmatch(text) is not None and not os.path.lexists(text)


def local(given: str | Path) -> str:
    """The path that a URL of a local file means; anything else as it is."""
    text = str(given)
    return text.removeprefix(_FILE) if is_url(text) else text


def reads(given: Sequence[str | Path], path: Path) -> str | None:
    """The one of the given folders and globs that means the file or folder `path` (resolved), or what is in it."""
    for text in map(local, given):
        literal = os.path.lexists(text) or not glob.has_magic(text)
        for match in [text] if literal else glob.glob(text, recursive=True):
            real = Path(os.path.realpath(match))
            if path == real:
                return text
            if real in path.parents and not any(map(hidden, path.relative_to(real).parts)):
                return text
    return None


def _names(item: str) -> list[str]:
    """Each file that an item names; of a dataset of Hugging Face, none."""
    if item.startswith(_HUB):
        return []
    if is_url(item):
        from dqrm.data import stores

        return stores.urls(item)
    return [str(path) for path, _ in _expand(item)]


def _hub(text: str) -> Sequence[Source]:
    from dqrm.data.formats import hub

    return hub.sources(text)


def _stored(url: str) -> Sequence[Source]:
    from dqrm.data import stores

    return stores.sources(url)


def _expand(text: str) -> list[tuple[Path, Path | None]]:
    if text == STDIN:
        return [(Path(STDIN), None)]
    if not text or "\0" in text:
        raise UserError(f"cannot read '{text}': not a file name")
    if os.path.lexists(text) or not glob.has_magic(text):
        path = Path(text)
        if os.path.isdir(path):
            return [(file, base_of(path)) for file in _walk(path, ())]
        return [] if _MARKERS.fullmatch(path.name) else [(path, base_of(path.parent))]
    fixed = Path(text)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    files: dict[Path, None] = {}
    for path in sorted(map(Path, glob.glob(text, recursive=True)), key=natural):
        if any(map(hidden, path.relative_to(fixed).parts)) and not names_hidden(Path(text).relative_to(fixed), path):
            continue  # such as _temporary, with what failed tasks of Spark left
        if not os.path.isdir(path):
            files[path] = None
        elif "**" not in text:  # which names all that is in the folders itself
            files |= dict.fromkeys(_walk(path, ()))
    if not files:
        raise UserError(f"no file matches '{text}'")
    return [(path, base_of(fixed)) for path in files]


def _walk(folder: Path, above: tuple[str, ...]) -> list[Path]:
    """The files in a folder and below, in natural order."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that contains it: following it would never end")
    try:
        entries = sorted(folder.iterdir(), key=natural)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    names = {entry.name for entry in entries}
    require_log(folder, names)
    if DELTA in names:
        from dqrm.data.formats import delta

        return sorted(delta.files(folder), key=natural)
    files: list[Path] = []
    for entry in entries:
        if hidden(entry.name):
            continue
        if os.path.isdir(entry):
            files += _walk(entry, (*above, real))
        else:
            mode = _stat(entry).st_mode
            if not stat.S_ISREG(mode):
                raise UserError(f"{entry} in the folder is {_kind(mode)}, expected files only")
            files.append(entry)
    if not files and not above:
        raise UserError(f"{folder} holds no file (names that begin with _ or . do not count), expected a log in it")
    return files


def require_log(folder: Path | str, names: set[str]) -> None:
    """Whether a folder with entries of these names can be a log, as a whole.

    Raises:
        UserError: it is a table, a dataset folder, or not complete.
    """
    for marker, kind in _TABLES.items():
        if marker in names:
            raise UserError(
                f"{folder} is {kind} table, whose files also hold rows that were deleted or replaced; "
                "export it as Parquet or CSV first"
            )
    if {"dataset.json", "train"} <= names:
        raise UserError(f"{folder} is a dataset folder, which dqrm prepare made; expected the log itself")
    if _UNCOMMITTED in names and _COMMITTED not in names:
        raise UserError(
            f"{folder} is not complete: a job of Spark or Hadoop writes to it, or was stopped (it has {_UNCOMMITTED} "
            f"and no {_COMMITTED}); wait for the job or run it again, or remove {_UNCOMMITTED} if all files are there"
        )


def hidden(name: str) -> bool:
    """What Spark and Hive leave out, too. A column may begin with an underscore: _day=3."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or _MARKERS.fullmatch(name) is not None


def names_hidden(pattern: PurePath, path: PurePath) -> bool:
    """Whether a pattern (what follows the folders before it) such as _day* or .day* asks for such names."""
    return _MARKERS.fullmatch(path.name) is None and any(part[0] in "_." for part in pattern.parts)


def base_of(folder: _Folder) -> _Folder:
    """The folder below which files are told apart: that above the columns in a path."""
    while is_partition(folder.name):
        folder = folder.parent
    return folder


def _source(path: Path, base: Path | None) -> Source:
    if base is None:
        return _stream(path, 0, "standard input")
    mode = _stat(path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        descriptor_path = _DESCRIPTOR.fullmatch(str(path))
        return _stream(path, int(descriptor_path[1] or descriptor_path[2] or 0) if descriptor_path else None, str(path))
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_kind(mode)}, expected a file, a folder or a pipe")
    state = FileIdentity.of(_stat(path))
    return Source(
        path, is_parquet(path), name=path.relative_to(base).as_posix(), partitions=partitions(path), state=state
    )


def _stream(path: Path, descriptor: int | None, where: str) -> Source:
    try:
        status = path.stat() if descriptor is None else os.fstat(descriptor)
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror}") from None
    if stat.S_ISSOCK(status.st_mode) and descriptor is None:
        raise UserError(f"{where} is a socket, expected a file, a folder or a pipe")
    if stat.S_ISDIR(status.st_mode) or stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
        kind = "a terminal" if descriptor is not None and os.isatty(descriptor) else _kind(status.st_mode)
        raise UserError(f"{where} is {kind}, expected a file or a pipe")
    stream, name = Stream(path, descriptor, where), path.name if descriptor is None else str(path)
    return Source(path, False, where, name, state=FileIdentity.of(status), stream=stream)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        broken = f"it is a link to {os.readlink(path)}, and there is no such file" if path.is_symlink() else ""
        raise UserError(f"cannot read {path}: {broken or error.strerror}") from None


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return "a device"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket"


def _tell_apart(sources: Sequence[Source]) -> None:
    """Files of one name get as much of their path as they need."""
    files = [source for source in sources if source.state is not None]
    if len({source.name for source in files}) == len(files):
        return
    paths = [Path(os.path.abspath(source.path)) for source in files]
    common = os.path.commonpath(paths)
    for source, path in zip(files, paths):
        source.name = path.relative_to(common).as_posix()


def natural(path: PurePath) -> list[list[str | int]]:
    """A key that sorts by the numbers in names: day_2 before day_10."""
    # Every second piece is a number.
    return [
        [int(piece) if at % 2 else piece for at, piece in enumerate(re.split(r"(\d+)", part))] for part in path.parts
    ]
