"""safetensors files as checkpoints have them: written in a stream, whose tensors need not be in this process's memory,
and read by the row."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dqrm.errors import UserError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Bytes written and hashed at a time.
_PIECE = 1 << 24


class Streamed(NamedTuple):
    """A tensor that is not in this process's memory: its content comes in pieces, contiguous and in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_file(tensors: Mapping[str, Tensor | Streamed], path: Path, files: dict[str, dict[str, Any]]) -> None:
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
        for piece in chain([len(header).to_bytes(8, "little") + header], _pieces(tensors[name] for name in order)):
            if hashing is not None:
                hashing.result()  # one at a time, in order, while the next is being written
            hashing = thread.submit(digest.update, piece)
            file.write(piece)
        if hashing is not None:
            hashing.result()
        file.flush()
    files[path.name] = {"bytes": 8 + len(header) + at, "sha256": digest.hexdigest()}


def _pieces(tensors: Iterable[Tensor | Streamed]) -> Iterator[Any]:
    for tensor in tensors:
        if not tensor.nbytes:
            continue
        if isinstance(tensor, Streamed):
            yield from _pieces(tensor.pieces())
            continue
        flat = tensor.detach().contiguous().view(-1)
        for piece in flat.split(max(1, _PIECE // tensor.element_size())):
            yield piece.cpu().view(torch.uint8).numpy().data


def read_tensor(file: Path, name: str, target: Tensor, skip: int = 0) -> None:
    """Fill a contiguous tensor with the one of that name in a safetensors file that was opened before, from its byte
    `skip` on.

    By reading: the pages of a mapping would count as this process's memory beside those that they are copied to.
    """
    try:
        with open(file, "rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(8), "little")
            opened.seek(8 + length + json.loads(opened.read(length))[name]["data_offsets"][0] + skip)
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


def tensors_of(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name, or only one, memory-mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
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
