"""Atomic files: written beside the target, flushed to disk, renamed."""

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dqrm.errors import UserError

# Bytes free below which a disk counts as full: less than what was to be written next.
_FULL = 1 << 16


def write_json(path: Path, content: Any) -> None:
    """Write `content` beside `path` and rename: a reader sees the old file or the new one, never half of one.

    The file is flushed before the rename and its folder after it, so that the new one outlasts a power cut.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    with suppress(OSError):
        flush(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: damaged, or not written by dqrm") from None


def why_not_written(error: Exception, folder: Path | None = None) -> str:
    """Why writing failed, in words: numpy, polars and the system report a full disk differently.

    folder: where to check for a full disk, since polars does not always report it.
    """
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    told = re.search(r"os error (\d+)", text)
    if number is None and told:
        number = int(told[1])
    full = number == errno.ENOSPC or "No space left" in text
    if number is None and folder is not None and not full:
        with suppress(OSError):
            full = shutil.disk_usage(folder).free < _FULL
    if full:
        return "the disk is full (No space left on device)"
    if number == errno.EDQUOT:
        return "the disk quota is used up"
    return text or type(error).__name__


def flush(path: Path) -> None:
    """Make a file, or the entries of a folder, last over a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed or the process ends, however it ends.

    Returns:
        False if the system or the file system does not support locks: nothing is locked then.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def claim(file: IO[Any], path: Path, busy: str, gone: str | None = None) -> bool:
    """Lock an open file that whoever held the lock before may have renamed or removed since it was opened.

    Returns:
        False if the system does not support locks.

    Raises:
        UserError: `busy`, where another process holds the lock; `gone` (default: the same), where `path` is no longer
            this file.
    """
    try:
        locked = try_lock(file)
    except BlockingIOError:
        raise UserError(busy) from None
    if locked:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return True
        raise UserError(gone or busy)
    return False


@contextmanager
def exclusive(path: Path, message: str) -> Iterator[None]:
    """Hold a lock on the file `path` (made if need be) while inside.

    Raises:
        UserError: `message`, where another process holds it.
    """
    with open(path, "a") as file:
        claim(file, path, message)
        yield


def require_replaceable(output: Path) -> None:
    """Whether a file may take the place of `output`: a rename onto a pipe or a device (/dev/null) would remove it.

    Raises:
        UserError: it is a folder, a pipe, a device or a socket; or `-`, which elsewhere means standard output.
    """
    if str(output) == "-":
        raise UserError("cannot write to standard output (-), expected the name of a file")
    try:
        mode = output.stat().st_mode
    except (OSError, ValueError):
        return  # whoever writes it says what is wrong
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((words for test, words in kinds if test(mode)), "a device")
    if not stat.S_ISREG(mode):
        raise UserError(f"{output} is {kind}, expected the name of a file")


def partial_path(output: Path) -> Path:
    """The file beside `output` that `replacing` writes first."""
    target = output.resolve()  # a link to a file means the file
    return target.with_name(target.name + ".partial")


@contextmanager
def replacing(output: Path, busy: str) -> Iterator[Path]:
    """A file beside `output` to write to, locked: it takes its place at the end, or is removed if anything goes wrong.

    Raises:
        UserError: `busy`, where another process writes there; the disk is full, the folder may not be written, or
            `output` is no file.
    """
    require_replaceable(output)
    partial = partial_path(output)
    with _writing(output):
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = partial.open("ab")
    with lock:
        if not claim(lock, partial, busy):
            lock.close()  # Windows renames no file that is open
        try:
            yield partial
            with _writing(output):
                flush(partial)
                os.replace(partial, output.resolve())
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    with suppress(OSError):
        flush(partial.parent)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {output}: {why_not_written(error)}; nothing of it was kept") from None


@dataclass(frozen=True)
class Kind:
    """The expected kind of a value in a JSON file: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Kind("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
POSITIVE = Kind("a whole number, 1 or more", lambda value: type(value) is int and value >= 1)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
ANYTHING = Kind("a value", lambda value: True)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def problem(content: Any, shape: Any, key: str = "") -> str | None:
    """What is wrong with a value from a JSON file, as the rest of a sentence about the file; None if nothing is.

    Args:
        shape: a Kind; {key: shape}, where others may be beside them, 'key?' may be absent and '*' is each other key;
            [shape] for a list; (shape, None) for what may be null.
    """
    here = f"{key} = {_quoted(content)}" if key else _quoted(content)
    if isinstance(shape, tuple):
        return None if content is None else problem(content, shape[0], key)
    if isinstance(shape, Kind):
        return None if shape.holds(content) else f"has {here}, expected {shape.words}"
    if isinstance(shape, list):
        if not isinstance(content, list):
            return f"has {here}, expected a list"
        problems = (problem(value, shape[0], f"{key}[{at}]") for at, value in enumerate(content))
        return next(filter(None, problems), None)
    if not isinstance(content, dict):
        return f"has {here}, expected an object"
    prefix = f"{key}." if key else ""
    for name, part in shape.items():
        plain = name.removesuffix("?")
        if name != "*" and plain in content:
            if wrong := problem(content[plain], part, prefix + plain):
                return wrong
        elif name != "*" and plain == name:
            return f"lacks '{prefix}{name}'"
    named = {name.removesuffix("?") for name in shape if name != "*"}
    rest = [name for name in content if "*" in shape and name not in named]
    return next(filter(None, (problem(content[name], shape["*"], prefix + name) for name in rest)), None)


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def require(path: Path, content: Any, shape: Any) -> None:
    """Raise UserError unless `content`, read from `path`, is of a shape; see `problem`."""
    if wrong := problem(content, shape):
        raise UserError(f"{path} {wrong}: damaged, or not written by dqrm")
