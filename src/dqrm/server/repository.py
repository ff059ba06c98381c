"""The served models by name, and their reload: a new version is opened beside the old one and takes its place at once.

A request keeps the version that it was accepted with, so no answer is of two versions and none is lost.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dqrm.errors import UserError
from dqrm.identity import FileIdentity
from dqrm.options import did_you_mean
from dqrm.server.config import ServeConfig
from dqrm.server.errors import Refusal
from dqrm.server.version import Version

Tell = Callable[[str, dict[str, Any]], None]
"""Told of an event: its name and what belongs to it."""


def named_paths(given: Iterable[str]) -> dict[str, Path]:
    """The files of NAME=FILE or FILE, whose name is then that of the file without its suffix.

    Raises:
        UserError: two models of one name, or a name that cannot be part of an address.
    """
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = Path(text).stem, text
        if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
            raise UserError(f"model {text}: got the name '{name}', expected letters, digits, '.', '_' and '-'; "
                            "name it as NAME=FILE")  # fmt: skip
        if name in paths:
            raise UserError(f"{paths[name]} and {path} are both named '{name}'; name one as NAME=FILE")
        paths[name] = Path(path)
    return paths


class Repository:
    """The models of a server.

    Args:
        paths: by name. tell: told of reloads.

    Raises:
        UserError: a model cannot be opened.
    """

    def __init__(self, paths: dict[str, Path], config: ServeConfig, tell: Tell) -> None:
        if config.data is not None and len(paths) > 1:
            raise UserError(f"--data {config.data} is for one model; {len(paths)} are given")
        self._config, self._tell = config, tell
        self.versions = {name: Version.open(name, path, config) for name, path in paths.items()}
        self._loader = ThreadPoolExecutor(1, "dqrm-reload")
        self._reloading = asyncio.Lock()
        # Of a file that could not be loaded: it is not tried again before it changes.
        self._refused: dict[str, FileIdentity] = {}
        self.draining = False

    def get(self, name: str, version: str | None = None) -> Version:
        """The current version of a model.

        Raises:
            Refusal: there is no such model, or the given version is not the current one.
        """
        found = self.versions.get(name)
        if found is None:
            raise Refusal(404, f"there is no model '{name[:80]}'{did_you_mean(name[:80], self.versions)}")
        if version is not None and version != found.id:
            raise Refusal(404, f"model '{name}' has version {found.id}, not '{version[:80]}'")
        return found

    def only(self) -> Version:
        """The model, where there is one.

        Raises:
            Refusal: there are several.
        """
        if len(self.versions) > 1:
            raise Refusal(400, f"{len(self.versions)} models are served, expected one of "
                               f"{', '.join(f'/score/{name}' for name in self.versions)}")  # fmt: skip
        return next(iter(self.versions.values()))

    @property
    def ready(self) -> bool:
        """Whether requests are wanted, and every model can score."""
        return not self.draining and all(version.failed is None for version in self.versions.values())

    async def reload(self, changed_only: bool = True) -> None:
        """Load the files again, those that changed or all. A model whose file cannot be loaded stays as it is."""
        async with self._reloading:
            for name, current in self.versions.items():
                path = current.opened.path
                now = _identity(path)
                if changed_only and (now is None or now == self._refused.get(name) or now == current.identity):
                    continue
                try:
                    loop = asyncio.get_running_loop()
                    new = await loop.run_in_executor(self._loader, Version.open, name, path, self._config)
                except Exception as error:  # whatever it is, the old version goes on
                    if now is not None:
                        self._refused[name] = now
                    why = str(error) if isinstance(error, (UserError, OSError)) else type(error).__name__
                    self._tell("reload failed", {"model": name, "version": current.id, "error": why})
                    continue
                self._refused.pop(name, None)
                self.versions[name] = new
                self._tell("reloaded", {"model": name, "version": new.id, "before": current.id})

    async def watch(self, seconds: float) -> None:
        """Reload what changed, every so many seconds."""
        while True:
            await asyncio.sleep(seconds)
            await self.reload()

    def close(self) -> None:
        """End the loading thread."""
        self._loader.shutdown()


def _identity(path: Path) -> FileIdentity | None:
    """None where there is no file just now."""
    try:
        return FileIdentity.of(os.stat(path))
    except OSError:
        return None
