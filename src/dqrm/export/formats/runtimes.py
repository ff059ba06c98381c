"""Running an exported file with the runtime it was made for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.data.batches import Batch
from dqrm.errors import UserError
from dqrm.export.base_rate import BaseRate
from dqrm.export.formats.program import MAX_BATCH, MAX_VALUES


def open_runtime(path: Path, threads: int = 0) -> Callable[[Batch], Tensor]:
    """A function from a batch to logits float32 [B], running a .onnx, .pt2 or .pte file.

    Only for files of one's own: torch.export.load unpickles, so a .pt2 from a stranger can run code.

    Args:
        threads: of the runtime; 0: its default. Torch's are the process's own, ExecuTorch's portable kernels use one.

    Raises:
        UserError: no such file, its runtime is not installed, or the file is damaged.
    """
    opener = {".onnx": _open_onnx, ".pt2": _open_pt2, ".pte": _open_pte}.get(path.suffix)
    if opener is None:
        raise UserError(f"{path} should end in .onnx, .pt2 or .pte, which says what runs it")
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file")
    return opener(path, threads)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} cannot be loaded: damaged, incomplete, or made for another version of its runtime")


def onnx_content(path: Path) -> dict[str, Any]:
    """What a .onnx file carries of the header of the artifact that it was written from.

    Raises:
        UserError: it carries none, is damaged, or ONNX Runtime is not installed.
    """
    try:
        found: dict[str, Any] = json.loads(_session(path, 1).get_modelmeta().custom_metadata_map["dqrm"])
        _ = found["provenance"]["data"]["fingerprint"][:16], BaseRate.of(found)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} does not say where it comes from, expected a file that `dqrm export` wrote") from None
    return found


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("running .onnx needs the extra dqrm[onnx]: pip install 'dqrm[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # its own classes of errors, which differ between versions
        raise _damaged(path) from None


def _open_onnx(path: Path, threads: int) -> Callable[[Batch], Tensor]:
    session = _session(path, threads)
    known = {given.name for given in session.get_inputs()}

    def score(batch: Batch) -> Tensor:
        # By numpy: torch's threads, once woken, would go on spinning beside the runtime's own.
        feeds = {"dense": batch.dense.numpy(), "ids": batch.ids.numpy().astype(np.int64)}
        for number, (values, offsets) in enumerate(batch.bags):
            feeds[f"values_{number}"] = values.numpy().astype(np.int64)
            feeds[f"offsets_{number}"] = offsets.numpy().astype(np.int64)
        found = session.run(["logit"], {name: given for name, given in feeds.items() if name in known})
        return torch.from_numpy(found[0])

    return score


def _flat(batch: Batch) -> list[Tensor]:
    """The arguments of an exported program."""
    bags = (part.long() for bag in batch.bags for part in bag)
    given = [batch.dense, batch.ids.long(), *bags]
    # Anew where there is nothing in it: ExecuTorch ends the process over strides of 0, which numpy's empty arrays have.
    return [part.contiguous() if part.numel() else torch.empty(part.shape, dtype=part.dtype) for part in given]


def _open_pt2(path: Path, threads: int) -> Callable[[Batch], Tensor]:
    try:
        module = torch.export.load(path).module()
    except Exception:
        raise _damaged(path) from None

    def score(batch: Batch) -> Tensor:
        if len(batch) == 0:
            return torch.empty(0)
        with torch.inference_mode():
            found: Tensor = module(*_flat(batch))
        return found

    return score


def _open_pte(path: Path, threads: int) -> Callable[[Batch], Tensor]:
    try:
        from executorch.runtime import Runtime
    except ImportError:
        raise UserError("running .pte needs the extra dqrm[executorch]: pip install 'dqrm[executorch]'") from None
    try:
        method = Runtime.get().load_program(path).load_method("forward")
    except Exception:
        raise _damaged(path) from None
    if method is None:
        raise _damaged(path)

    def score(batch: Batch) -> Tensor:
        found = [method.execute(_flat(piece))[0].clone() for piece in _pieces(batch)]
        return torch.cat(found) if found else torch.empty(0)

    return score


def _pieces(batch: Batch) -> list[Batch]:
    """The batch in parts that a .pte can take.

    Raises:
        UserError: a single sample has more ids than fit.
    """
    pieces, at = [], 0
    # For each multi-valued table, where each sample's ids begin, and where the last one's end.
    bounds = [torch.cat([offsets.long(), torch.tensor([len(values)])]) for values, offsets in batch.bags]
    while at < len(batch):
        end = min(at + MAX_BATCH, len(batch))
        for bound in bounds:
            end = min(end, int(torch.searchsorted(bound, int(bound[at]) + MAX_VALUES, right=True)) - 1)
        if end <= at:
            raise UserError(f"sample {at} has more than {MAX_VALUES} ids in one column, the most that a .pte takes")
        bags = tuple(
            (values[bound[at] : bound[end]], bound[at:end] - bound[at])
            for (values, _), bound in zip(batch.bags, bounds)
        )
        pieces.append(Batch(batch.dense[at:end], batch.ids[at:end], bags, batch.labels[at:end]))
        at = end
    return pieces
