"""A model as a torch.export program on packed codes: the content of .pt2 and .pte files.

It takes (dense, ids, values_0, offsets_0, values_1, ...), all but dense int64, and returns logits float32 [B].
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.data.batches import Batch
from dqrm.export.formats.traceable import flat_model
from dqrm.models.base import ClickModel


def exported(
    model: ClickModel, max_batch: int | None = None, max_values: int | None = None, float_mlp: bool = False
) -> Any:
    """A converted model as a torch.export program, for 1 to `max_batch` samples and up to `max_values` ids of each
    multi-valued table (None: any number).

    Args:
        float_mlp: as of `flat_model`.

    Raises:
        ValueError: the model is not converted.
    """
    served = flat_model(model, float_mlp)
    single, samples, length = served.tables.num_single, 4, 7
    multi = len(served.tables.table_rows) - single
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    examples: list[Tensor] = [torch.zeros(samples, model.num_dense), torch.zeros(samples, single, dtype=torch.int64)]
    dynamic: list[dict[int, Any]] = [{0: batch}, {0: batch}]
    names = ["dense", "ids"]
    for number in range(multi):
        examples += [torch.zeros(length, dtype=torch.int64), torch.zeros(samples, dtype=torch.int64)]
        dynamic += [{0: torch.export.Dim(f"n_{number}", min=0, max=max_values)}, {0: batch}]
        names += [f"values_{number}", f"offsets_{number}"]
    _name_arguments(served, names)
    with torch.no_grad():
        return torch.export.export(served, tuple(examples), dynamic_shapes=tuple(dynamic), strict=False)


def arguments(batch: Batch) -> list[Tensor]:
    """The arguments of an exported program for a batch."""
    bags = (part.long() for bag in batch.bags for part in bag)
    given = [batch.dense, batch.ids.long(), *bags]
    # A new array if it is empty: ExecuTorch ends the process on strides of 0, which numpy's empty arrays have.
    return [part.contiguous() if part.numel() else torch.empty(part.shape, dtype=part.dtype) for part in given]


def _name_arguments(module: nn.Module, names: list[str]) -> None:
    """Declare arguments of these names in the signature of the module's forward.

    torch.export takes its names from there. With *bags it names the arguments bags_0, bags_1, ..., but the guards on
    their sizes refer to bags[0], bags[1], ...; torch 2.9 then cannot run the program that it loads (NameError: L).
    """
    forward = module.forward

    def named(*given: Tensor) -> Any:
        return forward(*given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    module.forward = named
