"""Where an export writes: a folder beside its output, whose content is renamed into place at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dqrm.errors import UserError
from dqrm.export.formats.base import Format
from dqrm.files import exclusive, flush

_OLD = ".old"


def publish(folder: Path, output: Path, target: Format) -> tuple[list[str], int]:
    """Rename what was written in `folder` to its place; names, the output's first, and bytes.

    Raises:
        OSError: nothing was renamed.
    """
    made = folder / output.name
    files = sorted((path for path in folder.iterdir() if path != made and not path.name.startswith(".")), key=str)
    files.append(made)  # last: the others belong to it
    size = 0
    for file in [inner for path in files for inner in (path.iterdir() if path.is_dir() else (path,))]:
        flush(file)
        size += file.stat().st_size
    if target.is_folder:
        flush(made)
        _exchange(made, output)
        return [output.name], size
    _move(files, output.parent)
    # Only now: until the rename the old file needed them. Under the lock: the next export brings its own.
    for stale in target.companions(output):
        if stale.name not in {path.name for path in files}:
            with suppress(OSError):
                stale.unlink()
    return [path.name for path in reversed(files)], size


def _exchange(made: Path, output: Path) -> None:
    """Rename a folder into place; the one that was there is deleted with the workshop."""
    old = made.parent / _OLD
    if output.exists():
        os.rename(output, old)
    try:
        os.rename(made, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    flush(output.parent)


def _move(files: list[Path], folder: Path) -> None:
    """Rename the files into the folder, the last one, on which the others depend, at the end; on an error, none."""
    moved: list[Path] = []
    try:
        for path in files:
            target = folder / path.name
            if not target.exists():
                moved.append(target)
            os.replace(path, target)
    except OSError:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    flush(folder)


@contextmanager
def workshop(output: Path, target: Format) -> Iterator[Path]:
    """A folder beside `output` to work in, locked meanwhile and removed at the end."""
    folder = output.with_name(output.name + ".partial")
    lock = folder / ".lock"
    try:
        target.require_replaceable(output)
        if not output.parent.is_dir():
            raise UserError(f"cannot write {output}: there is no folder {output.parent}")
        if folder.exists() and not lock.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} is needed as a temporary folder and was not made by dqrm export; move it")
        folder.mkdir(exist_ok=True)
        with exclusive(lock, f"another process is exporting to {output}; wait for it, or name another output"):
            try:
                _empty(folder, lock)
                yield folder
            finally:
                with suppress(OSError):
                    # The lock is removed last: it identifies a folder that a killed export left behind.
                    _empty(folder, lock)
                    shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; an existing file is unchanged") from None


def _empty(folder: Path, lock: Path) -> None:
    for path in folder.iterdir():
        if path != lock:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
