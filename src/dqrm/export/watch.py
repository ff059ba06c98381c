"""Whether a file that is read while it is used is still what it was when it was opened."""

import os
import weakref
from pathlib import Path
from typing import IO

from dqrm.errors import UserError


def identity(file: IO[bytes]) -> tuple[int, ...]:
    """Device, inode, size and times of the last write and change: another file, or one written to, has another."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink


def same(before: tuple[int, ...], now: tuple[int, ...]) -> bool:
    """Whether no write lies between two identities of an open file.

    The time of the change tells also of a write whose time was set back. It moves with the number of names, too: a file
    that was replaced by a renamed one lost one, and that is no write.
    """
    return before[:4] == now[:4] and (before[4] == now[4] or before[5] != now[5])


class Watch:
    """Keeps a file open, so that `check` is of this very file even where another one has taken its name since.

    Args:
        path: its name, for messages. user: what uses it ("the loaded model").
        remedy: what to do after a change ("load it again").
    """

    def __init__(self, file: IO[bytes], path: Path, user: str, remedy: str) -> None:
        self._file, self._path, self._user, self._remedy = file, path, user, remedy
        self._identity = identity(file)
        weakref.finalize(self, file.close)

    def check(self) -> None:
        """Raise UserError if the file was written to, cut or touched since: what is read from it may be of another."""
        if not same(self._identity, identity(self._file)):
            raise UserError(
                f"{self._path} was changed in place under {self._user}; {self._remedy}, and replace a file that is in "
                "use by renaming a new one onto it"
            )
