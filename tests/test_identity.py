"""One rule for "is this still the same file": for sources of a log, checksums, and files that stay open."""

import os
import shutil
from pathlib import Path

import pytest

from dqrm import UserError, checksums
from dqrm.artifact.watch import Watch
from dqrm.data import listing
from dqrm.identity import FileIdentity


def later(path: Path) -> None:
    """The clock of a file system ticks some milliseconds apart; tests do not wait for it."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def written(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"X")
    later(path)


def written_and_set_back(path: Path) -> None:
    """As `cp -p` does; only the time of the change tells, which nobody can set."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with path.open("r+b") as file:
            file.write(b"X")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """By a file that was there before: of a new one, the old number could be used again."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


def linked(path: Path) -> None:
    """As a snapshot by `cp -al` does."""
    path.with_name("link").hardlink_to(path)


def renamed_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.with_name("moved").rename(path.parent)


def touched_by_nobody(path: Path) -> None:
    path.read_bytes()


WRITES = (grown, written, written_and_set_back)
NO_WRITES = (linked, renamed_folder, touched_by_nobody)


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "log.txt").write_bytes(b"some bytes")
    return folder / "log.txt"


@pytest.mark.parametrize("change", [*WRITES, replaced, *NO_WRITES], ids=lambda change: change.__name__)
def test_of_a_name(path, change, monkeypatch):
    """Identity, the source of a log, and the checksum that is not computed twice agree."""
    before, (source,) = FileIdentity.of(path.stat()), listing.resolve([path])
    known = checksums.list_files(path.parent, ["log.txt"])["log.txt"]["sha256"]
    monkeypatch.setitem(checksums._hashed, before.file, (before, "of before"))
    change(path)
    unchanged = before.unchanged(FileIdentity.of(path.stat()))
    assert unchanged == (change in NO_WRITES)
    found = checksums.list_files(path.parent, ["log.txt"])["log.txt"]["sha256"]
    if unchanged:
        source.require_unchanged()
        assert found == "of before"
    else:
        with pytest.raises(UserError, match="changed while it was read"):
            source.require_unchanged()
        assert (found == known) == (change is replaced)


@pytest.mark.parametrize("change", [*WRITES, replaced, *NO_WRITES], ids=lambda change: change.__name__)
def test_of_an_open_file(path, change):
    """That another file takes the name of an open one is no write to it."""
    watch = Watch(path.open("rb"), path, "the test", "open it again")
    change(path)
    if change in WRITES:
        with pytest.raises(UserError, match="changed in place under the test; open it again"):
            watch.check()
    else:
        watch.check()
