"""A training step whose tables are sharded: they are updated in the backward pass, and only the MLP's gradients are
exchanged here."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.config import Config
from dqrm.data.batches import Batch
from dqrm.distributed.exchange import Exchange
from dqrm.distributed.real import RealRanks
from dqrm.distributed.rows import ShardedRows
from dqrm.distributed.world import World
from dqrm.models.base import ClickModel
from dqrm.torchrec.collection import ShardedTables
from dqrm.torchrec.lookups import Group, groups_of, update_in_backward
from dqrm.training.optimizers import Pair, SparseOptimizer, build_optimizers
from dqrm.training.step import TrainStep

FUSED = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
"""FBGEMM's fused optimizers on the CPU, by our names."""
OURS = ("adam", "rowwise_adam")
"""Optimizers of `training.optimizers` that run in the backward pass instead."""


class InBackward(SparseOptimizer):
    """Base: an optimizer that has updated the rows of sharded tables when the backward pass ends.

    Attributes:
        columns: its state as checkpoints of one machine have it: a row of each tensor for each row of the tables.
    """

    columns: dict[str, ShardedRows]

    def __init__(self, tables: ShardedTables) -> None:
        super().__init__([tables.weight], 0.0, 0.0, 0)
        self.columns = {}

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next backward pass."""
        raise NotImplementedError

    def reset_rows(self, rows: slice | Tensor) -> None:
        """As `SparseOptimizer.reset_rows`, of a slice."""
        assert isinstance(rows, slice)
        for column in self.columns.values():
            for _, own in column.local(rows.start, rows.stop):
                own.zero_()

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, group: dict[str, Any]) -> None:
        """Done already."""


class FusedOptimizer(InBackward):
    """FBGEMM's: `columns` has the sums of Adagrad, as `SparseAdagrad`, and nothing with SGD."""

    def __init__(self, tables: ShardedTables, rule: str) -> None:
        super().__init__(tables)
        self._fused = tables.sharded.fused_optimizer
        starts: list[int] = tables.row_offsets.tolist()
        own: dict[int, Tensor] = {}
        for state in self._fused.state_dict()["state"].values():
            for name, value in state.items():  # of a table that is on another rank there is none
                start = starts[int(name.partition(".")[0].removeprefix("t"))]
                own |= {start + each.metadata.shard_offsets[0]: each.tensor for each in value.local_shards()}
        if rule != "sgd":
            width = (1,) if rule == "rowwise_adagrad" else (tables.embedding_dim,)
            self.columns["sum"] = tables.weights.like(own, width)

    def set_rate(self, rate: float) -> None:
        for group in self._fused.param_groups:
            group["lr"] = rate
        self._fused.step()  # tells it to FBGEMM, and updates nothing


class OwnOptimizer(InBackward):
    """One of `OURS`, with its rule and state of one machine; FBGEMM only stores the rows.

    Args:
        tables: of which this rank has `groups`.
        optimizer: of the weights of these groups.
    """

    def __init__(self, tables: ShardedTables, groups: Sequence[Group], optimizer: SparseOptimizer) -> None:
        super().__init__(tables)
        self._own = optimizer
        # A rank may have no rows at all, but has to know what the others keep.
        spare = nn.Parameter(torch.empty(0, tables.embedding_dim))
        for name, empty in optimizer._new_state(spare).items():
            own: dict[int, Tensor] = {}
            for group in groups:
                state = optimizer.state[group.weight][name]
                own |= {first: state[start:] for first, start in zip(group.firsts, group.starts)}
            self.columns[name] = tables.weights.like(own, empty.shape[1:], empty.dtype)
        for group in groups:
            update_in_backward(group, partial(self._update_group, group.weight))

    def set_rate(self, rate: float) -> None:
        for group in self._own.param_groups:
            group["lr"] = rate

    def _update_group(self, weight: Tensor, rows: Tensor, values: Tensor) -> None:
        if len(rows):
            self._own._update(weight, rows, values, self._own.param_groups[0])


class ShardedStep(TrainStep):
    """See `TrainStep`."""

    def __init__(self, model: ClickModel, config: Config, world: World) -> None:
        self._world = world
        super().__init__(model, config, world)

    def _build_optimizers(self, groups: list[Any], config: Config) -> Pair:
        tables: Any = self.model.tables
        if config.optimizer.rule in FUSED:
            _, others = super()._build_optimizers(groups, config)
            return FusedOptimizer(tables, config.optimizer.rule), others
        here = groups_of(tables)
        weights = [group.weight for group in here] or [nn.Parameter(torch.empty(0, tables.embedding_dim))]
        own, others = build_optimizers(weights, groups, config.optimizer, config.training.seed)
        return OwnOptimizer(tables, here, own), others

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
