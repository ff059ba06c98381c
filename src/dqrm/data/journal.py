"""What has been done, a line of JSON for each step that outlasts a kill."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file of such lines. A line that a kill or a power cut has spoiled, and what follows it, does not count.

    Attributes:
        lines: all there are, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        data, sound = path.read_bytes() if path.exists() else b"", 0
        for line in data.splitlines(keepends=True):
            try:
                self.lines.append(json.loads(line) if line.endswith(b"\n") else json.loads(""))
            except ValueError:
                break
            sound += len(line)
        if sound < len(data):
            os.truncate(path, sound)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; returns when it is on disk."""
        with self._path.open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
