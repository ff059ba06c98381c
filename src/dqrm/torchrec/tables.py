"""The rows of sharded tables outside of TorchRec: the scales that the codec gives them, and the tables as a whole."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dqrm.quant.row_codec import RowCodec

_WEIGHT = ".weight"


def row_scales(table: Tensor, codec: str = "int4", scale: str = "fp32") -> Tensor:
    """The scale that the forward codec gives each row of a table float32 [rows, dim]: float32 [rows].

    It depends on the row alone, so evaluation and export on any machine agree with training. With 'fp32' it is that of
    `QATConfig(table_granularity="row")`.

    Raises:
        ValueError: an unknown codec or scale, or a table of the wrong dtype or shape.
    """
    return _codec(table, codec, scale).scales(table.detach())


def fake_quantize_rows(rows: Tensor, codec: str = "int4", scale: str = "fp32") -> Tensor:
    """Rows float32 [N, dim] as the ranks receive them from the forward codec; the gradient passes unchanged (STE).

    Raises:
        ValueError: as `row_scales`.
    """
    return _codec(rows, codec, scale).fake_quantize(rows)


def gather_tables(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """The tables of a sharded module, one after the other: (name, float32 [rows, dim] on CPU), on rank 0; else None.

    Call it on all ranks, to the end: each step is a collective. Rank 0 holds one table at a time, and its shards.
    """
    for name, weight in module.state_dict().items():
        if isinstance(weight, ShardedTensor) and name.endswith(_WEIGHT):
            size = weight.metadata().size
            first = torch.distributed.get_rank() == 0
            whole = torch.empty(*size, dtype=torch.float32) if first else None
            weight.gather(dst=0, out=whole)
            yield name.removesuffix(_WEIGHT).rpartition(".")[2], whole


def _codec(rows: Tensor, codec: str, scale: str) -> RowCodec:
    if rows.ndim != 2:
        raise ValueError(f"rows are {list(rows.shape)}, expected [N, dim]")
    return RowCodec(rows.shape[1], codec, scale)
