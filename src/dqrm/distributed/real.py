"""The exchange between real processes, over torch.distributed: gloo on the CPU, NCCL on CUDA.

DistributedDataParallel gathers the MLP's gradients in buckets. When the backward pass is done, two all-to-all
collectives exchange everything: the first takes each owner its part of the MLP's gradients, with the length of the
rows' message; the second takes everybody the owners' sums and the rows. Fewer, larger collectives proved faster than
overlapping them with the backward pass (docs/distributed.md).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dqrm.config import ExchangeConfig
from dqrm.distributed.dense import Bucket
from dqrm.distributed.exchange import MLP, MLP_OWNER, TABLES_OWNER, Exchange, Gradient
from dqrm.distributed.sparse import add_up, join, reduce
from dqrm.distributed.world import World

# Bytes before each message of the first collective: the length of the rows' message and flags, as int32.
HEADER = 8


class RealRanks(Exchange):
    """See `Exchange`; `module` is the model inside DistributedDataParallel.

    Raises:
        RankLost: from every method, when another rank does not answer.
    """

    def __init__(
        self,
        module: nn.Module,
        tables: Any,
        parameters: Sequence[nn.Parameter],
        config: ExchangeConfig,
        world: World,
        seed: int,
    ) -> None:
        super().__init__(tables, parameters, config, world.size, range(world.rank, world.rank + 1), seed)
        self.world, self.rank = world, world.rank
        self._buckets: dict[tuple[int, ...], Bucket] = {}
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        # Tables are exchanged by rows, and every rank computes their scales itself.
        mine = {id(parameter) for parameter in self.parameters}
        ignored = [name for name, parameter in module.named_parameters() if id(parameter) not in mine]
        ignored += [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        with world.guard():
            self.module = DistributedDataParallel(
                module,
                process_group=world.group,
                gradient_as_bucket_view=True,
            )
        self.module.register_comm_hook(None, self._hook)
        self._arrived: list[tuple[Bucket, Tensor]] = []
        self._kept: dict[str, Tensor] = {}

    def begin(self, step: int, flags: int = 0) -> None:
        super().begin(step, flags)
        self._arrived.clear()
        with self.world.guard():  # a collective after the first step and else nothing; unasked, forward would do it
            self.module.reducer._rebuild_buckets()  # type: ignore[operator,union-attr]

    def _hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP calls it when a bucket's gradients are there. They stay where they are, and `.grad` are views of them."""
        gradient = bucket.buffer()
        self._arrived.append((self._bucket_of(bucket.parameters()), gradient))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(gradient)
        return future

    def _bucket_of(self, parameters: Sequence[Tensor]) -> Bucket:
        numbers = tuple(self._numbers[id(parameter)] for parameter in parameters)
        if numbers not in self._buckets:
            places = zip(numbers, accumulate((parameter.numel() for parameter in parameters), initial=0))
            self._buckets[numbers] = Bucket(self.layout, list(places), self.size, self.mlp_codec, self.device)
        return self._buckets[numbers]

    def collect(self, rank: int) -> None:
        self._rows = self._local_rows()

    @torch.no_grad()
    def finish(self) -> Gradient:
        scales = self._row_scales(self.rank, self._rows)
        if scales is not None:
            self._largest(scales)
        rows, parts = self._encode_rows(self.rank, self._rows, scales)
        self._count_rows(parts)
        to_each = rows if self.owners_sum else rows * self.size
        totals, lengths = self._to_owners(list(map(len, to_each)))
        received = self._to_everybody(totals, to_each, lengths)
        self.steps += 1
        if not self.owners_sum:
            return add_up(self.row_codec, received)
        total, _ = reduce(self.row_codec, received, self._seed(TABLES_OWNER))
        return join(self.row_codec, self._all_gather(total))

    def _to_owners(self, announced: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """The first collective: this rank's sums, one for each bucket, and the lengths the ranks announce to it."""
        buckets = [bucket for bucket, _ in self._arrived]
        sizes = [HEADER + sum(bucket.sizes[owner] for bucket in buckets) for owner in range(self.size)]
        sent = self._buffer("sent", sum(sizes))
        regions = sent.split(sizes)
        about = torch.tensor([[length, self.flags] for length in announced], dtype=torch.int32).view(torch.uint8)
        for region, header in zip(regions, about.to(self.device)):
            region[:HEADER].copy_(header)
        place = [HEADER] * self.size
        for bucket, gradient in self._arrived:
            residual = self._residual(0)
            scales = bucket.scales(gradient, residual) if self.config.shared_scales else None
            if scales is not None:
                self._largest(scales)
            messages = [region[at : at + size] for region, at, size in zip(regions, place, bucket.sizes)]
            bucket.encode_into(messages, gradient, residual, self._seed(MLP, self.rank), scales)
            place = [at + size for at, size in zip(place, bucket.sizes)]
            self.payload["mlp_scales"] += bucket.scale_bytes
            self.payload["mlp_values"] += bucket.value_bytes
        mine = sizes[self.rank]
        received = self._buffer("received", self.size * mine)
        self._all_to_all(received, sent, [mine] * self.size, sizes)
        parts = received.view(self.size, mine)
        lengths = self._take_flags(parts[:, :HEADER].contiguous().view(torch.int32))
        totals, at = [], HEADER
        for bucket in buckets:
            messages = [part[at : at + bucket.sizes[self.rank]] for part in parts]
            totals.append(bucket.reduce(self.rank, messages, self.owner_residual, self._seed(MLP_OWNER)))
            at += bucket.sizes[self.rank]
        return totals, lengths

    def _to_everybody(self, totals: Sequence[Tensor], rows: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The second: the owners' sums into the gradients; returns the rows' messages of the ranks to this one."""
        dense = [sum(bucket.sizes[owner] for bucket, _ in self._arrived) for owner in range(self.size)]
        sizes = [dense[self.rank] + len(message) for message in rows]
        sent = self._buffer("sent_all", sum(sizes))
        for region, message in zip(sent.split(sizes), rows):
            torch.cat([*totals, message], out=region)
        incoming = [mlp + length for mlp, length in zip(dense, lengths)]
        received = self._buffer("received_all", sum(incoming))
        self._all_to_all(received, sent, incoming, sizes)
        parts = received.split(incoming)
        place = [0] * self.size
        for bucket, gradient in self._arrived:
            bucket.decode([part[at : at + size] for part, at, size in zip(parts, place, bucket.sizes)], gradient)
            place = [at + size for at, size in zip(place, bucket.sizes)]
        return [part[mlp:] for part, mlp in zip(parts, dense)]

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
        self.sent += 2 * (self.size - 1) * values.nbytes // self.size  # what a ring sends

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around collectives."""
        start = time.monotonic()
        with self.world.guard():
            yield
        self.waited += time.monotonic() - start

    def _take_flags(self, about: Tensor) -> list[int]:
        found: list[list[int]] = about.tolist()
        for _, flags in found:
            self.flags |= flags
        return [length for length, _ in found]

    def _buffer(self, name: str, size: int) -> Tensor:
        """Memory (uint8) that is used again in each step: fresh memory costs more than what is done with it."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = self._kept[name] = torch.empty(size + size // 8, dtype=torch.uint8, device=self.device)
        return kept[:size]

    # State.

    def _gathered(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: torch.cat(self.world.gather_rows(tensor) or [tensor]) for name, tensor in own.items()}
        if self.owner_residual is not None:
            # What this rank does not own is zero: the sum puts the owners' parts together.
            parts = self.world.gather_rows(self.owner_residual[None])
            if parts:
                found["mlp_owner_residual"] = torch.cat(parts).sum(0)
        return found if self.world.first else {}

    def _load_owner_residual(self, residual: Tensor) -> None:
        super()._load_owner_residual(residual)
        assert self.owner_residual is not None
        for number, start in enumerate(self.layout.starts):
            for owner, (begins, lengths) in enumerate(self.layout.owned(number, self.size)):
                if owner != self.rank:
                    for begin, length in zip(begins.tolist(), lengths.tolist()):
                        self.owner_residual[start + begin : start + begin + length] = 0
