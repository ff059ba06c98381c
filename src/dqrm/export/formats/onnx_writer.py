"""A click model as an ONNX file of standard operators, on packed codes: an INT4 table takes half a byte per weight.

The graph is written directly (`onnx_graph`): the tables' part is the same for all models, the rest is one function
per model.

    dense --------------------------------------------------+
                                                            +-- graph of the model -- logit -- Sigmoid
    ids -- + first rows -- Gather -- unpack -- * scale -----+
    values, offsets ---- the same ------ ScatterElements ---+
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqrm.errors import UserError
from dqrm.export.formats.onnx_file import write_model
from dqrm.export.formats.onnx_graph import Graph, concat, look_up_tables, run_stack
from dqrm.export.formats.traceable import packed_tables
from dqrm.models.base import ClickModel
from dqrm.models.calibration import Calibration
from dqrm.models.dcn import DCN
from dqrm.models.dlrm import DLRM

OPSET, OPSET_WITH_BAGS = 13, 16
"""The oldest with all operators: ScatterElements adds from 16 on. The IR version is the lowest that supports it."""


def write_onnx(
    model: ClickModel, path: Path, metadata: Mapping[str, str] = {}, inline_limit: int | None = None
) -> None:
    """Write a converted model as ONNX; from 2 GB on, with its tables in `<name>.data` beside it.

    Inputs: dense float32 [batch, D], ids int64 [batch, S], and for each multi-valued table k (in the schema's order)
    values_<k> int64 [n_<k>] and offsets_<k> int64 [batch], as `nn.EmbeddingBag` takes them; inputs that the
    model lacks are left out. Outputs: probability and logit, float32 [batch]. An id outside its table gives row 0.

    Args:
        model: its quantized layers in packed form. Its tables are streamed, never copied.
        metadata: stored as the file's metadata properties.
        inline_limit: bytes above which the tables are in a file of their own; None: 2 GB.

    Raises:
        UserError: the package `onnx` is missing, or there is no graph for this model.
        ValueError: the model is not converted.
        OSError: the file cannot be written.
    """
    try:
        from onnx import helper
    except ImportError:
        raise UserError("writing .onnx needs the extra dqrm[onnx]: pip install 'dqrm[onnx]'") from None

    graph = Graph()
    with torch.no_grad():
        _build(graph, model)
    opsets = [helper.make_opsetid("", OPSET_WITH_BAGS if any(model.tables.multi) else OPSET)]
    made = helper.make_model(
        helper.make_graph(graph.nodes, model.config.model, graph.inputs, graph.outputs, graph.initializers),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="dqrm",
    )
    helper.set_model_props(made, dict(metadata))
    write_model(made, graph.streamed, path, inline_limit)


def _build(graph: Graph, model: ClickModel) -> None:
    name = model.config.model
    if name not in GRAPHS:
        raise UserError(
            f"model '{name}' has no ONNX graph, expected one of {', '.join(GRAPHS)}; export a .pt2 file instead"
        )
    dense = graph.input("dense", np.float32, ["batch", model.num_dense]) if model.num_dense else ""
    logit = GRAPHS[name](graph, model, dense, look_up_tables(graph, packed_tables(model)))
    if model.logit_offset:
        logit = graph.node("Add", logit, graph.float(model.logit_offset))
    if model.calibration:
        logit = _calibrated(graph, graph.node("Reshape", logit, graph.ints(-1, 1)), model.calibration)
    graph.node("Reshape", logit, graph.ints(-1), name="logit")
    graph.node("Sigmoid", "logit", name="probability")
    graph.output("probability", ["batch"])
    graph.output("logit", ["batch"])


def _calibrated(graph: Graph, logit: str, calibration: Calibration) -> str:
    """As `Calibration.__call__`, of a logit [B, 1]."""
    lower, upper, start, slope, value = calibration.lines
    lows, highs, starts = (graph.constant(numbers, np.float32) for numbers in (lower, upper, start))
    inside = graph.node("Sub", graph.node("Min", graph.node("Max", logit, lows), highs), starts)
    weighted = graph.node("MatMul", inside, graph.constant(np.array(slope)[:, None], np.float32))
    return graph.node("Add", weighted, graph.float(value))


def _dlrm(graph: Graph, model: DLRM, dense: str, vectors: str) -> str:
    below = run_stack(graph, "bottom", dense, model.bottom) if dense else ""
    if model.config.interaction == "cat":
        x = concat(graph, [part for part in (below, graph.flat(vectors)) if part], 1)
    else:
        parts = [graph.node("Unsqueeze", below, graph.ints(1)) if below else "", vectors]
        x = _products(graph, concat(graph, [part for part in parts if part], 1), model.pairs)
        x = concat(graph, [part for part in (below, x) if part], 1)
    return run_stack(graph, "top", x, model.top)


def _products(graph: Graph, vectors: str, pairs: Tensor) -> str:
    """The pairs' dot products [B, P] of vectors [B, V, dim]; '' where there is no pair."""
    if not len(pairs):
        return ""
    products = graph.node("MatMul", vectors, graph.node("Transpose", vectors, perm=[0, 2, 1]))
    chosen = graph.constant(pairs.numpy(), np.int64, "pairs")
    return graph.node("Gather", graph.node("Flatten", products), chosen, axis=1)


def _dcn(graph: Graph, model: DCN, dense: str, vectors: str) -> str:
    x0 = x = concat(graph, [part for part in (dense, graph.flat(vectors)) if part], 1)
    for number, layer in enumerate(model.cross):
        x = graph.node("Add", graph.node("Mul", x0, run_stack(graph, f"cross.{number}", x, layer)), x)
    if model.config.deep_mlp:
        stacked = model.config.structure == "stacked"
        deep = run_stack(graph, "deep", x if stacked else x0, model.deep)
        x = deep if stacked else concat(graph, [x, deep], 1)
    return run_stack(graph, "head", x, model.head)


GRAPHS: dict[str, Callable[[Graph, Any, str, str], str]] = {"dlrm": _dlrm, "dcn": _dcn}
"""The graph of each model by its name in `MODELS`, as a function (graph, model, dense, vectors) -> logit [B, 1]: of the
dense columns [B, D] and the table vectors [B, T, dim], '' where there are none."""
