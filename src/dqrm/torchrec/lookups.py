"""Optimizers of ours in TorchRec's lookups: FBGEMM 1.8 has fused Adam on GPUs only ("not supported in CPU mode")."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqrm.torchrec.collection import ShardedTables


class Group(NamedTuple):
    """The tables that FBGEMM has in one tensor on this rank.

    Attributes:
        lookup: TorchRec's module that looks their rows up.
        weight: float32 [rows, dim], a view of FBGEMM's.
        starts: of each table, its first row in `weight`.
        firsts: of each table, the number of that row among the rows of all tables of the model.
    """

    lookup: Any
    weight: nn.Parameter
    starts: list[int]
    firsts: list[int]


def groups_of(tables: ShardedTables) -> list[Group]:
    """The groups that this rank has: one of row-wise, one of table-wise tables, none where it has no rows."""
    offsets: list[int] = tables.row_offsets.tolist()
    found = []
    for lookup in (each for part in tables.sharded._lookups for each in part._emb_modules):
        module = lookup.emb_module
        weight = nn.Parameter(module.weights_host.detach().view(-1, tables.embedding_dim))
        starts = [int(offset) // tables.embedding_dim for offset in module.weights_physical_offsets]
        firsts = [
            offsets[int(table.name.removeprefix("t"))] + table.local_metadata.shard_offsets[0]
            for table in lookup._config.embedding_tables
        ]
        found.append(Group(lookup, weight, starts, firsts))
    return found


def update_in_backward(group: Group, update: Callable[[Tensor, Tensor], None]) -> None:
    """Look the rows of a group up here in place of FBGEMM, whose optimizer then never runs.

    Args:
        update: called in the backward pass with rows of `group.weight`, int64 [N], repeated or not, and their
            gradients, float32 [N, dim].
    """
    anchor = torch.empty(0, requires_grad=True)
    starts = torch.tensor(group.starts)

    def forward(features: Any) -> Tensor:
        counts = torch.tensor(features.length_per_key())
        rows = features.values().long() + starts.repeat_interleave(counts)
        return _Lookup.apply(anchor, group.weight.detach(), rows, update)

    group.lookup.forward = forward


class _Lookup(torch.autograd.Function):
    """Rows of a weight, which `update` changes in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weight: Tensor, rows: Tensor, update: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.update = partial(update, rows)
        return weight.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.update(grads[0])
        return None, None, None, None
