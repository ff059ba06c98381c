"""Whether a file is still what it was: one rule for all who read a file more than once, or for long."""

import os
from typing import IO, NamedTuple


class FileIdentity(NamedTuple):
    """By what a file is known to be the same as before: which one it is, its size, when it was last written to
    (`mtime_ns`) or changed in any way (`ctime_ns`), and how many names it has."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    links: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileIdentity":
        """Of what the system says about a file."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_nlink)

    @classmethod
    def of_open(cls, file: IO[bytes]) -> "FileIdentity":
        """Of an open file, whatever has its name by now."""
        return cls.of(os.fstat(file.fileno()))

    @property
    def file(self) -> tuple[int, int]:
        """What stays while it is written to: equal for all names of one file."""
        return self.device, self.inode

    def unchanged(self, now: "FileIdentity") -> bool:
        """Whether `now` is of the same file, and no write lies between.

        The time of the change tells also of a write whose time was set back. It moves with the number of names, too: a
        file that was replaced by a renamed one lost one, one that was linked gained one, and neither is a write.
        """
        return self[:4] == now[:4] and (self.ctime_ns == now.ctime_ns or self.links != now.links)
