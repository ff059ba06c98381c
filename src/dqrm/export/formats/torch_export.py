"""torch.export: the program that `program.exported` traces, in torch's own file format."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dqrm.export.formats.base import Format, damaged

if TYPE_CHECKING:
    from torch import Tensor

    from dqrm.data.batches import Batch
    from dqrm.export.formats.base import Score
    from dqrm.models.base import ClickModel


class TorchExportFormat(Format):
    """`.pt2`: takes 1 or more samples, and any number of ids."""

    suffix = ".pt2"
    summary = "a torch.export program, for torch.export.load"
    not_evaluated = "torch.export.load can run code from a .pt2, so dqrm does not open it"

    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        import torch

        from dqrm.export.formats.program import exported

        program = exported(model)
        with path.open("wb") as file:
            sink = _Sink(file)
            torch.export.save(program, sink)
        if sink.failed:
            raise sink.failed

    def open(self, path: Path, threads: int = 0) -> Score:
        import torch

        from dqrm.export.formats.program import arguments

        try:
            module = torch.export.load(path).module()
        except Exception:
            raise damaged(path) from None

        def score(batch: Batch) -> Tensor:
            if len(batch) == 0:
                return torch.empty(0)
            with torch.inference_mode():
                logits: Tensor = module(*arguments(batch))
            return logits

        return score


class _Sink(io.BytesIO):
    """Forwards writes to a file and keeps the first error for later: torch's writer would end the process."""

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
