"""Rows or values that are on several ranks, by their number in one contiguous tensor, as a checkpoint has them.

They pass rank 0 in pieces: it never holds more than one, and only it reads and writes files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dqrm.distributed.world import World

# Bytes of a piece; several are alive while one is received, one written and one hashed.
PIECE = 1 << 20


class Shard(NamedTuple):
    """Some rows: the number of the first, how many, the rank that has them, and there the rows themselves."""

    first: int
    length: int
    rank: int
    rows: Tensor | None


class ShardedRows:
    """A tensor [R, ...] whose rows are on several ranks: of tables or their optimizer, or residuals.

    Args:
        shards: all of them. shape: of a row in a checkpoint; on its rank it has as many values.
        world: the ranks; its methods are called on all of them, but for `local`.
        encode: what a rank sends in place of its rows [N, width], as values [N, *shape].
        dtype: of the values, 4 bytes each. device: where they are.
        stored: shape of the tensor in a checkpoint, where it is not [R, *shape].

    Attributes:
        count: R. shape: of the tensor in a checkpoint.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shape: Sequence[int],
        world: World,
        encode: Callable[[Tensor], Tensor] | None = None,
        width: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stored: Sequence[int] | None = None,
    ) -> None:
        self.shards = sorted(shards, key=lambda shard: shard.first)
        self.world, self._encode = world, encode
        self.row_shape, self.dtype, self.device = tuple(shape), dtype, device
        self._rows_at_once = max(1, PIECE // (4 * max(width, torch.Size(self.row_shape).numel())))
        self.count = sum(shard.length for shard in shards)
        self.shape = (self.count, *self.row_shape) if stored is None else tuple(stored)

    def like(
        self, own: Mapping[int, Tensor], shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> "ShardedRows":
        """Other values of the same rows.

        Args:
            own: of this rank's shards, by the number of their first row; what follows their rows is left out.
            shape, dtype: as of `ShardedRows`.
        """
        shards = [
            each._replace(rows=own[each.first][: each.length] if each.first in own else None) for each in self.shards
        ]
        return ShardedRows(shards, shape, self.world, dtype=dtype)

    def local(self, first: int, last: int) -> list[tuple[int, Tensor]]:
        """Of the rows `first` to `last` those that this rank has: (number of the first, views), in order."""
        return [
            (begin, shard.rows[begin - shard.first : end - shard.first])
            for shard, begin, end in self._within(first, last)
            if shard.rows is not None
        ]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The rows that are sent at a time, as (first, last + 1)."""
        for first in range(0, self.count, self._rows_at_once):
            yield first, min(first + self._rows_at_once, self.count)

    @torch.no_grad()
    def gather(self, first: int, last: int) -> Tensor | None:
        """These rows on rank 0: [last - first, *row_shape]; None on the others."""
        size = (last - first, *self.row_shape)
        whole = torch.empty(size, dtype=self.dtype, device=self.device) if self.world.first else None
        with self.world.guard():
            for shard, begin, end in self._within(first, last):
                if whole is None and shard.rows is None:
                    continue
                into = None if whole is None else whole[begin - first : end - first]
                if shard.rows is not None:
                    own = shard.rows[begin - shard.first : end - shard.first]
                    own = (self._encode(own) if self._encode else own).reshape(-1, *self.row_shape).contiguous()
                    if into is None:
                        dist.send(own, 0, group=self.world.group)
                    else:
                        into.copy_(own)
                elif into is not None:
                    dist.recv(into, shard.rank, group=self.world.group)
        return whole

    @torch.no_grad()
    def scatter(self, first: int, last: int, values: Tensor | None) -> None:
        """Rank 0's `values` [last - first, *row_shape] into these rows."""
        with self.world.guard():
            for shard, begin, end in self._within(first, last):
                own = None if shard.rows is None else shard.rows[begin - shard.first : end - shard.first]
                if values is not None:
                    sent = values[begin - first : end - first].contiguous()
                    if own is None:
                        dist.send(sent, shard.rank, group=self.world.group)
                    else:
                        own.copy_(sent.view_as(own))
                elif own is not None:
                    received = torch.empty(end - begin, *self.row_shape, dtype=self.dtype, device=self.device)
                    dist.recv(received, 0, group=self.world.group)
                    own.copy_(received.view_as(own))

    def _within(self, first: int, last: int) -> Iterator[tuple[Shard, int, int]]:
        for shard in self.shards:
            begin, end = max(first, shard.first), min(last, shard.first + shard.length)
            if begin < end:
                yield shard, begin, end
