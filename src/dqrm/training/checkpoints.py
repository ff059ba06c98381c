"""Checkpoints: folders `checkpoints/step-000000123` with weights in safetensors and state in JSON.

state.json is written last: it lists the size and the SHA-256 of the other files, and has a checksum of its own.

A folder is written under a temporary name, flushed to disk and renamed, so one with the final name is complete. Two are
kept: the newest, from which a run resumes, and the best on validation.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from dqrm import checksums
from dqrm.errors import UserError
from dqrm.files import COUNT, FLAG, NUMBER, OBJECT, TEXT, flush, read_json, require, why_not_written, write_json
from dqrm.quant.storage import storage_of
from dqrm.training.footprint import TableBytes

_PREFIX, _PARTIAL = "step-", ".partial"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
EXCHANGE, CALLBACKS = "exchange.safetensors", "callbacks.safetensors"  # only if they have content
STATE = "state.json"
_STEPS = ("count", "flushed")  # of such an optimizer: steps so far, and at the last `catch_up_all`
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Bytes written and hashed at a time.
_PIECE = 1 << 24

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
    more: Mapping[str, dict[str, Tensor]] | None = None,
) -> None:
    """Write the checkpoint of `step`, then delete all others but those of the steps in `keep`.

    Args:
        more: further tensors by file (EXCHANGE, CALLBACKS); one without any is not written.
    """
    final = checkpoint_path(folder, step)
    if final.exists():  # the same step of the same run: the same content
        return
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    weights = {name: storage_of(weight).memory(weight) for name, weight in model.state_dict().items()}
    try:
        partial.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        save_file(weights, partial / WEIGHTS, files)
        save_file(_optimizer_tensors(optimizers) | _random_state(), partial / OPTIMIZER, files)
        for name, tensors in (more or {}).items():
            if tensors:
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


def save_file(tensors: Mapping[str, Tensor], path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write a safetensors file in a stream, and note its size and SHA-256 in `files`.

    Not by the safetensors library, which would need a second read for the hash, and makes files that only their owner
    may read. The digest is of the content in memory, so it also detects errors of the disk.

    Raises:
        OSError: a full disk, a folder that may not be written.
    """
    # Those of wider elements first, so that each one is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    described, at = {}, 0
    for name in order:
        tensor = tensors[name]
        described[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    header = json.dumps(described).encode()
    header += b" " * (-(8 + len(header)) % 64)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as thread, open(path, "wb") as file:
        hashing: Future[None] | None = None
        for piece in (len(header).to_bytes(8, "little") + header, *_pieces(tensors[name] for name in order)):
            if hashing is not None:
                hashing.result()  # one at a time, in order, while the next is being written
            hashing = thread.submit(digest.update, piece)
            file.write(piece)
        if hashing is not None:
            hashing.result()
        file.flush()
    files[path.name] = {"bytes": 8 + len(header) + at, "sha256": digest.hexdigest()}


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Any]:
    for tensor in tensors:
        if not tensor.nbytes:
            continue
        flat = tensor.detach().contiguous().view(-1)
        for piece in flat.split(max(1, _PIECE // tensor.element_size())):
            yield piece.cpu().view(torch.uint8).numpy().data


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
    for key, tensor in _tensors(checkpoint / WEIGHTS, name):
        if key == name:
            return tensor
    raise UserError(f"{checkpoint / WEIGHTS} lacks the key '{name}': it does not match the model, or is damaged")


def load_weights(checkpoint: Path, model: nn.Module, skip: str | None = None) -> None:
    """Read the weights of a checkpoint into `model`, tensor by tensor: no second copy of the tables, mapped or not.

    Args:
        skip: the name of a parameter that holds its values already.

    Raises:
        UserError: the file is missing or damaged, or does not match the model.
    """
    file = checkpoint / WEIGHTS
    small: dict[str, Tensor] = {}
    copied = {skip}
    parameters = dict(model.named_parameters())
    for name, tensor in _tensors(file):
        target = parameters.get(name)
        if target is None:
            small[name] = tensor
        elif name != skip:
            memory = storage_of(target).memory(target)
            if (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(
                    f"{file}: '{name}' is {list(tensor.shape)} {tensor.dtype}, but the model has {list(memory.shape)} "
                    f"{memory.dtype} there"
                )
            _read(file, name, memory)
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


def _read(file: Path, name: str, target: Tensor) -> None:
    """Fill a contiguous tensor with the one of that name in a safetensors file that was opened before.

    By reading: the pages of a mapping would count as this process's memory beside those that they are copied to.
    """
    try:
        with open(file, "rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(8), "little")
            opened.seek(8 + length + json.loads(opened.read(length))[name]["data_offsets"][0])
            for piece in target.view(-1).split(max(1, _PIECE // target.element_size())):
                here = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
                rest = here.view(torch.uint8).numpy().data
                while len(rest):
                    count = opened.readinto(rest)
                    if not count:
                        raise UserError(f"{file} is damaged: it was cut short while it was read")
                    rest = rest[count:]
                if here is not piece:
                    piece.copy_(here)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def load_state(checkpoint: Path, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Restore optimizers and random state from a checkpoint; returns its state.json.

    Raises:
        UserError: a file is missing or damaged.
    """
    tensors = load_optimizers(checkpoint, optimizers)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return read_state(checkpoint)


def load_optimizers(checkpoint: Path, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Restore optimizers from a checkpoint; returns all tensors of their file, mapped.

    State that an optimizer has already is read in place: a second copy of the tables' may not fit. No mapping is kept,
    since it would also keep the file's bytes on disk after a later checkpoint has replaced it.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = checkpoint / OPTIMIZER
    tensors = dict(_tensors(file))
    if "random/cpu" not in tensors:
        raise UserError(f"{file} holds no random state: damaged, or not written by dqrm")
    for number, optimizer in enumerate(optimizers):
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{number}/")}
        present = _optimizer_tensors([optimizer], number)
        if _alike(saved, present):
            for name, tensor in present.items():
                _read(file, name, tensor)
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
    steps = [int(tensor) for name in _STEPS for _, tensor in _tensors(file, f"0/0/{name}")]
    return len(steps) == 2 and steps[0] != steps[1]


def saved_table_bytes(checkpoint: Path) -> TableBytes:
    """`footprint.table_bytes` of a checkpoint, without reading the tensors.

    Raises:
        UserError: a file is missing or damaged.
    """
    weights = [tensor.nbytes for _, tensor in _tensors(checkpoint / WEIGHTS, "tables.weight")]
    state = [tensor.nbytes for name, tensor in _tensors(checkpoint / OPTIMIZER) if name.startswith("0/")]
    return {"weights": sum(weights), "optimizer": sum(state)}


def saved_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file of a checkpoint, memory-mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
    return dict(_tensors(checkpoint / name))


def load_more(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the file EXCHANGE or CALLBACKS; empty where the checkpoint has none.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / name
    return {key: tensor.clone() for key, tensor in _tensors(file)} if file.exists() else {}


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


def _tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if only not in (None, name):
                    continue
                yield name, opened.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{file} is missing from the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
