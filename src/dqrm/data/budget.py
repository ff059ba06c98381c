"""How much memory a preparation may use: what `--memory` says, and what follows from it. Imports no polars."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dqrm.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Measured: Python, polars and its threads, and the blocks of text that are read, parsed and staged at once.
FIXED = 650_000_000
_LEAST = 700_000_000
# Measured: memory per byte of a chunk, in the one that is staged, the next one and the copies that both need.
_PER_CHUNK_BYTE = 8
# While two runs of counted keys are merged: both, the keys of both in order, where each begins, and the result.
_PER_MERGED_KEY = 44
# Of that, what is free once they are merged, and still the process's.
_FREED_PER_MERGED_KEY = 32
# While a vocabulary is ordered and written, beside its counts.
_PER_WRITTEN_KEY = 52
_STATM = Path("/proc/self/statm")


class OverBudget(UserError):
    """A vocabulary needs more memory than there may be. What is done is kept, for the same command with more."""


def parse(text: str) -> int:
    """A size in bytes: '2GB' and '512MB' count in thousands, '1.5GiB' in 1024s; 'G' alone is 'GB'.

    Raises:
        ValueError: it cannot be read, or is too small to work with.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or text.strip()[-1].isdigit():
        raise ValueError(f"memory is '{text}', expected a number and its unit, as in 2GB, 800MB or 1.5GiB")
    number, power, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** _POWERS[power.lower()])
    if size < _LEAST:
        raise ValueError(
            f"memory is '{text}', expected at least {_LEAST // 10**6}MB: Python, polars and some blocks of lines take "
            f"{FIXED // 10**6}MB"
        )
    return size


@dataclass(frozen=True)
class Budget:
    """The memory of a preparation.

    given: as the user wrote it; None: without a limit.
    """

    given: str | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.given is not None

    @property
    def chunk_bytes(self) -> int | None:
        """Bytes of typed rows after which a chunk is full, however few rows they are; None: only rows count."""
        return None if self.given is None else max(1 << 20, (parse(self.given) - FIXED) // _PER_CHUNK_BYTE)

    def require_merge(self, keys: int, key_bytes: int, what: str) -> None:
        """That runs of so many keys, of so many bytes in all beyond 4 each, can be merged.

        Raises:
            OverBudget: not in the memory that is left.
        """
        self._require(keys, _PER_MERGED_KEY * keys + 3 * key_bytes, what)

    def require_write(self, keys: int, key_bytes: int, merged: int, what: str) -> None:
        """That a vocabulary of so many keys, which are in memory, can be ordered and written; `merged` keys were in the
        runs that were merged last, whose memory is used again.

        Raises:
            OverBudget: not in the memory that is left.
        """
        more = _PER_WRITTEN_KEY * keys - _FREED_PER_MERGED_KEY * merged
        self._require(keys, max(0, more) + 3 * key_bytes, what)

    def _require(self, keys: int, more: int, what: str) -> None:
        if self.given is None or (used := resident()) + more <= parse(self.given):
            return
        raise OverBudget(
            f"{what} has too many ids for memory {self.given}: {used / 1e9:.2f} GB are in use, and to go on with "
            f"{keys:,} ids takes {more / 1e9:.2f} GB more; run the same command with --memory "
            f"{_above(used + more)}, which resumes, or prepare with --vocabulary hash"
        )


def _above(size: int) -> str:
    """A size with a unit, a quarter larger than needed: later columns may have more ids, and rounded up."""
    return f"{math.ceil(size * 1.25 / 10**8) / 10:.1f}GB"


def resident() -> int:
    """Resident memory of this process in bytes; where the system does not say, what is always needed."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return FIXED
