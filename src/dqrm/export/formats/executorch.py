"""ExecuTorch: the program that `program.exported` traces, with packed tables; what XNNPACK can compute is left to it.

XNNPACK multiplies by constant float32 weights, which it packs for the processor when the program is loaded. So the MLP,
1 % of a model, is stored in float32: unpacked at each call it took most of the time, and XNNPACK's products of 8-bit
weights quantize their inputs too, which would move probabilities. Tables are looked up by portable kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dqrm.errors import UserError
from dqrm.export.formats.base import Format, damaged

if TYPE_CHECKING:
    from torch import Tensor

    from dqrm.data.batches import Batch
    from dqrm.export.formats.base import Score
    from dqrm.models.base import ClickModel

MAX_BATCH = 8192
"""Samples that a .pte takes at once: ExecuTorch plans its memory for the largest batch."""
MAX_VALUES = 65_536
"""Ids of a multi-valued table that a .pte takes at once."""


class ExecuTorchFormat(Format):
    """`.pte`: takes 1 to MAX_BATCH samples, and up to MAX_VALUES ids of each multi-valued table."""

    suffix = ".pte"
    summary = "an ExecuTorch program, for phones and other devices"
    extra = "executorch"
    not_evaluated = "a .pte does not record which data its model was trained on"

    def write(self, model: ClickModel, path: Path, metadata: Mapping[str, str]) -> None:
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        except ImportError:
            raise self.missing("writing") from None
        from dqrm.export.formats.program import exported

        program = exported(model, MAX_BATCH, MAX_VALUES, float_mlp=True)
        # The check of the intermediate form refuses operators that portable kernels have.
        config = EdgeCompileConfig(_check_ir_validity=False)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        with path.open("wb") as file:
            edge.to_executorch().write_to_file(file)

    def open(self, path: Path, threads: int = 0) -> Score:
        try:
            from executorch.runtime import Runtime
        except ImportError:
            raise self.missing("running") from None
        import torch

        from dqrm.export.formats.program import arguments

        try:
            method = Runtime.get().load_program(path).load_method("forward")
        except Exception:
            raise damaged(path) from None
        if method is None:
            raise damaged(path)

        def score(batch: Batch) -> Tensor:
            logits = [method.execute(arguments(piece))[0].clone() for piece in pieces(batch)]
            return torch.cat(logits) if logits else torch.empty(0)

        return score


def pieces(batch: Batch) -> list[Batch]:
    """The batch in parts that a .pte can take.

    Raises:
        UserError: a single sample has more ids than fit.
    """
    import torch

    from dqrm.data.batches import Batch

    parts, at = [], 0
    # For each multi-valued table, the offsets of the samples' ids, and the end of the last one's.
    bounds = [torch.cat([offsets.long(), torch.tensor([len(values)])]) for values, offsets in batch.bags]
    while at < len(batch):
        end = min(at + MAX_BATCH, len(batch))
        for bound in bounds:
            end = min(end, int(torch.searchsorted(bound, int(bound[at]) + MAX_VALUES, right=True)) - 1)
        if end <= at:
            raise UserError(f"sample {at} has more than {MAX_VALUES} ids in one column, the maximum of a .pte")
        bags = tuple(
            (values[bound[at] : bound[end]], bound[at:end] - bound[at])
            for (values, _), bound in zip(batch.bags, bounds)
        )
        parts.append(Batch(batch.dense[at:end], batch.ids[at:end], bags, batch.labels[at:end]))
        at = end
    return parts
