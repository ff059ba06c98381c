"""Common parts of the ONNX graphs of all models: nodes and initializers, stacks of linear layers, tables.

Rows are gathered as bytes and converted to floats by arithmetic alone, so any runtime computes the trained values, and
there is no pattern that a runtime would fuse into a quantized product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dqrm.export.formats.traceable import packed_stack
from dqrm.quant.mixed import PackedTables
from dqrm.quant.packed import PackedEmbeddingBagCollection, PackedLinear
from dqrm.quant.packing import PACKED_BITS
from dqrm.quant.uniform import code_limits


class Graph:
    """Nodes and initializers, collected as they are added; every value has a name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.initializers: list[Any] = []
        self.streamed: dict[str, Tensor] = {}
        self._constants: dict[tuple[Any, ...], str] = {}

    def input(self, name: str, dtype: type, shape: Sequence[Any]) -> str:
        from onnx import helper

        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[Any]) -> None:
        from onnx import TensorProto, helper

        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node; its output's name."""
        from onnx import helper

        name = name or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> str:
        """A small initializer; equal unnamed ones are stored once."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value, dtype) if np.ndim(value) else np.array(value, dtype)
        key = (name, array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name or f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """An int64 initializer of one dimension."""
        return self.constant(values, np.int64)

    def float(self, value: Any, name: str = "") -> str:
        """A float32 initializer."""
        return self.constant(value, np.float32, name)

    def flat(self, x: str) -> str:
        """[B, ...] as [B, values]; '' stays ''."""
        return self.node("Flatten", x) if x else ""

    def cast_float(self, x: str) -> str:
        return self.node("Cast", x, to=1)  # TensorProto.FLOAT


def concat(graph: Graph, parts: list[str], axis: int) -> str:
    """Concatenate the parts along `axis`; one alone is returned unchanged."""
    return parts[0] if len(parts) == 1 else graph.node("Concat", *parts, axis=axis)


def run_stack(graph: Graph, name: str, x: str, stack: nn.Module) -> str:
    """The output of a model's stack; its initializers begin with `name`."""
    number = 0
    for module in packed_stack(stack):
        if isinstance(module, PackedLinear):
            x, number = _linear(graph, f"{name}.{number}", x, module), number + 1
        else:
            x = graph.node("Relu", x)
    return x


def _linear(graph: Graph, name: str, x: str, layer: PackedLinear) -> str:
    if layer.activation_scale is not None:
        low, high = code_limits(layer.activation_bits)
        scale = graph.float(layer.activation_scale.numpy(), f"{name}.activation_scale")
        x = graph.node("Round", graph.node("Div", x, scale))
        x = graph.node("Mul", graph.node("Clip", x, graph.float(low), graph.float(high)), scale)
    weight = graph.constant(layer.codes.numpy(), None, f"{name}.weight")
    if layer.bits != 32:  # runtimes compute this once, when they load the file
        scale_name = graph.float(layer.scale.numpy()[:, None], f"{name}.scale")
        weight = _decode(graph, weight, layer.bits, layer.in_features, 1, scale_name)
    bias = [] if layer.bias is None else [graph.float(layer.bias.numpy(), f"{name}.bias")]
    return graph.node("Gemm", x, weight, *bias, transB=1)


def _decode(graph: Graph, stored: str, bits: int, dim: int, axis: int, scale: str, zero_point: str = "") -> str:
    """Stored rows as their values in float32, along the last axis: the arithmetic of `packing.decode`, bit for bit."""
    codes = graph.cast_float(stored)
    if bits in PACKED_BITS:
        parts: list[str] = []
        for part in range(8 // bits - 1, 0, -1):
            unit = float(1 << (bits * part))
            parts.insert(0, graph.node("Floor", graph.node("Mul", codes, graph.float(1 / unit))))
            codes = graph.node("Sub", codes, graph.node("Mul", parts[0], graph.float(unit)))
        codes = concat(graph, [codes, *parts], axis)
        if dim * bits % 8:
            codes = graph.node("Slice", codes, *(graph.ints(number) for number in (0, dim, axis)))
        codes = graph.node("Sub", codes, graph.float(1 << (bits - 1)))
    return graph.node("Mul", graph.node("Sub", codes, zero_point) if zero_point else codes, scale)


def look_up_tables(graph: Graph, tables: PackedTables) -> str:
    """One vector per sample and table: [B, T, dim]; '' without tables."""
    if not tables.table_rows:
        return ""
    single = tables.num_single
    ids = graph.input("ids", np.int64, ["batch", single]) if single else ""
    bags = [
        (graph.input(f"values_{name}", np.int64, [f"n_{name}"]), graph.input(f"offsets_{name}", np.int64, ["batch"]))
        for name in range(len(tables.table_rows) - single)
    ]
    if isinstance(tables, PackedEmbeddingBagCollection):
        return _vectors(graph, tables, "tables", ids, bags)
    vectors = []
    for number, (part, members) in enumerate(zip(tables.parts, tables.members.values())):
        assert isinstance(part, PackedEmbeddingBagCollection)
        columns = [table for table in members if table < single]
        own = graph.node("Gather", ids, graph.ints(*columns), axis=1) if columns else ""
        many = [bags[table - single] for table in members if table >= single]
        vectors.append(_vectors(graph, part, f"tables.parts.{number}", own, many))
    return graph.node("Gather", concat(graph, vectors, 1), graph.ints(*tables.order.tolist()), axis=1)


def _vectors(
    graph: Graph, tables: PackedEmbeddingBagCollection, name: str, ids: str, bags: Sequence[tuple[str, str]]
) -> str:
    """The vectors [B, T, dim] of tables of one bit width; their initializers begin with `name`."""
    graph.streamed[f"{name}.codes"] = tables.codes
    if tables.rows_per_scale is not None:
        graph.streamed[f"{name}.scale"] = tables.scale[:, None]
        if tables.zero_point is not None:
            graph.streamed[f"{name}.zero_point"] = tables.zero_point[:, None]
    single, vectors = tables.num_single, []
    if single:
        vectors.append(_look_up(graph, tables, name, ids, slice(0, single), axis=2))
    for number, (values, offsets) in enumerate(bags, start=single):
        rows = _look_up(graph, tables, name, values, slice(number, number + 1), axis=1)
        pooled = _pool(graph, rows, values, offsets, tables.embedding_dim, tables.pooling)
        vectors.append(graph.node("Unsqueeze", pooled, graph.ints(1)))
    return concat(graph, vectors, 1)


def _look_up(graph: Graph, tables: PackedEmbeddingBagCollection, name: str, ids: str, of: slice, axis: int) -> str:
    """Values of ids [..., T] of the T tables `of`: ids' dimensions, then dim, which is number `axis`."""
    zero, count = graph.constant(0, np.int64), graph.constant(tables.rows_per_table[of].numpy())
    ids = graph.node("Max", graph.node("Where", graph.node("Less", ids, count), ids, zero), zero)
    rows, zero_point = graph.node("Add", ids, graph.constant(tables.row_offsets[of].numpy())), ""
    stored = graph.node("Gather", f"{name}.codes", rows)
    if tables.bits == 32:
        return stored
    if tables.rows_per_scale is not None:
        group = (
            ids
            if tables.rows_per_scale == 1
            else graph.node("Div", ids, graph.constant(tables.rows_per_scale, np.int64))
        )
        group = graph.node("Add", group, graph.constant(tables.group_offsets[of].numpy()))
        scale = graph.node("Gather", f"{name}.scale", group)
        if tables.zero_point is not None:
            zero_point = graph.cast_float(graph.node("Gather", f"{name}.zero_point", group))
    else:
        scale = graph.float(tables.scale[of].numpy()[:, None])
        if tables.zero_point is not None:
            zero_point = graph.float(tables.zero_point[of].numpy()[:, None])
    return _decode(graph, stored, tables.bits, tables.embedding_dim, axis, scale, zero_point)


def _pool(graph: Graph, rows: str, values: str, offsets: str, dim: int, pooling: str) -> str:
    """Rows [n, dim] as one vector per bag [B, dim]; `nn.EmbeddingBag` in operators that add in order."""
    count, bags = graph.node("Shape", values), graph.node("Shape", offsets)
    begun = _add_at(graph, graph.node("Add", count, graph.ints(1)), offsets, _filled(graph, bags, 1))
    # A value's bag is the number of offsets up to it. Bag 0 would hold values before the first offset: there are none.
    bag = graph.node("CumSum", begun, graph.constant(0, np.int64))
    bag = graph.node("Slice", bag, graph.ints(0), graph.ints(-1), graph.ints(0))
    index = graph.node("Unsqueeze", bag, graph.ints(1))
    more = graph.node("Add", bags, graph.ints(1))
    shape = graph.node("Concat", more, graph.ints(dim), axis=0)
    summed = _add_at(graph, shape, graph.node("Expand", index, graph.node("Shape", rows)), rows, np.float32)
    if pooling == "mean":
        counts = _add_at(graph, more, bag, _filled(graph, count, 1))
        counts = graph.node("Unsqueeze", graph.node("Max", counts, graph.constant(1, np.int64)), graph.ints(1))
        summed = graph.node("Div", summed, graph.cast_float(counts))
    return graph.node("Slice", summed, graph.ints(1), graph.ints(2**62), graph.ints(0))


def _filled(graph: Graph, shape: str, value: int, dtype: type = np.int64) -> str:
    from onnx import numpy_helper

    return graph.node("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([value], dtype)))


def _add_at(graph: Graph, shape: str, index: str, values: str, dtype: type = np.int64) -> str:
    """Zeros of `shape` with each of `values` added at its index along the first axis."""
    zeros = _filled(graph, shape, 0, dtype)
    return graph.node("ScatterElements", zeros, index, values, axis=0, reduction="add")
