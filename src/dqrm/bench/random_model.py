"""A model with random weights and full tables, as an artifact and with the same values in FP32."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqrm import __version__
from dqrm.artifact.container import Entry, write
from dqrm.artifact.file import KIND
from dqrm.bench.config import ARCHITECTURES, NUM_DENSE, BenchInferenceConfig
from dqrm.config import ModelConfig
from dqrm.export.weights import EncodedWeights
from dqrm.models.base import ClickModel, build_tables
from dqrm.models.dlrm import DLRM
from dqrm.models.registry import describe_model
from dqrm.quant.config import QATConfig
from dqrm.quant.packed import PackedLinear
from dqrm.quant.packing import decode, packed_width

# Values decoded at once stay in the processor's cache.
_PIECE = 1 << 14
# Rows drawn at once.
_CHUNK = 1 << 18


def write_artifact(path: Path, options: BenchInferenceConfig, table_rows: Sequence[int]) -> None:
    """An artifact with random codes: tables of uniform codes on the scale of initial weights, MLPs as drawn."""
    arch, bits = ARCHITECTURES[options.arch], options.bits
    config = ModelConfig(embedding_dim=arch.embedding_dim, bottom_mlp=arch.bottom_mlp, top_mlp=arch.top_mlp)
    # A model of the same layers on tables of one row each: drawing full tables would take their FP32 memory.
    model = DLRM(NUM_DENSE, [1] * len(table_rows), config=config, qat=QATConfig(bits=bits), seed=options.seed).eval()
    rows, width = sum(table_rows), packed_width(arch.embedding_dim, bits)

    def codes() -> Iterator[Tensor]:
        draw = np.random.default_rng(options.seed)
        for start in range(0, rows, _CHUNK):
            yield torch.from_numpy(draw.integers(0, 256, (min(_CHUNK, rows - start), width), np.uint8))

    highest = 2 ** (bits - 1) - 1
    scale = torch.tensor([count**-0.5 / highest for count in table_rows])
    tables = [Entry("tables.codes", torch.uint8, (rows, width), codes), Entry.of("tables.scale", scale)]
    replaced = {entry.name: entry for entry in tables}
    described = describe_model(model, bits, bits) | {"table_rows": list(table_rows)}
    content = {
        "model": described,
        "quantization": {"method": "none"},
        "schema": {
            "dense": [f"I{number}" for number in range(1, NUM_DENSE + 1)],
            "columns": [
                {"name": f"C{number}", "rows": count, "multi": False}
                for number, count in enumerate(table_rows, start=1)
            ],
        },
        "options": None,
        "vocabulary": {"mode": "none"},
        "provenance": {
            "dqrm": __version__,
            "data": {"fingerprint": "random weights"},
            "run": {"config": asdict(options), "checkpoint": "none", "step": 0, "metrics": {}},
        },
    }
    write(path, KIND, content, [replaced.get(entry.name, entry) for entry in EncodedWeights(model).entries()])


@torch.no_grad()
def fp32_model(packed: ClickModel) -> ClickModel:
    """The model with the same values in FP32, tables included."""
    tables: Any = packed.tables
    weight = torch.empty(len(tables.codes), tables.embedding_dim)
    for codes, values, scale in zip(
        tables.codes.split(tables.table_rows), weight.split(tables.table_rows), tables.scale
    ):
        for stored, piece in zip(codes.split(_PIECE), values.split(_PIECE)):
            piece.copy_(decode(stored, scale, tables.bits, tables.embedding_dim))
    qat = QATConfig(bits=32)
    given = build_tables(tables.table_rows, packed.config, qat, weight=weight)
    model = type(packed)(packed.num_dense, given, config=packed.config, qat=qat).eval()
    for theirs, mine in zip(_linear(packed), _linear(model)):
        assert isinstance(theirs, PackedLinear)
        mine.weight.copy_(theirs.weight())
        mine.bias.copy_(theirs.bias)
    return model


def _linear(model: ClickModel) -> list[Any]:
    layers = [layer for stack in model.stacks().values() for layer in stack.children()]
    return [layer for layer in layers if not isinstance(layer, nn.ReLU)]
