"""`config.pbtxt` for an ONNX file in Triton's model repository, whose ONNX Runtime backend runs it.

Source: Triton's model configuration (model_config.proto) and its documentation of `reshape`, which an output with one
number per row needs where Triton adds the dimension of the batch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqrm.errors import UserError

NAME = "config.pbtxt"
_MARK = "# Written by dqrm export"
_BATCH = 1024


def check_triton(output: Path) -> None:
    """Whether the configuration can be written beside `output`.

    Raises:
        UserError: it is no .onnx file, or there is a configuration that is not ours.
    """
    if output.suffix != ".onnx":
        raise UserError(f"triton is for .onnx files, and {output} is none; leave out --triton, or name an .onnx file")
    beside = output.with_name(NAME)
    if beside.exists() and not beside.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise UserError(f"{beside} was not written by dqrm export and would be overwritten; move it")


def triton_config(described: Mapping[str, Any], file: str) -> str:
    """The text of the configuration.

    With single-valued columns alone Triton batches requests; bags have as many values as a request wants, which
    Triton cannot join, so a model with multi-valued columns takes each request as it is.

    Args:
        described: the model, as an artifact's header describes it. file: the name of the ONNX file.
    """
    bags = sum(described["multi"])
    single, dense = len(described["multi"]) - bags, described["num_dense"]
    batched = not bags
    rows = [] if batched else [-1]
    inputs = [("dense", "TYPE_FP32", [*rows, dense])] * bool(dense) + [("ids", "TYPE_INT64", [*rows, single])] * bool(
        single
    )
    for number in range(bags):
        inputs += [(f"values_{number}", "TYPE_INT64", [-1]), (f"offsets_{number}", "TYPE_INT64", [-1])]
    outputs = [(name, "TYPE_FP32", [1] if batched else [-1]) for name in ("probability", "logit")]
    lines = [
        f"{_MARK} for {file}: move both to MODELS/NAME/{NAME} and MODELS/NAME/1/{file}.",
        'backend: "onnxruntime"',
        f'default_model_filename: "{file}"',
        f"max_batch_size: {_BATCH if batched else 0}",
        *(_port("input", *given) for given in inputs),
        *(_port("output", *given, "reshape { shape: [ ] }" if batched else "") for given in outputs),
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
        *["dynamic_batching { }"] * batched,  # without a delay: what queued while the last batch ran
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }',
    ]
    return "\n".join(lines) + "\n"


def _port(kind: str, name: str, datatype: str, dims: list[int], more: str = "") -> str:
    inner = f'name: "{name}" data_type: {datatype} dims: [ {", ".join(map(str, dims))} ]'
    return f"{kind} [ {{ {inner}{' ' * bool(more)}{more} }} ]"
