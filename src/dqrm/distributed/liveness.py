"""Heartbeats, to determine which of several processes died or hangs."""

import threading
import time
from contextlib import suppress
from typing import Any

_BEAT = 1.0
SILENCE = 4.0
"""Seconds without a heartbeat after which a rank counts as dead."""


class Liveness:
    """Every second each rank stores its heartbeat in the launch's store: (beat count, collectives entered).

    Attributes:
        entered: collectives that this rank has entered; each caller increments it.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size, self.entered = store, rank, size, 0
        self._ended = threading.Event()
        self._heard: str | None = None  # cause of the ranks' end
        threading.Thread(target=self._beat, daemon=True, name="dqrm-heartbeat").start()

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._ended.set()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT if count else 0):
            count += 1
            with suppress(RuntimeError):  # the store is gone: the rank that waits for an exchange reports it
                self._store.set(f"beat/{self._rank}", f"{count} {self.entered}")
                if self._heard is None and self._store.check(["cause"]):  # before the store may be gone
                    self._heard = self._store.get("cause").decode()

    def _beats(self) -> list[tuple[int, int]]:
        beats = []
        for rank in range(self._size):
            key = f"beat/{rank}"
            words = self._store.get(key).decode().split() if self._store.check([key]) else ["0", "0"]
            beats.append((int(words[0]), int(words[1])))
        return beats

    def report(self, message: str) -> None:
        """Store the cause of this rank's end for the other ranks; the first one is kept."""
        with suppress(RuntimeError):
            self._store.compare_set("cause", "", message)

    def cause(self, error: Exception, seconds: float) -> str:
        """One sentence on the cause of the end, the same on all ranks that can still read it."""
        try:
            if not self._store.check(["cause"]):
                suspect = self._suspect(seconds)
                if suspect:
                    self.report(suspect)
            if self._store.check(["cause"]):
                return str(self._store.get("cause").decode())
        except RuntimeError:
            return self._heard or "rank 0, or whatever started the ranks, ended: the ranks' store is gone"
        reason = str(error).splitlines()[0].removesuffix(".") if str(error) else type(error).__name__
        return f"the exchange between the ranks failed, and it could not be determined which rank caused it: {reason}"

    def _suspect(self, seconds: float) -> str | None:
        before, entered = self._beats(), self.entered
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline and not self._store.check(["cause"]):
            time.sleep(0.1)
        if self._store.check(["cause"]):
            return None
        after = self._beats()
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank in others:
            if after[rank][0] == before[rank][0]:
                return f"rank {rank} died or was stopped: no heartbeat for {SILENCE:.0f} seconds"
        slowest = min(others, key=lambda rank: after[rank][1])
        if after[slowest][1] < entered:
            return f"rank {slowest} timed out after {seconds:.0f} seconds: it hangs, its heartbeat is alive"
        return None
