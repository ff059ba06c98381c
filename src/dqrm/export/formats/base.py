"""The interface of an export format."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dqrm.errors import UserError
from dqrm.files import require_replaceable

if TYPE_CHECKING:  # `dqrm export --help` lists the formats, and should not import torch
    from torch import Tensor

    from dqrm.artifact.file import Artifact
    from dqrm.data.batches import Batch
    from dqrm.export.config import ExportConfig
    from dqrm.models.base import ClickModel
    from dqrm.training.environment import Progress

    Score = Callable[[Batch], Tensor]


FOLDER = "/"
"""What stands in place of a suffix for a format that is a folder."""


class Format(ABC):
    """A kind of file that a model is exported to: how it is written, opened and described.

    To add one, write a subclass in a file of its own and a line in `dqrm.export.formats`; another package calls
    `register`, or names the class as an entry point of the group `dqrm.formats`. Formats are imported for the help of
    the command line: slow imports belong in the methods.

    Attributes:
        suffix: of its files, with the dot; FOLDER for one that is a folder.
        summary: a description and what reads it, for the help.
        extra: the extra of dqrm that is needed to write or open it; None: none.
        not_evaluated: why `dqrm eval` and `dqrm predict` do not take it; None: they do.
        is_artifact: whether it is the artifact, which each export writes first: packed weights, vocabularies, a header.
        is_folder: whether it is a folder rather than a file.
        has_vocabularies: whether it holds the vocabularies, too.
    """

    suffix: ClassVar[str]
    summary: ClassVar[str]
    extra: ClassVar[str | None] = None
    not_evaluated: ClassVar[str | None] = None
    is_artifact: ClassVar[bool] = False
    is_folder: ClassVar[bool] = False
    has_vocabularies: ClassVar[bool] = False

    @abstractmethod
    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        """Write a model.

        Args:
            model: with packed layers, in eval mode, as `Artifact.model` returns it.
            path: the file, in a temporary folder of the export. Afterwards all files in it whose names do not begin
                with a dot are moved to the folder above it.
            metadata: what to store with it, as text: `content` reads it again.

        Raises:
            UserError: the extra is missing, or the format cannot express a part of the model.
            OSError: the file cannot be written.
        """

    def export(
        self,
        opened: Artifact,
        model: ClickModel,
        path: Path,
        metadata: Mapping[str, str],
        config: ExportConfig,
        progress: Progress,
    ) -> None:
        """Write a model of which there is an artifact: `write`, unless the format needs more of it than the model.

        Args:
            opened: the artifact. config: what the user asked for. The others: as of `write`.

        Raises:
            UserError, OSError: as `write`.
        """
        self.write(model, path, metadata)

    def require_replaceable(self, output: Path) -> None:
        """Raise UserError unless what is written may take the place of `output`."""
        require_replaceable(output)

    def notes(self, path: Path) -> list[str]:
        """Sentences for whoever exported `path`."""
        return []

    @abstractmethod
    def open(self, path: Path, threads: int = 0) -> Score:
        """A function from a batch to logits float32 [B] that runs the file.

        Args:
            threads: CPU threads of the runtime; 0: its default.

        Raises:
            UserError: the file is damaged, or the extra is missing.
        """

    def content(self, path: Path) -> dict[str, Any]:
        """The part of the artifact's header that the file carries; not called for formats that are not evaluated.

        Raises:
            UserError: it carries none, or is damaged.
        """
        raise UserError(f"{path} does not record its origin, expected a file that `dqrm export` wrote")

    def companions(self, path: Path) -> list[Path]:
        """Files beside `path` that belong to it, or to the file that it replaced."""
        return []

    def sizes(self, opened: Artifact, path: Path) -> dict[str, int]:
        """Bytes of each part of the file that was written from an artifact; 'file' is all of it."""
        from dqrm.artifact.file import WEIGHTS

        parts = opened.sizes()
        weights = {name: parts[name] for name in WEIGHTS}
        total = sum(file.stat().st_size for file in (path, *self.companions(path)))
        return {**weights, "graph and rest": total - sum(weights.values()), "file": total}

    def missing(self, doing: str) -> UserError:
        """The error for a missing extra. doing: "writing" or "running"."""
        extra = f"dqrm[{self.extra}]"
        return UserError(f"{doing} {self.suffix} needs the extra {extra}: pip install '{extra}'")


def beside(path: Path, pattern: str) -> list[Path]:
    """The files in the folder of `path` whose names are its own and a match of the regular expression `pattern`."""
    named = re.compile(re.escape(path.name) + pattern)
    return [file for file in path.parent.iterdir() if named.fullmatch(file.name) and file.is_file()]


def damaged(path: Path) -> UserError:
    """The error for a file that its runtime does not load."""
    return UserError(f"{path} cannot be loaded: damaged, incomplete, or made for another version of its runtime")
