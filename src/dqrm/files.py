"""Files that are whole or not there: written beside, flushed to disk, renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dqrm.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write `content` beside `path` and rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


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
        False where the system or the file system knows no locks: nothing is locked then.

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
        False where the system knows no locks.

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
        try:
            try_lock(file)
        except BlockingIOError:
            raise UserError(message) from None
        yield


def require_keys(path: Path, content: Any, *keys: str) -> None:
    """Raise UserError unless `content`, read from `path`, is a mapping with these keys."""
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} lacks '{missing[0]}': damaged, or not written by dqrm")
