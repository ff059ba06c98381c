"""Converted models of every kind that the writers must write, and batches for them."""

from collections.abc import Callable

import numpy as np
import torch

from dqrm.config import ModelConfig
from dqrm.data.batches import Batch
from dqrm.models.base import ClickModel
from dqrm.models.registry import model_class
from dqrm.quant.config import QATConfig
from dqrm.quant.convert import convert
from dqrm.quant.packed import PackedEmbeddingBagCollection

SIZES = (7, 1, 40, 9)
DCN = {"model": "dcn", "cross_layers": 2, "deep_mlp": (11, 6)}
NORM = {"batch_norm": True, "dropout": 0.3}
# name -> (dense columns, tables, multi-valued ones of them, ModelConfig, QATConfig)
KINDS = {
    **{f"{bits} bits": (3, 4, 0, {}, {"bits": bits}) for bits in (2, 4, 8, 16, 32)},
    "dim 5": (3, 4, 0, {"embedding_dim": 5}, {"bits": 4}),
    "dim 3 of 2 bits": (3, 4, 1, {"embedding_dim": 3}, {"bits": 2}),
    "cat": (3, 4, 0, {"interaction": "cat"}, {}),
    "self-interaction": (3, 4, 0, {"self_interaction": True}, {}),
    "no dense": (0, 4, 0, {}, {}),
    "no dense, cat, bags alone": (0, 2, 2, {"interaction": "cat"}, {}),
    "no tables": (3, 0, 0, {}, {}),
    "no tables, cat": (3, 0, 0, {"interaction": "cat"}, {}),
    "one table": (3, 1, 0, {}, {}),
    "one bag": (3, 1, 1, {}, {}),
    "bags, sum": (3, 4, 2, {}, {}),
    "bags, mean": (3, 4, 2, {"pooling": "mean"}, {}),
    "bags of 32 bits": (3, 4, 1, {"pooling": "mean"}, {"bits": 32}),
    "8-bit activations": (3, 4, 1, {}, {"activation_bits": 8}),
    "lsq": (3, 4, 1, {}, {"quantizer": "lsq"}),
    "lsq of 2 bits per tensor": (3, 4, 0, {}, {"quantizer": "lsq", "bits": 2, "linear_granularity": "tensor"}),
    "lsq and pact": (3, 4, 1, {}, {"quantizer": "lsq", "activation_bits": 8, "activation_quantizer": "pact"}),
    "32-bit MLP, 8-bit activations": (3, 4, 0, {}, {"mlp_bits": 32, "activation_bits": 8}),
    "scale per tensor": (3, 4, 0, {}, {"linear_granularity": "tensor", "bias_bits": 8}),
    "small tables of 8 bits": (3, 4, 0, {}, {"small_table_bits": 8, "small_table_rows": 9}),
    "small tables of 16 bits, bags": (0, 4, 2, {"embedding_dim": 5}, {"small_table_bits": 16, "small_table_rows": 9}),
    "small tables of 32 bits, bags alone": (
        3,
        4,
        4,
        {"pooling": "mean"},
        {"bits": 2, "small_table_bits": 32, "small_table_rows": 8},
    ),
    "a scale per row": (3, 4, 1, {}, {"table_granularity": "row"}),
    "a scale per 4 rows": (3, 4, 1, {"embedding_dim": 5}, {"table_granularity": "block:4"}),
    "affine": (3, 4, 1, {}, {"table_qscheme": "affine"}),
    "affine, a scale per row, 2 bits": (
        0,
        4,
        1,
        {},
        {"table_qscheme": "affine", "table_granularity": "row", "bits": 2},
    ),
    "affine, a scale per 4 rows, bags alone, 16 bits": (
        3,
        4,
        4,
        {"pooling": "mean"},
        {"table_qscheme": "affine", "table_granularity": "block:4", "bits": 16},
    ),
    "large tables of 32 bits": (3, 4, 1, DCN, {"table_bits": 32, "small_table_bits": 4, "small_table_rows": 8}),
    "dcn": (3, 4, 0, DCN, {}),
    "dcn, stacked, low rank, norm, bags": (3, 4, 2, DCN | {"structure": "stacked", "cross_rank": 2} | NORM, {}),
    "dcn, norm, scale per tensor": (3, 4, 0, DCN | NORM, {"linear_granularity": "tensor", "bias_bits": 8}),
    "dcn, norm, 32-bit MLP": (0, 4, 0, DCN | NORM, {"mlp_bits": 32}),
    "dcn, no deep, no tables": (3, 0, 0, DCN | {"deep_mlp": ()}, {}),
}


def made(kind: str) -> ClickModel:
    """A converted model with values well away from 0."""
    dense, tables, bags, config, qat = KINDS[kind]
    dim = config.get("embedding_dim", 4)
    widths = {} if "model" in config else {"bottom_mlp": (9, dim), "top_mlp": (11, 1)}
    architecture = ModelConfig(**{"embedding_dim": dim, **widths, **config})
    multi = [number >= tables - bags for number in range(tables)]
    model = model_class(architecture)(dense, SIZES[:tables], multi=multi, config=architecture, qat=QATConfig(**qat))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            train_norm(module)
        if hasattr(module, "activation_max"):
            module.activation_max.detach().fill_(1.5)
    return convert(model.eval())


def train_norm(norm: torch.nn.BatchNorm1d) -> None:
    """Statistics and weights as training may leave them: one scale is negative and one is 0."""
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.3, 3)
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[0], norm.weight[1] = -0.7, 0
        norm.bias.uniform_(-1, 1)


def with_row_scales(model: ClickModel) -> ClickModel:
    """The same model with another scale for each row."""
    tables = model.tables
    model.tables = PackedEmbeddingBagCollection(
        tables.table_rows,
        tables.embedding_dim,
        multi=tables.multi,
        pooling=tables.pooling,
        bits=tables.bits,
        codes=tables.codes,
        scale=torch.linspace(0.05, 0.4, len(tables.codes)),
    )
    return model


def batch(model: ClickModel, rows: int, seed: int = 0, empty: bool = False) -> Batch:
    """Random samples; bags of 0 to 3 ids, the last one empty (`empty`: all of them)."""
    random, tables = np.random.default_rng(seed), model.tables
    single, bags = [], []
    for number, count in enumerate(tables.table_rows):
        if number < tables.num_single:
            single.append(torch.from_numpy(random.integers(0, count, rows).astype(np.int32)))
            continue
        lengths = random.integers(0, 1 if empty else 4, rows)
        lengths[-1:] = 0
        values = random.integers(0, count, lengths.sum()).astype(np.int32)
        bags.append((torch.from_numpy(values), torch.from_numpy(np.cumsum(lengths) - lengths)))
    dense = torch.from_numpy(random.standard_normal((rows, model.num_dense)).astype(np.float32))
    ids = torch.stack(single, 1) if single else torch.empty(rows, 0, dtype=torch.int32)
    return Batch(dense, ids, tuple(bags), torch.zeros(rows))


def expected(model: ClickModel, rows: Batch) -> torch.Tensor:
    """Logits of the model itself."""
    with torch.no_grad():
        return model(rows.dense, rows.ids, rows.bags)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Probabilities that differ by rounding alone."""
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sigmoid(), wanted.sigmoid(), rtol=0, atol=tolerance)


def compare(model: ClickModel, score: Callable[[Batch], torch.Tensor]) -> None:
    """Whether an exported file gives what its model gives: for no rows, few and many, and for empty bags."""
    for rows in (0, 1, 5, 300):
        samples = batch(model, rows)
        assert_same(score(samples), expected(model, samples))
    if model.tables.num_single < len(model.tables.table_rows):
        samples = batch(model, 3, empty=True)
        assert_same(score(samples), expected(model, samples))
