"""Checksums of the files that dqrm writes: damaged files are refused before training, evaluation or export.

A folder has one JSON file that lists the size and the SHA-256 of each other file under `FILES`, and its own digest
under `SEAL`. It is written last.
"""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from dqrm.errors import NotVerified, UserError
from dqrm.identity import FileIdentity

FILES, SEAL = "files", "sha256"
Tell = Callable[[str, int, int | None], None]
# Read at once: large enough that hashing is all that costs, small enough for the processor's cache.
_BLOCK = 1 << 20
# What was hashed in this process, by device and inode: a renamed folder holds the same files.
_hashed: dict[tuple[int, int], tuple[FileIdentity, str]] = {}
_told: set[Path] = set()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its own digest."""
    return {**content, SEAL: _own_digest(content)}


def sealed(content: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file is as it was written; also where it was written without checksums.

    Damage to the name of one of the two keys does not make a file look older than it is: the other one gives it away.
    """
    if FILES not in content and SEAL not in content:
        return True
    return FILES in content and content.get(SEAL) == _own_digest(content)


def list_files(folder: Path, names: Iterable[str], tell: Tell | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a folder, as they are listed under `FILES`; reads each once, several at a time.

    Raises:
        OSError: a file cannot be read.
    """
    names = list(names)
    digests = _hash_all([folder / name for name in names], tell)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in zip(names, digests)}


def verify(
    folder: Path, content: Mapping[str, Any], names: Iterable[str], listed_in: str, then: str, tell: Tell | None = None
) -> bool:
    """Compare files of a folder with the list in the content of its JSON file.

    Nothing is hashed twice in one process while it does not change. A folder without checksums passes, with a warning.

    Args:
        names: the files to be used.
        listed_in: the name of the JSON file. then: what the user can do about damage.

    Returns:
        False if there are no checksums to compare with.

    Raises:
        UserError: a file is missing, or its size or content differs; names it.
    """
    listed = content.get(FILES)
    if listed is None:
        if folder.resolve() not in _told:
            _told.add(folder.resolve())
            warnings.warn(
                NotVerified(f"{folder} was written without checksums by an older dqrm: damage to it cannot be found"),
                stacklevel=2,
            )
        return False
    names = list(names)
    for name in names:
        expected = listed.get(name)
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= set(expected):
            raise UserError(f"{folder / listed_in} is damaged: it lists no checksum of {name}; {then}")
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise UserError(f"{folder / name} is missing or cannot be read ({error.strerror}); {then}") from None
        if size != expected["bytes"]:
            raise UserError(f"{folder / name} is damaged: it has {size} bytes, expected {expected['bytes']}; {then}")
    try:
        digests = _hash_all([folder / name for name in names], tell)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from None
    for name, digest in zip(names, digests):
        if digest != listed[name]["sha256"]:
            raise UserError(
                f"{folder / name} is damaged: its SHA-256 begins with {digest[:16]}, expected "
                f"{str(listed[name]['sha256'])[:16]} as listed in {listed_in}; {then}"
            )
    return True


def _own_digest(content: Mapping[str, Any]) -> str:
    """Of the values, however they are written."""
    text = json.dumps({key: value for key, value in content.items() if key != SEAL})
    text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_all(paths: list[Path], tell: Tell | None) -> list[str]:
    """The SHA-256 of each file. In threads: hashing releases the GIL."""
    done, total, stopped = [0], sum(path.stat().st_size for path in paths), threading.Event()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        # The largest first, since they take longest.
        order = sorted(range(len(paths)), key=lambda at: -paths[at].stat().st_size)
        futures: dict[int, Future[str]] = {at: threads.submit(_hash, paths[at], stopped, done) for at in order}
        try:
            waiting: set[Future[str]] = set(futures.values())
            while waiting:
                waiting = wait(waiting, timeout=0.5).not_done
                if tell and waiting:  # no bar for what is done at once
                    tell("computing checksums", min(done[0], total), total)
            return [futures[at].result() for at in range(len(paths))]
        except BaseException:  # Ctrl-C must not wait for gigabytes
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _hash(path: Path, stopped: threading.Event, done: list[int]) -> str:
    with path.open("rb", buffering=0) as file:
        opened = FileIdentity.of_open(file)
        before, known = _hashed.get(opened.file, (None, ""))
        if before is not None and before.unchanged(opened):
            done[0] += opened.size
            return known
        digest, block = hashlib.sha256(), bytearray(_BLOCK)
        while (count := file.readinto(block)) and not stopped.is_set():
            digest.update(memoryview(block)[:count])
            done[0] += count
        if not stopped.is_set() and opened.unchanged(FileIdentity.of_open(file)):
            _hashed[opened.file] = opened, digest.hexdigest()
    return digest.hexdigest()
