"""A DLRM as a program of torch.export (.pt2) or ExecuTorch (.pte), on packed codes.

Both take (dense, ids, values_0, offsets_0, values_1, ...), all but dense int64, and give logits float32 [B].
"""

import inspect
import io
import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dqrm.errors import UserError
from dqrm.export.formats.traceable import TraceableDLRM
from dqrm.models.dlrm import DLRM

MAX_BATCH = 8192
"""Samples that a .pte takes at once: ExecuTorch plans its memory for the largest batch."""
MAX_VALUES = 65_536
"""Ids of a multi-valued table that a .pte takes at once."""


def write_pt2(model: DLRM, path: Path) -> None:
    """Write a converted DLRM as a torch.export program; any number of samples and ids.

    Raises:
        ValueError: the model is not converted.
        OSError: the file cannot be written.
    """
    program = _exported(model, None, None)
    partial = path.with_name(path.name + ".partial")

    def save() -> None:
        with partial.open("wb") as file:
            sink = _Sink(file)
            torch.export.save(program, sink)
            if sink.failed:
                raise sink.failed

    _commit(save, partial, path)


def write_pte(model: DLRM, path: Path) -> None:
    """Write a converted DLRM as an ExecuTorch program on portable kernels, for 1 to MAX_BATCH samples.

    Raises:
        UserError: ExecuTorch is missing.
        ValueError: the model is not converted.
        OSError: the file cannot be written.
    """
    try:
        from executorch.exir import EdgeCompileConfig, to_edge
    except ImportError:
        raise UserError("writing .pte needs the extra dqrm[executorch]: pip install 'dqrm[executorch]'") from None
    edge = to_edge(_exported(model, MAX_BATCH, MAX_VALUES), compile_config=EdgeCompileConfig(_check_ir_validity=False))
    made = edge.to_executorch()
    partial = path.with_name(path.name + ".partial")

    def write() -> None:
        with open(partial, "wb") as file:
            made.write_to_file(file)

    _commit(write, partial, path)


def _exported(model: DLRM, max_batch: int | None, max_values: int | None) -> Any:
    served = TraceableDLRM(model)
    single, samples, length = served.tables.num_single, 4, 7
    multi = len(served.tables.table_rows) - single
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    arguments: list[Tensor] = [torch.zeros(samples, model.num_dense), torch.zeros(samples, single, dtype=torch.int64)]
    dynamic: list[dict[int, Any]] = [{0: batch}, {0: batch}]
    names = ["dense", "ids"]
    for number in range(multi):
        arguments += [torch.zeros(length, dtype=torch.int64), torch.zeros(samples, dtype=torch.int64)]
        dynamic += [{0: torch.export.Dim(f"n_{number}", min=0, max=max_values)}, {0: batch}]
        names += [f"values_{number}", f"offsets_{number}"]
    _name_arguments(served, names)
    with torch.no_grad():
        return torch.export.export(served, tuple(arguments), dynamic_shapes=tuple(dynamic), strict=False)


def _name_arguments(module: nn.Module, names: list[str]) -> None:
    """Make the module's forward say that it takes arguments of these names.

    torch.export takes its names from there. With *bags it names the arguments bags_0, bags_1, ..., but the guards on
    their sizes speak of bags[0], bags[1], ...; torch 2.9 then cannot run the program that it loads (NameError: L).
    """
    forward = module.forward

    def named(*given: Tensor) -> Any:
        return forward(*given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    module.forward = named


class _Sink(io.BytesIO):
    """Passes writes on to a file and keeps the first error for later: torch's writer would end the process."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                self.failed = error
        return len(data)


def _commit(write: Any, partial: Path, path: Path) -> None:
    """Write the file `partial`, then give it its name; nothing of it stays where that fails."""
    try:
        write()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
