"""An ONNX model as a file, its large tensors streamed into it: a table is never in memory a second time.

A protobuf message may come in pieces, which parsers merge. So the model without its tables
is followed by one more piece per table, which contains only that table.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

INLINE_LIMIT = 2**31 - 1
"""Size in bytes above which tables go into a file of their own: the limit of a protobuf message."""
ALIGNMENT = 1 << 16
"""Alignment of the tensors in that file, for which every system can map them into memory."""
_CHUNK_BYTES = 1 << 24
# Field numbers of onnx.proto, as tags of length-delimited fields.
_GRAPH, _INITIALIZER, _RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))


def write_model(model: Any, tensors: Mapping[str, Tensor], path: Path, inline_limit: int | None = None) -> None:
    """Write an onnx.ModelProto with further initializers.

    From 2 GB on the tensors go into `<name>.data` beside it; or into `<name>.<8 hexadecimal digits>.data` if the
    folder above, to which an export moves its files, has a file of that name, which the model there still needs.

    Args:
        tensors: uint8, int16, int32 or float32, on the CPU.
        inline_limit: bytes above which they go into that file; None: INLINE_LIMIT.

    Raises:
        OSError: a file cannot be written.
    """
    heads = {name: _head(name, tensor) for name, tensor in tensors.items()}
    tags = {name: _tags(heads[name].SerializeToString(), tensor.nbytes) for name, tensor in tensors.items()}
    total = model.ByteSize() + sum(len(tags[name]) + tensor.nbytes for name, tensor in tensors.items())
    if tensors and total > (INLINE_LIMIT if inline_limit is None else inline_limit):
        data = path.with_name(path.name + ".data")
        if (path.parent.parent / data.name).exists():
            data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
        with data.open("wb") as file:
            for name, tensor in tensors.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                _refer(heads[name], data.name, file.tell(), tensor.nbytes)
                _stream(file, tensor)
        model.graph.initializer.extend(heads.values())
        tensors = {}
    with path.open("wb") as file:
        file.write(model.SerializeToString())
        for name, tensor in tensors.items():
            file.write(tags[name])
            _stream(file, tensor)


def _stream(file: IO[bytes], tensor: Tensor) -> None:
    for piece in tensor.split(max(1, _CHUNK_BYTES // max(1, tensor[:1].nbytes))):
        file.write(memoryview(piece.contiguous().numpy()).cast("B") if piece.numel() else b"")


def _head(name: str, tensor: Tensor) -> Any:
    """The TensorProto without its data."""
    from onnx import TensorProto

    kinds = {torch.uint8: TensorProto.UINT8, torch.int16: TensorProto.INT16, torch.int32: TensorProto.INT32,
             torch.float32: TensorProto.FLOAT}  # fmt: skip
    return TensorProto(name=name, dims=tensor.shape, data_type=kinds[tensor.dtype])


def _tags(head: bytes, size: int) -> bytes:
    """The bytes before `size` bytes of raw data, so that both are a model with one graph with one initializer."""
    head += _field(_RAW_DATA, size)
    head = _field(_INITIALIZER, len(head) + size) + head
    return _field(_GRAPH, len(head) + size) + head


def _field(tag: int, length: int) -> bytes:
    """The beginning of a length-delimited field."""
    header = [tag]
    while length >= 128:
        header.append(length % 128 + 128)
        length //= 128
    return bytes([*header, length])


def _refer(head: Any, location: str, offset: int, length: int) -> None:
    """Set the location of a tensor's data: a file beside the model."""
    from onnx import TensorProto

    head.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        head.external_data.add(key=key, value=str(value))
