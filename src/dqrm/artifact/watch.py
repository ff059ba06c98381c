"""Detects whether a file in use has changed since it was opened."""

import weakref
from pathlib import Path
from typing import IO

from dqrm.errors import UserError
from dqrm.identity import FileIdentity


class Watch:
    """Keeps a file open, so that `check` is about this very file even if another one has taken its name.

    Args:
        path: its name, for messages. user: what uses it ("the loaded model").
        remedy: what to do after a change ("load it again").
    """

    def __init__(self, file: IO[bytes], path: Path, user: str, remedy: str) -> None:
        self._file, self._path, self._user, self._remedy = file, path, user, remedy
        self._opened = FileIdentity.of_open(file)
        weakref.finalize(self, file.close)

    def check(self) -> None:
        """Raise UserError if the file was written to, truncated or touched since: its content may have changed."""
        if not self._opened.unchanged(FileIdentity.of_open(self._file)):
            raise UserError(
                f"{self._path} was changed in place under {self._user}; {self._remedy}, and replace a file that is in "
                "use by renaming a new one onto it"
            )
