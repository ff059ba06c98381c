"""The artifact as one of the export formats; its content is described in `dqrm.artifact.file`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.export.formats.base import Format, beside

if TYPE_CHECKING:
    from dqrm.artifact.file import Artifact
    from dqrm.export.formats.base import Score
    from dqrm.models.base import ClickModel


class DqrmFormat(Format):
    """`.dqrm`: a safetensors file of codes, scales, columns and vocabularies."""

    suffix = ".dqrm"
    summary = "the artifact, for `dqrm predict` and dqrm.load"
    is_artifact = True
    has_vocabularies = True

    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        """Nothing to do: an export writes the artifact first."""

    def open(self, path: Path, threads: int = 0) -> Score:
        from dqrm.artifact.file import Artifact
        from dqrm.export.check import logits_of

        return partial(logits_of, Artifact.open(path).model())

    def companions(self, path: Path) -> list[Path]:
        """Vocabularies in a second file."""
        return beside(path, r"-vocabulary-[0-9a-f]{8}")

    def sizes(self, opened: Artifact, path: Path) -> dict[str, int]:
        return opened.sizes()
