"""The exchange between real processes, over torch.distributed: gloo on the CPU, NCCL on CUDA.

After the backward pass, two all-to-all collectives exchange everything: the first sends each owner its part of
the MLP's gradients, with the length of the rows' message; the second sends every rank the owners' sums and the rows.
Fewer, larger collectives proved faster than overlapping them with the backward pass (docs/distributed.md).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dqrm.distributed.config import ExchangeConfig
from dqrm.distributed.exchange import MLP, MLP_OWNER, TABLES_OWNER, Gradient, RankExchange
from dqrm.distributed.rows import Shard, ShardedRows
from dqrm.distributed.sparse import add_up, join, reduce
from dqrm.distributed.world import World

# Bytes before each message of the first collective: the length of the rows' message and flags, as int32.
HEADER = 8


class RealRanks(RankExchange):
    """See `RankExchange`; all ranks start from rank 0's `parameters`.

    Raises:
        RankLost: from every method, if another rank does not answer.
    """

    def __init__(
        self,
        tables: Any,
        parameters: Sequence[nn.Parameter],
        config: ExchangeConfig,
        world: World,
        seed: int,
    ) -> None:
        local = range(world.rank, world.rank + 1)
        super().__init__(tables, parameters, config, world.size, local, world.size, seed)
        self.world, self.rank = world, world.rank
        for parameter in self.parameters:
            world.broadcast(parameter.detach())
        self._kept: dict[str, Tensor] = {}

    def _exchange(self) -> Gradient:
        (gradient,) = self.rows
        scales = self._row_scales(gradient)
        if scales is not None:
            self._largest(scales)
        rows, parts = self._encode_rows(self.rank, gradient, scales)
        self._count(parts)
        to_each = rows if self.owners_sum else rows * self.size
        total, lengths = self._to_owners(list(map(len, to_each)))
        received = self._to_everybody(total, to_each, lengths)
        if not self.owners_sum:
            return add_up(self.row_codec, received)
        summed, _ = reduce(self.row_codec, received, self._seed(TABLES_OWNER))
        return join(self.row_codec, self._all_gather(summed))

    def _to_owners(self, announced: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The first collective: this rank's sum of what it owns, encoded, and the lengths the ranks announce to it."""
        bucket, gradient, residual = self.bucket, self.gradients[0], self._residual(0)
        sizes = [HEADER + size for size in bucket.sizes]
        sent = self._buffer("sent", sum(sizes))
        regions = sent.split(sizes)
        about = torch.tensor([[length, self.flags] for length in announced], dtype=torch.int32).view(torch.uint8)
        for region, header in zip(regions, about.to(self.device)):
            region[:HEADER].copy_(header)
        scales = bucket.scales(gradient, residual) if self.config.shared_scales else None
        if scales is not None:
            self._largest(scales)
        messages = [region[HEADER:] for region in regions]
        bucket.encode_into(messages, gradient, residual, self._seed(MLP, self.rank), scales)
        mine = sizes[self.rank]
        received = self._buffer("received", self.size * mine)
        self._all_to_all(received, sent, [mine] * self.size, sizes)
        parts = received.view(self.size, mine)
        lengths = self._take_flags(parts[:, :HEADER].contiguous().view(torch.int32))
        return bucket.reduce(self.rank, list(parts[:, HEADER:]), self.owner_residual, self._seed(MLP_OWNER)), lengths

    def _to_everybody(self, total: Tensor, rows: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The second: owners' sums into the gradients; returns the rows' messages of the ranks to this one."""
        owned = self.bucket.sizes
        sizes = [owned[self.rank] + len(message) for message in rows]
        sent = self._buffer("sent_all", sum(sizes))
        for region, message in zip(sent.split(sizes), rows):
            torch.cat([total, message], out=region)
        incoming = [mlp + length for mlp, length in zip(owned, lengths)]
        received = self._buffer("received_all", sum(incoming))
        self._all_to_all(received, sent, incoming, sizes)
        parts = received.split(incoming)
        self.bucket.decode([part[:mlp] for part, mlp in zip(parts, owned)], self.gradients[0])
        return [part[mlp:] for part, mlp in zip(parts, owned)]

    def _all_gather(self, message: Tensor) -> list[Tensor]:
        """The message (uint8) of every rank, in their order."""
        about = torch.full((self.size,), len(message), device=self.device)
        lengths = torch.empty_like(about)
        self._all_to_all(lengths.view(torch.uint8), about.view(torch.uint8), [8] * self.size, [8] * self.size)
        counts: list[int] = lengths.tolist()
        received = self._buffer("gathered", sum(counts))
        self._all_to_all(received, message.repeat(self.size), counts, [len(message)] * self.size)
        return list(received.split(counts))

    def _all_to_all(self, received: Tensor, sent: Tensor, incoming: list[int], outgoing: list[int]) -> None:
        """Bytes: outgoing[r] of them to rank r, incoming[r] from it. Its messages need fewer hops than a ring's."""
        with self._waiting():
            dist.all_to_all_single(received, sent, incoming, outgoing, group=self.world.group)
        self.sent += sum(outgoing) - outgoing[self.rank]

    def _largest(self, values: Tensor) -> None:
        """The maximum over the ranks, in place."""
        with self._waiting():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.world.group)
        self.sent += 2 * (self.size - 1) * values.nbytes // self.size  # as in a ring

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around collectives: measure the time waited."""
        start = time.monotonic()
        with self.world.guard():
            yield
        self.waited += time.monotonic() - start

    def _take_flags(self, about: Tensor) -> list[int]:
        headers: list[list[int]] = about.tolist()
        for _, flags in headers:
            self.flags |= flags
        return [length for length, _ in headers]

    def _buffer(self, name: str, size: int) -> Tensor:
        """Memory (uint8) that is reused in each step: allocating costs more than using it."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = self._kept[name] = torch.empty(size + size // 8, dtype=torch.uint8, device=self.device)
        return kept[:size]

    # State.

    def state(self) -> dict[str, Tensor]:
        gathered = {name: self.world.gather_rows(tensor) for name, tensor in self._own_state().items()}
        return {name: whole for name, whole in gathered.items() if whole is not None}

    def residual_rows(self) -> dict[str, ShardedRows]:
        if self.residuals is None:
            return {}
        total, size = self.layout.total, self.size
        shards = [
            Shard(rank * total, total, rank, self.residuals[0] if rank == self.rank else None) for rank in range(size)
        ]
        values = partial(ShardedRows, shape=(), world=self.world, device=self.device)
        return {"mlp_residual": values(shards, stored=(size, total)), "mlp_owner_residual": values(self._owned())}

    def _owned(self) -> list[Shard]:
        """The owners' parts of `owner_residual`: consecutive blocks of each parameter."""
        assert self.owner_residual is not None
        found = []
        for number, start in enumerate(self.layout.starts):
            for owner, (begins, lengths) in enumerate(self.layout.owned(number, self.size)):
                if len(begins):
                    first, count = start + int(begins[0]), int(lengths.sum())
                    own = self.owner_residual[first : first + count] if owner == self.rank else None
                    found.append(Shard(first, count, owner, own))
        return found

    def _load_owner_residual(self, residual: Tensor) -> None:
        for shard in self._owned():
            if shard.rows is not None:
                shard.rows.copy_(residual[shard.first : shard.first + shard.length])
