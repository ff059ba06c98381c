"""The exchange between real processes, over torch.distributed: gloo on the CPU, NCCL on CUDA.

The MLP's gradients come from DistributedDataParallel, bucket by bucket while the backward pass still runs; a thread
exchanges them in the order in which they came, the same on all ranks. The tables' follow after the backward pass.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dqrm.config import ExchangeConfig
from dqrm.distributed.codecs import padded
from dqrm.distributed.dense import Bucket
from dqrm.distributed.exchange import _MLP, _MLP_OWNER, _TABLES_OWNER, Exchange, Gradient
from dqrm.distributed.sparse import add_up, join, reduce
from dqrm.distributed.world import World

# One bucket for the top MLP of the paper's models and one for the bottom MLP, whose backward pass comes later.
_BUCKET_MB = 1
# torch 2.13 has a new name for it and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
                bucket_cap_mb=_BUCKET_MB,
                gradient_as_bucket_view=True,
            )
        self.module.register_comm_hook(None, self._hook)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dqrm-exchange")
        self._error: BaseException | None = None
        self._ready = 0.0  # when the last gradient was there
        tables.weight.register_post_accumulate_grad_hook(self._note_ready)

    def _note_ready(self, _: Tensor) -> None:
        self._ready = time.monotonic()

    def collect(self, rank: int) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.waited += time.monotonic() - self._ready  # the backward pass ended when the thread had exchanged all
        self._rows = self._local_rows()

    def finish(self) -> Gradient:
        gradient = self._reduce_rows(self._rows)
        self.steps += 1
        return gradient

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around collectives of the main thread, which stands still for them."""
        start = time.monotonic()
        with self.world.guard():
            yield
        self.waited += time.monotonic() - start

    # The MLP.

    def _hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP calls it when a bucket's gradients are there; the future holds what it puts into `.grad`."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        gradient, parameters = bucket.buffer(), bucket.parameters()
        self._ready = time.monotonic()

        def run() -> None:
            try:
                if self._error is None:
                    with torch.no_grad():
                        self._reduce_mlp(gradient, parameters)
            except BaseException as error:
                self._error = error  # raised by collect(): autograd would wrap it
            future.set_result(gradient)

        self._thread.submit(run)
        return future

    def _reduce_mlp(self, gradient: Tensor, parameters: Sequence[Tensor]) -> None:
        numbers = tuple(self._numbers[id(parameter)] for parameter in parameters)
        bucket = self._buckets.get(numbers)
        if bucket is None:
            places, at = [], 0
            for number, parameter in zip(numbers, parameters):
                places.append((number, at))
                at += parameter.numel()
            bucket = self._buckets[numbers] = Bucket(self.layout, places, self.size, self.mlp_codec, self.device)
        residual = self._residual(0)
        scales = bucket.scales(gradient, residual) if self.config.shared_scales else None
        if scales is not None:
            with self.world.guard():
                self._largest(scales)
        sent = bucket.encode(gradient, residual, self._seed(_MLP, self.rank), scales)
        mine = bucket.sizes[self.rank]
        received = sent.new_empty(self.size * mine)
        with self.world.guard():
            dist.all_to_all_single(received, sent, [mine] * self.size, bucket.sizes, group=self.world.group)
        total = sent.new_zeros(bucket.largest)
        total[:mine] = bucket.reduce(
            self.rank, list(received.view(self.size, mine)), self.owner_residual, self._seed(_MLP_OWNER)
        )
        gathered = sent.new_empty(self.size * bucket.largest)
        with self.world.guard():
            _all_gather(gathered, total, group=self.world.group)
        bucket.decode(list(gathered.view(self.size, -1)), gradient)
        self.sent += sum(bucket.sizes) - mine + (self.size - 1) * bucket.largest
        self.payload["mlp_scales"] += bucket.scale_bytes
        self.payload["mlp_values"] += bucket.value_bytes

    def _largest(self, values: Tensor) -> Tensor:
        """The maximum over the ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.world.group)
        self.sent += 2 * (self.size - 1) * values.nbytes // self.size  # what a ring sends
        return values

    # The tables.

    def _reduce_rows(self, gradient: Gradient) -> Gradient:
        scales = self._row_scales(self.rank, gradient)
        if scales is not None:
            with self._waiting():
                self._largest(scales)
        messages, parts = self._encode_rows(self.rank, gradient, scales)
        self._count_rows(parts)
        if not self.owners_sum:
            return add_up(self.row_codec, self._all_gather(messages[0]))
        received = self._all_to_all(messages)
        total, _ = reduce(self.row_codec, received, self._seed(_TABLES_OWNER))
        return join(self.row_codec, self._all_gather(total))

    def _all_gather(self, message: Tensor) -> list[Tensor]:
        """The message (uint8) of every rank, in their order; flags are joined on the way."""
        about = torch.tensor([len(message), self.flags], device=self.device)
        lengths = about.new_empty(self.size, 2)
        with self._waiting():
            _all_gather(lengths.view(-1), about, group=self.world.group)
        counts = self._take_flags(lengths)
        longest = padded(max(counts))
        sent = message.new_zeros(longest)
        sent[: len(message)] = message
        received = message.new_empty(self.size, longest)
        with self._waiting():
            _all_gather(received.view(-1), sent, group=self.world.group)
        self.sent += (self.size - 1) * (longest + about.nbytes)
        return [part[:count] for part, count in zip(received, counts)]

    def _all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """What each rank has for this one, in their order, where messages[r] is for rank r."""
        about = torch.tensor([[len(message), self.flags] for message in messages], device=self.device)
        lengths = torch.empty_like(about)
        with self._waiting():
            dist.all_to_all_single(lengths, about, group=self.world.group)
        counts = self._take_flags(lengths)
        received = messages[0].new_empty(sum(counts))
        with self._waiting():
            dist.all_to_all_single(
                received, torch.cat(list(messages)), counts, [len(message) for message in messages],
                group=self.world.group,
            )  # fmt: skip
        self.sent += sum(map(len, messages)) - len(messages[self.rank]) + (self.size - 1) * about[0].nbytes
        return list(received.split(counts))

    def _take_flags(self, about: Tensor) -> list[int]:
        found: list[list[int]] = about.tolist()
        for _, flags in found:
            self.flags |= flags
        return [count for count, _ in found]

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
