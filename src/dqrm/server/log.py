"""Lines of JSON, written by a thread of their own: whoever reads them slowly does not hold up requests."""

import json
import threading
import time
from collections import deque
from typing import Any, TextIO

# Lines that wait, at most; further ones are counted and left out.
_MOST = 10_000
_SECONDS = 0.2


class JsonLines:
    """A stream of JSON objects, one per line.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[dict[str, Any]] = deque()
        self._dropped, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._work, name="dqrm-log", daemon=True)
        self._thread.start()

    def write(self, **fields: Any) -> None:
        """Add a line with the time and these fields."""
        if len(self._waiting) >= _MOST:
            self._dropped += 1
            return
        self._waiting.append({"time": time.time(), **fields})

    def close(self) -> None:
        """Write what waits; give up on a reader that takes nothing."""
        self._ended.set()
        self._thread.join(timeout=2)

    def _work(self) -> None:
        while not self._ended.wait(_SECONDS):
            if not self._flush():
                return
        self._flush()

    def _flush(self) -> bool:
        lines = []
        while self._waiting:
            fields = self._waiting.popleft()
            at = fields["time"]
            fields["time"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
            lines.append(json.dumps(fields))
        if self._dropped:
            lines.append(json.dumps({"event": "lines left out", "lines": self._dropped}))
            self._dropped = 0
        try:
            if lines:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            return False
        return True
