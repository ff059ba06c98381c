"""File identity: whether a file is unchanged, for code that reads it more than once or keeps it mapped."""

import os
from typing import IO, NamedTuple


class FileIdentity(NamedTuple):
    """Identity of a file: device, inode, size, time of the last write (`mtime_ns`) and of the last change of any kind
    (`ctime_ns`), and number of links."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    links: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileIdentity":
        """From the result of `os.stat`."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_nlink)

    @classmethod
    def of_open(cls, file: IO[bytes]) -> "FileIdentity":
        """Of an open file, even if its name now belongs to another one."""
        return cls.of(os.fstat(file.fileno()))

    @property
    def file(self) -> tuple[int, int]:
        """(device, inode): constant under writes, equal for all names of one file."""
        return self.device, self.inode

    def unchanged(self, now: "FileIdentity") -> bool:
        """Whether `now` is the same file without a write in between.

        `ctime_ns` also reveals a write whose mtime was set back. It changes with the number of links as well: a file
        that was replaced by a rename lost one, a linked file gained one, and neither is a write.
        """
        return self[:4] == now[:4] and (self.ctime_ns == now.ctime_ns or self.links != now.links)
