"""Checkpoints: folders `checkpoints/step-000000123` with weights in safetensors and state in JSON.

state.json is written last: it lists the size and the SHA-256 of the other files, and has a checksum of its own.

A folder is written under a temporary name, flushed to disk and renamed, so one with the final name is complete. Two are
kept: the newest, from which a run resumes, and the best on validation.
"""

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dqrm import checksums
from dqrm.errors import UserError
from dqrm.files import COUNT, FLAG, NUMBER, OBJECT, TEXT, flush, read_json, require, why_not_written, write_json
from dqrm.quant.storage import storage_of
from dqrm.training.footprint import TableBytes
from dqrm.training.tensor_files import Streamed, read_tensor, save_file, tensors_of

_PREFIX, _PARTIAL = "step-", ".partial"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
EXCHANGE, CALLBACKS = "exchange.safetensors", "callbacks.safetensors"  # only if they have content
STATE = "state.json"
_STEPS = ("count", "flushed")  # of such an optimizer: steps so far, and at the last `catch_up_all`

METRICS = {"rows": COUNT, "*": (NUMBER, None)}
BEST = {"step": COUNT, "epoch": COUNT, "train_loss": NUMBER, "metrics": METRICS}
# Keys that loading a model needs are required here; those that resuming needs, in `state.check_keys`.
_SHAPE = {
    "step": COUNT, "best": (BEST, None), "epoch?": COUNT, "batch?": COUNT, "loss_sum?": NUMBER, "loss_rows?": COUNT,
    "without_better?": COUNT, "rate_factor?": NUMBER, "finished?": FLAG, "metrics_bytes?": COUNT,
    "train_seconds?": NUMBER, "train_rows?": COUNT, "callbacks?": {"*": OBJECT},
    "files?": {"*": {"bytes": COUNT, "sha256": TEXT}},
}  # fmt: skip


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is kept."""
    return folder / f"{_PREFIX}{step:09d}"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, or None."""
    return max(_steps(folder), default=None)


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(_PREFIX + r"(\d{9,})", path.name) for path in folder.glob(f"{_PREFIX}*"))
    return [int(name[1]) for name in names if name]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any],
    keep: set[int],
    more: Mapping[str, Mapping[str, Tensor | Streamed]] | None = None,
) -> None:
    """Write the checkpoint of `step`, then delete all others but those of the steps in `keep`.

    Args:
        more: further tensors by file, which replace any of the same name; a file without any is not written.
    """
    final = checkpoint_path(folder, step)
    if final.exists():  # the same step of the same run: the same content
        return
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    weights = {name: storage_of(weight).memory(weight) for name, weight in model.state_dict().items()}
    own = {WEIGHTS: weights, OPTIMIZER: _optimizer_tensors(optimizers) | _random_state()}
    try:
        partial.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys((*own, *(more or {}))):
            if tensors := {**own.get(name, {}), **(more or {}).get(name, {})}:
                save_file(tensors, partial / name, files)
        write_json(partial / STATE, checksums.seal({**state, checksums.FILES: files}))
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.rename(partial, final)
        flush(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        why = why_not_written(error)
        raise UserError(f"cannot save the checkpoint {final}: {why}; the one before it is untouched") from None
    names = {checkpoint_path(folder, kept).name for kept in (*keep, step)}
    for path in folder.glob(f"{_PREFIX}*"):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(checkpoint: Path, *names: str) -> bool:
    """Compare files of a checkpoint (default: all that state.json lists) with their checksums.

    Files that did not change since this process compared them are not read again. A checkpoint that was written without
    checksums passes, with a warning.

    Returns:
        False if it was written without checksums.

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    state = _read_state(checkpoint)
    newest = latest_step(checkpoint.parent)
    others = [step for step in _steps(checkpoint.parent) if step != state["step"]]
    if not others:
        then = "this run cannot be continued"
    elif state["step"] == newest:
        then = f"deleting {checkpoint} leaves {checkpoint_path(checkpoint.parent, max(others)).name} to continue from"
    else:  # the best one: what comes after it cannot be it
        then = "`--checkpoint last` of eval and export takes the newest checkpoint instead"
    then += ", and --no-verify skips this check"
    return checksums.verify(checkpoint, state, names or state.get(checksums.FILES, ()), STATE, then)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json without its checksums.

    Raises:
        UserError: the file is missing or damaged: not JSON, a missing key, a value of the wrong type, or a
            checksum mismatch.
    """
    state = _read_state(checkpoint)
    return {key: value for key, value in state.items() if key not in (checksums.FILES, checksums.SEAL)}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / STATE
    state: dict[str, Any] = read_json(file)
    require(file, state, _SHAPE)
    if f"{_PREFIX}{state['step']:09d}" != checkpoint.name:
        raise UserError(f"{file} has step = {state['step']}, but the folder has the name of another step")
    if not checksums.sealed(state):
        raise UserError(f"{file} is damaged: it does not match its own checksum")
    return state


def mapped_tensor(checkpoint: Path, name: str) -> Tensor:
    """One tensor of a checkpoint, memory-mapped: no byte is read before it is used. Writing to it changes no file.

    Raises:
        UserError: the file is missing or damaged, or has no tensor of that name.
    """
    for key, tensor in tensors_of(checkpoint / WEIGHTS, name):
        if key == name:
            return tensor
    raise UserError(f"{checkpoint / WEIGHTS} lacks the key '{name}': it does not match the model, or is damaged")


def load_weights(checkpoint: Path, model: nn.Module, skip: Collection[str] = ()) -> None:
    """Read the weights of a checkpoint into `model`, tensor by tensor: no second copy of the tables, mapped or not.

    Args:
        skip: names of tensors that are not to be read here.

    Raises:
        UserError: the file is missing or damaged, or does not match the model.
    """
    file = checkpoint / WEIGHTS
    small: dict[str, Tensor] = {}
    copied = set(skip)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors_of(file):
        target = parameters.get(name)
        if name in copied:
            continue
        if target is None:
            small[name] = tensor
        else:
            memory = storage_of(target).memory(target)
            if (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(
                    f"{file}: '{name}' is {list(tensor.shape)} {tensor.dtype}, but the model has {list(memory.shape)} "
                    f"{memory.dtype} there"
                )
            read_tensor(file, name, memory)
            try:
                storage_of(target).check(target)
            except ValueError as error:
                raise UserError(f"{file} is damaged: {error}") from None
            torch.autograd.graph.increment_version(target)  # as by any other change in place
            copied.add(name)
    try:
        keys = model.load_state_dict(small, strict=False)  # it would copy parameters a second time
    except RuntimeError as error:
        raise UserError(f"{file} does not match the model: {' '.join(str(error).split())}") from None
    if keys.unexpected_keys:
        raise UserError(f"{file} does not match the model: unexpected key '{keys.unexpected_keys[0]}'")
    if missing := [name for name in keys.missing_keys if name not in copied]:
        raise UserError(f"{file} does not match the model: missing key '{missing[0]}'")


def load_state(checkpoint: Path, optimizers: Sequence[Optimizer | None]) -> dict[str, Any]:
    """Restore optimizers and random state from a checkpoint; returns its state.json.

    Args:
        optimizers: those of `save_checkpoint`, None in place of one that is not to be restored here.

    Raises:
        UserError: a file is missing or damaged.
    """
    tensors = load_optimizers(checkpoint, optimizers)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return read_state(checkpoint)


def load_optimizers(checkpoint: Path, optimizers: Sequence[Optimizer | None]) -> dict[str, Tensor]:
    """Restore optimizers from a checkpoint (see `load_state`); returns all tensors of their file, mapped.

    State that an optimizer has already is read in place: a second copy of the tables' may not fit. No mapping is kept,
    since it would also keep the file's bytes on disk after a later checkpoint has replaced it.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = checkpoint / OPTIMIZER
    tensors = dict(tensors_of(file))
    if "random/cpu" not in tensors:
        raise UserError(f"{file} holds no random state: damaged, or not written by dqrm")
    for number, optimizer in enumerate(optimizers):
        if optimizer is None:
            continue
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{number}/")}
        present = _optimizer_tensors([optimizer], number)
        if _alike(saved, present):
            for name, tensor in present.items():
                read_tensor(file, name, tensor)
            continue
        content = optimizer.state_dict()
        content["state"] = {}
        for name, tensor in saved.items():
            _, parameter, key = name.split("/", 2)
            content["state"].setdefault(int(parameter), {})[key] = tensor.clone()
        try:
            optimizer.load_state_dict(content)
        except (ValueError, KeyError, RuntimeError):
            raise UserError(f"{file} does not match the optimizer or the model") from None
    return tensors


def _alike(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, shapes and dtypes."""
    described = [{name: (each.shape, each.dtype) for name, each in tensors.items()} for tensors in (some, others)]
    return described[0] == described[1]


def steps_pending(checkpoint: Path) -> bool:
    """Whether rows of the tables are still to be brought up to date (`SparseOptimizer.catch_up_all`): an optimizer
    deferred updates, and the checkpoint was saved between evaluations."""
    file = checkpoint / OPTIMIZER
    if not file.exists():
        return False
    steps = [int(tensor) for name in _STEPS for _, tensor in tensors_of(file, f"0/0/{name}")]
    return len(steps) == 2 and steps[0] != steps[1]


def saved_table_bytes(checkpoint: Path) -> TableBytes:
    """`footprint.table_bytes` of a checkpoint, without reading the tensors.

    Raises:
        UserError: a file is missing or damaged.
    """
    weights = [tensor.nbytes for _, tensor in tensors_of(checkpoint / WEIGHTS, "tables.weight")]
    state = [tensor.nbytes for name, tensor in tensors_of(checkpoint / OPTIMIZER) if name.startswith("0/")]
    return {"weights": sum(weights), "optimizer": sum(state)}


def saved_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file of a checkpoint, memory-mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
    return dict(tensors_of(checkpoint / name))


def load_more(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the file EXCHANGE or CALLBACKS; empty where the checkpoint has none.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / name
    return {key: tensor.clone() for key, tensor in tensors_of(file)} if file.exists() else {}


def _optimizer_tensors(optimizers: Sequence[Optimizer], first: int = 0) -> dict[str, Tensor]:
    return {
        f"{number}/{parameter}/{key}": value
        for number, optimizer in enumerate(optimizers, start=first)
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _random_state() -> dict[str, Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state
