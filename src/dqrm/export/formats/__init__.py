"""The file formats that `dqrm export` writes, by suffix; the help and all errors that name them read this register."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.errors import UserError
from dqrm.export.formats.base import FOLDER, Format
from dqrm.export.formats.dqrm import DqrmFormat
from dqrm.export.formats.executorch import ExecuTorchFormat
from dqrm.export.formats.onnx import OnnxFormat
from dqrm.export.formats.torch_export import TorchExportFormat
from dqrm.export.formats.web import WebFormat

if TYPE_CHECKING:
    from dqrm.export.formats.base import Score

FORMATS: dict[str, Format] = {}


def register(new: Format) -> None:
    """Add a format, or replace that of the same suffix."""
    FORMATS[new.suffix] = new


for _format in (DqrmFormat(), OnnxFormat(), TorchExportFormat(), ExecuTorchFormat(), WebFormat()):
    register(_format)


def formats() -> dict[str, Format]:
    """All formats by suffix: the built-in ones, registered ones, and those of installed packages.

    Raises:
        UserError: one of them cannot be imported.
    """
    _add_installed()
    return FORMATS


@cache
def _add_installed() -> None:
    from importlib.metadata import entry_points

    for entry in entry_points(group="dqrm.formats"):
        try:
            register(entry.load()())
        except Exception as error:
            raise UserError(f"the export format '{entry.name}' ({entry.value}) cannot be loaded: {error}") from None


def format_of(path: str | Path, purpose: str = "what to write") -> Format:
    """The format of a file, by its suffix, or of a folder: one that exists, or a path that ends in a slash.

    Args:
        purpose: what the suffix selects, for the error.

    Raises:
        UserError: no format has this suffix.
    """
    known, suffix = formats(), Path(path).suffix
    if str(path).endswith(FOLDER) or (suffix not in known and Path(path).is_dir()):
        suffix = FOLDER
    if suffix not in known:
        raise UserError(f"{path} should end in {either(known)}, which says {purpose}")
    return known[suffix]


def either(names: dict[str, Format] | list[str]) -> str:
    """a, b or c"""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def score_file(path: Path, threads: int = 0) -> Score:
    """A function from a batch to logits float32 [B], running an exported file of any format.

    Only for trusted files: torch.export.load unpickles, so a .pt2 from a stranger can run code.

    Args:
        threads: of the runtime; 0: its default. Torch's are per process; ExecuTorch's portable kernels use one.

    Raises:
        UserError: no such file, its runtime is not installed, or the file is damaged.
    """
    runs = format_of(path, "what runs it")
    if not (path.is_dir() if runs.is_folder else path.is_file()):
        raise UserError(f"cannot read {path}: no such file")
    return runs.open(path, threads)
