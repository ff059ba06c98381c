"""A training step whose tables are sharded: FBGEMM updates them in the backward pass, and only the MLP's gradients are
exchanged here."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.config import Config
from dqrm.data.batches import Batch
from dqrm.distributed.exchange import Exchange
from dqrm.distributed.real import RealRanks
from dqrm.distributed.world import World
from dqrm.models.base import ClickModel
from dqrm.torchrec.collection import ShardedTables
from dqrm.torchrec.rows import ShardedRows
from dqrm.training.optimizers import Pair, SparseOptimizer
from dqrm.training.step import TrainStep

FUSED = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
"""FBGEMM's fused optimizers on the CPU, by our names."""


class FusedOptimizer(SparseOptimizer):
    """FBGEMM's optimizer of sharded tables, which has updated the rows when the backward pass ends.

    Attributes:
        sums: Adagrad's accumulators, as `SparseAdagrad` has them; None with SGD.
    """

    def __init__(self, tables: ShardedTables, rule: str) -> None:
        super().__init__([tables.weight], 0.0, 0.0, 0)
        self._fused = tables.sharded.fused_optimizer
        starts: list[int] = tables.row_offsets.tolist()
        own: dict[int, Tensor] = {}
        for state in self._fused.state_dict()["state"].values():
            for name, value in state.items():  # of a table that is on another rank there is none
                start = starts[int(name.partition(".")[0].removeprefix("t"))]
                own |= {start + each.metadata.shard_offsets[0]: each.tensor for each in value.local_shards()}
        shards = [each._replace(rows=own.get(each.first)) for each in tables.weights.shards]
        width = () if rule == "sgd" else (1,) if rule == "rowwise_adagrad" else (tables.embedding_dim,)
        self.sums = ShardedRows(shards, width, tables.weights.world) if width else None

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next backward pass."""
        for group in self._fused.param_groups:
            group["lr"] = rate
        self._fused.step()  # tells it to FBGEMM, and updates nothing

    def reset_rows(self, rows: slice | Tensor) -> None:
        """As `SparseOptimizer.reset_rows`, of a slice."""
        assert isinstance(rows, slice)
        if self.sums is not None:
            for _, own in self.sums.local(rows.start, rows.stop):
                own.zero_()

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        """Done already."""


class ShardedStep(TrainStep):
    """See `TrainStep`."""

    def __init__(self, model: ClickModel, config: Config, world: World) -> None:
        self._world = world
        super().__init__(model, config, world)

    def _build_optimizers(self, groups: list[Any], config: Config) -> Pair:
        _, others = super()._build_optimizers(groups, config)
        return FusedOptimizer(self.model.tables, config.optimizer.rule), others

    def _build_exchange(self, others: list[nn.Parameter], config: Config, world: World) -> Exchange:
        none = SimpleNamespace(table_rows=(), embedding_dim=1, weight=nn.Parameter(torch.empty(0, 1)))
        dense = replace(config.exchange, table_exchange="all_gather")
        return RealRanks(none, others, dense, world, config.training.seed)

    def __call__(
        self, batch: Batch, rate: float, samples: int | None = None, number: int = 0, flags: int = 0
    ) -> Tensor:
        """As `TrainStep`."""
        self.optimizers[0].set_rate(rate * self._table_factor)  # type: ignore[attr-defined]
        return super().__call__(batch, rate, samples, number, flags)

    def backward(self, loss: Tensor) -> None:
        """As `TrainStep`; also exchanges and updates the rows."""
        with self._world.guard():
            super().backward(loss)
