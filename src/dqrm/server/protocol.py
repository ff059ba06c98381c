"""Inference requests and responses of the Open Inference Protocol v2: JSON, and its binary tensor extension.

Source: the REST part of the specification (github.com/kserve/open-inference-protocol), and Triton's extension "binary
tensor data". A binary request is JSON, `Inference-Header-Content-Length` bytes long, then the tensors' bytes, row-major
and little-endian, in the order of the inputs.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.options import did_you_mean
from dqrm.server.body import parse_json
from dqrm.server.errors import Refusal, shown
from dqrm.server.version import OUTPUTS, Port, Scores, Tensors, Version

Array = NDArray[Any]
# What is taken for an input of each datatype, by its name in the protocol.
_DTYPES = {"FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
_TAKEN = {"FP32": ("FP32", "FP64"), "INT64": ("INT64", "INT32")}


@dataclass(frozen=True)
class Inference:
    """A valid request. outputs: names, and whether each is binary. id: to be sent back; None: none."""

    tensors: Tensors
    outputs: tuple[tuple[str, bool], ...]
    id: str | None


def parse(body: bytes, header_length: str | None, version: Version) -> Inference:
    """The request in a body.

    Args:
        header_length: of the header `Inference-Header-Content-Length`; None: the body is JSON.

    Raises:
        Refusal: it is invalid.
    """
    end = _header_end(header_length, len(body))
    given = parse_json(body[:end] if end < len(body) else body)
    if not isinstance(given, dict):
        raise Refusal(400, "the request's body is not a JSON object, expected one with 'inputs'")
    if not isinstance(inputs := given.get("inputs"), list) or not all(isinstance(each, dict) for each in inputs):
        raise Refusal(400, f"'inputs' is {shown(given.get('inputs'))}, expected a list of objects with name, shape, "
                           "datatype and data")  # fmt: skip
    request_id = given.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise Refusal(400, f"'id' is {shown(request_id)}, expected text")
    arrays = _arrays(inputs, memoryview(body)[end:], version)
    return Inference(_tensors(arrays, version), _outputs(given), request_id)


def _header_end(length: str | None, total: int) -> int:
    if length is None:
        return total
    if not (length.isascii() and length.isdigit() and int(length[:20]) <= total):
        raise Refusal(400, f"Inference-Header-Content-Length is {shown(length)}, expected 0 to {total}, the body's "
                           "length")  # fmt: skip
    return int(length)


def _arrays(inputs: list[dict[str, Any]], binary: memoryview, version: Version) -> dict[str, Array]:
    """The arrays of a request's inputs, by name, in the declared shapes."""
    wanted, arrays, at = {port.name: port for port in version.inputs}, {}, 0
    for given in inputs:
        name = given.get("name")
        if not isinstance(name, str) or name not in wanted:
            close = did_you_mean(name, wanted) if isinstance(name, str) else f"; known are {', '.join(wanted)}"
            raise Refusal(400, f"{version.name} has no input {shown(name)}{close}")
        if name in arrays:
            raise Refusal(400, f"input '{name}' is given twice, expected once")
        shape, dtype = _shape(given, wanted[name]), _dtype(given, wanted[name])
        size = _parameters(given, f"input '{name}'").get("binary_data_size")
        if size is None:
            arrays[name] = _of_json(given, shape, dtype, name)
            continue
        expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if type(size) is not int or size != expected or at + size > len(binary):
            raise Refusal(400, f"input '{name}' has binary_data_size {shown(size)} and {len(binary) - at} bytes, "
                               f"expected {expected} bytes for shape {list(shape)}")  # fmt: skip
        arrays[name] = np.frombuffer(binary, dtype, count=size // dtype.itemsize, offset=at).reshape(shape)
        at += size
    if missing := [name for name in wanted if name not in arrays]:
        raise Refusal(400, f"input '{missing[0]}' is missing, expected {', '.join(wanted)}")
    if at != len(binary):
        raise Refusal(400, f"{len(binary) - at} bytes follow the last binary input, expected none")
    return arrays


def _parameters(given: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refusal(400, f"'parameters' of {where} is {shown(parameters)}, expected an object")
    if "shared_memory_region" in parameters:
        raise Refusal(400, f"{where} is in shared memory, expected JSON or binary data")
    return parameters


def _shape(given: dict[str, Any], port: Port) -> tuple[int, ...]:
    shape = given.get("shape")
    fits = (
        isinstance(shape, list)
        and len(shape) == len(port.shape)
        and all(type(size) is int and 0 <= size < 2**31 for size in shape)
        and all(wanted in (-1, size) for size, wanted in zip(shape, port.shape))
    )
    if not fits or not isinstance(shape, list):
        raise Refusal(400, f"input '{port.name}' has shape {shown(shape)}, expected {list(port.shape)} with any number "
                           "of rows for -1")  # fmt: skip
    return tuple(shape)


def _dtype(given: dict[str, Any], port: Port) -> np.dtype[Any]:
    datatype = given.get("datatype")
    if datatype not in _TAKEN[port.datatype]:
        raise Refusal(400, f"input '{port.name}' has datatype {shown(datatype)}, expected "
                           f"{' or '.join(_TAKEN[port.datatype])}")  # fmt: skip
    return np.dtype(_DTYPES[datatype])


def _of_json(given: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> Array:
    """The array of an input's `data`, flat or nested as its shape."""
    data = given.get("data")
    if not isinstance(data, list):
        raise Refusal(400, f"input '{name}' has data {shown(data)}, expected a list of numbers")
    if len(shape) == 2 and data and isinstance(data[0], list):
        if len(data) != shape[0] or not all(isinstance(row, list) and len(row) == shape[1] for row in data):
            raise Refusal(400, f"input '{name}' has data that is not nested as its shape {list(shape)}")
        data = [value for row in data for value in row]
    count = int(np.prod(shape, dtype=object))
    if len(data) != count:
        raise Refusal(400, f"input '{name}' has {len(data)} values, expected {count} for its shape {list(shape)}")
    kinds = {int, float} if dtype.kind == "f" else {int}
    if not set(map(type, data)) <= kinds:
        odd = next(value for value in data if type(value) not in kinds)
        raise Refusal(400, f"input '{name}' holds {shown(odd)}, expected {'whole ' * (dtype.kind == 'i')}numbers")
    try:
        with np.errstate(over="ignore"):  # infinity is refused with its row
            return np.array(data, dtype).reshape(shape)
    except OverflowError:
        raise Refusal(400, f"input '{name}' holds a number that {dtype.name} cannot hold") from None


def _tensors(arrays: dict[str, Array], version: Version) -> Tensors:
    """The checked tensors of a model's inputs."""
    rows = next((len(arrays[name]) for name in ("dense", "ids", "offsets_0") if name in arrays), 0)
    dense = arrays.get("dense", np.empty((rows, 0), np.float32))
    with np.errstate(over="ignore"):
        dense = dense.astype(np.float32, copy=False)
    if not np.isfinite(dense).all():
        row, column = np.argwhere(~np.isfinite(dense))[0].tolist()
        raise Refusal(400, f"input 'dense' holds {arrays['dense'][row, column]} in row {row + 1}, expected finite "
                           "numbers of FP32")  # fmt: skip
    ids = arrays.get("ids", np.empty((rows, 0), np.int32))
    if ((ids < 0) | (ids >= version.table_rows)).any():
        row, column = np.argwhere((ids < 0) | (ids >= version.table_rows))[0].tolist()
        raise Refusal(400, f"input 'ids' holds {ids[row, column]} in row {row + 1} for column "
                           f"{version.column(column)}, expected 0 to {version.table_rows[column] - 1}")  # fmt: skip
    bags = tuple(_bag(arrays, number, version) for number in range(len(version.bag_rows)))
    for name, array in (("dense", dense), ("ids", ids), *((f"offsets_{n}", bag[1]) for n, bag in enumerate(bags))):
        if len(array) != rows:
            raise Refusal(400, f"input '{name}' has {len(array)} rows, the others have {rows}, expected the same")
    if not rows:
        raise Refusal(400, "the request has no rows, expected at least 1")
    return Tensors(dense, ids.astype(np.int32, copy=False), bags)


def _bag(arrays: dict[str, Array], number: int, version: Version) -> tuple[Array, Array]:
    values, offsets = arrays[f"values_{number}"], arrays[f"offsets_{number}"].astype(np.int64)
    most = version.bag_rows[number]
    if ((values < 0) | (values >= most)).any():
        odd = values[(values < 0) | (values >= most)][0]
        raise Refusal(400, f"input 'values_{number}' holds {odd} for column {version.column(number, True)}, expected 0 "
                           f"to {most - 1}")  # fmt: skip
    if len(offsets) and (offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(values)):
        raise Refusal(400, f"input 'offsets_{number}' is not ascending from 0 to at most {len(values)}, the number of "
                           f"values_{number}")  # fmt: skip
    if not len(offsets) and len(values):
        raise Refusal(400, f"input 'values_{number}' has {len(values)} values without a row, expected none")
    return values.astype(np.int32), offsets


def _outputs(given: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    """The names of the requested outputs, all of them by default, and whether each is binary."""
    binary = _parameters(given, "the request").get("binary_data_output", False)
    asked = given.get("outputs")
    known = [port.name for port in OUTPUTS]
    if asked is None or asked == []:
        return tuple((name, bool(binary)) for name in known)
    if not isinstance(asked, list) or not all(isinstance(each, dict) for each in asked):
        raise Refusal(400, f"'outputs' is {shown(asked)}, expected a list of objects with a name")
    outputs = []
    for each in asked:
        name = each.get("name")
        if not isinstance(name, str) or name not in known:
            raise Refusal(400, f"there is no output {shown(name)}, expected {' or '.join(known)}")
        outputs.append((name, bool(_parameters(each, f"output '{name}'").get("binary_data", binary))))
    return tuple(outputs)


def respond(request: Inference, scores: Scores, version: Version) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if tensors follow it."""
    outputs, pieces = [], []
    for name, binary in request.outputs:
        values: Array = getattr(scores, name)
        described: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [len(values)]}
        if binary:
            pieces.append(values.astype("<f4", copy=False).tobytes())
            described["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            described["data"] = values.tolist()
        outputs.append(described)
    made: dict[str, Any] = {"model_name": version.name, "model_version": version.id, "outputs": outputs}
    if request.id is not None:
        made["id"] = request.id
    head = json.dumps(made).encode()
    return (b"".join([head, *pieces]), len(head)) if pieces else (head, None)
