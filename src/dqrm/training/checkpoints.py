"""Checkpoints: folders `checkpoints/step-000000123` with weights in safetensors and state in JSON.

A folder is written under another name, flushed to disk and renamed, so one that bears its name is whole. Two are kept:
the newest, from which a run resumes, and the best on validation.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dqrm.errors import UserError
from dqrm.files import flush, read_json, write_json

_PREFIX, _PARTIAL = "step-", ".partial"
_EXCHANGE = "exchange.safetensors"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is kept."""
    return folder / f"{_PREFIX}{step:09d}"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, or None."""
    names = (re.fullmatch(_PREFIX + r"(\d{9,})", path.name) for path in folder.glob(f"{_PREFIX}*"))
    return max((int(name[1]) for name in names if name), default=None)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: list[Optimizer],
    state: Mapping[str, Any],
    keep: set[int],
    exchange: dict[str, Tensor] | None = None,
) -> None:
    """Write the checkpoint of `step`, then delete all others but those of the steps in `keep`.

    Args:
        exchange: what the exchange between ranks remembers, if there are several.
    """
    final = checkpoint_path(folder, step)
    if final.exists():  # the same step of the same run: the same content
        return
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        partial.mkdir(parents=True)
        save_file(weights, partial / "weights.safetensors")
        save_file(_optimizer_tensors(optimizers) | _random_state(), partial / "optimizer.safetensors")
        if exchange is not None:
            save_file({name: tensor.contiguous() for name, tensor in exchange.items()}, partial / _EXCHANGE)
        write_json(partial / "state.json", state)
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.rename(partial, final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot save the checkpoint {final} ({error}); the one before it is untouched") from None
    names = {checkpoint_path(folder, kept).name for kept in (*keep, step)}
    for path in folder.glob(f"{_PREFIX}*"):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def mapped_tensor(checkpoint: Path, name: str) -> Tensor:
    """One tensor of a checkpoint, memory-mapped: no byte is read before it is used. Writing to it changes no file.

    Raises:
        UserError: the file is missing or damaged, or has no tensor of that name.
    """
    for found, tensor in _tensors(checkpoint / "weights.safetensors", name):
        if found == name:
            return tensor
    raise UserError(f"{checkpoint / 'weights.safetensors'} holds no '{name}': of another model, or damaged")


def load_weights(checkpoint: Path, model: nn.Module, skip: str | None = None) -> None:
    """Copy the weights of a checkpoint into `model`, tensor by tensor: no second copy of the tables.

    Args:
        skip: the name of a parameter that holds its values already.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    file = checkpoint / "weights.safetensors"
    small: dict[str, Tensor] = {}
    copied = {skip}
    parameters = dict(model.named_parameters())
    for name, tensor in _tensors(file):
        target = parameters.get(name)
        if target is None:
            small[name] = tensor
        elif target.shape != tensor.shape:
            raise UserError(f"{file}: '{name}' is {list(tensor.shape)}, but the model has {list(target.shape)} there")
        elif name != skip:
            target.data.copy_(tensor)
            copied.add(name)
    try:
        found = model.load_state_dict(small, strict=False)  # it would copy parameters a second time
    except RuntimeError as error:
        raise UserError(f"{file} is of another model: {' '.join(str(error).split())}") from None
    wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if name not in copied)]
    if wrong:
        raise UserError(f"{file} is of another model: '{wrong[0]}' is in only one of the two")


def load_state(checkpoint: Path, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Restore optimizers and random state from a checkpoint; returns its state.json.

    Raises:
        UserError: a file is missing or damaged.
    """
    file = checkpoint / "optimizer.safetensors"
    tensors = dict(_tensors(file))
    if "random/cpu" not in tensors:
        raise UserError(f"{file} holds no random state: damaged, or not written by dqrm")
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition("/")
            if owner == str(number):
                parameter, _, key = rest.partition("/")
                content["state"].setdefault(int(parameter), {})[key] = tensor
        try:
            optimizer.load_state_dict(content)
        except (ValueError, KeyError, RuntimeError):
            raise UserError(f"{file} is of another optimizer or model") from None
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    state: dict[str, Any] = read_json(checkpoint / "state.json")
    return state


def load_exchange(checkpoint: Path) -> dict[str, Tensor]:
    """What the exchange remembered; empty where the checkpoint is of one rank.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / _EXCHANGE
    return dict(_tensors(file)) if file.exists() else {}


def _optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}/{parameter}/{key}": value
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _random_state() -> dict[str, Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def _tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if only not in (None, name):
                    continue
                yield name, opened.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{file} is missing from the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
