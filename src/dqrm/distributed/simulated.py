"""N ranks in one process: their shares of a batch run one after the other, through the same codecs and sums.

The result is, bit for bit, that of N processes with the same seed, machine and number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.config import ExchangeConfig
from dqrm.distributed.dense import Bucket
from dqrm.distributed.exchange import MLP, MLP_OWNER, TABLES_OWNER, Exchange, Gradient
from dqrm.distributed.sparse import add_up, join, reduce


class SimulatedRanks(Exchange):
    """See `Exchange`; `module` is the model itself."""

    def __init__(
        self, module: nn.Module, tables: Any, parameters: Sequence[nn.Parameter], config: ExchangeConfig, seed: int
    ) -> None:
        size = config.simulate_ranks
        super().__init__(tables, parameters, config, size, range(size), seed)
        self.module = module
        # One bucket and one owner, since neither decides a bit.
        self._bucket = Bucket(self.layout, list(enumerate(self.layout.starts)), 1, self.mlp_codec, self.device)
        self._dense = torch.zeros(size, self.layout.total, device=self.device)
        self._rows: list[Gradient] = []

    def begin(self, step: int, flags: int = 0) -> None:
        super().begin(step, flags)
        self._rows.clear()

    def collect(self, rank: int) -> None:
        for parameter, place in zip(self.parameters, self.layout.starts):
            into = self._dense[rank, place : place + parameter.numel()].view_as(parameter)
            if parameter.grad is None:
                into.zero_()
            else:
                into.copy_(parameter.grad)
        self._rows.append(self._local_rows())
        if rank + 1 < self.size:
            self.tables.same_step()

    def finish(self) -> Gradient:
        self._reduce_mlp()
        gradient = self._reduce_rows()
        self.steps += 1
        return gradient

    def _reduce_mlp(self) -> None:
        bucket, shared = self._bucket, None
        if self.config.shared_scales and self.mlp_codec.bits:
            each = [bucket.scales(self._dense[rank], self._residual(rank)) for rank in self.local]
            shared = torch.stack([scales for scales in each if scales is not None]).amax(0)
        messages = [
            bucket.encode(self._dense[rank], self._residual(rank), self._seed(MLP, rank), shared) for rank in self.local
        ]
        total = bucket.reduce(0, messages, self.owner_residual, self._seed(MLP_OWNER))
        reduced = torch.empty_like(self._dense[0])
        bucket.decode([total], reduced)
        for parameter, place in zip(self.parameters, self.layout.starts):
            parameter.grad = reduced[place : place + parameter.numel()].view_as(parameter)
        self.payload["mlp_scales"] += bucket.scale_bytes
        self.payload["mlp_values"] += bucket.value_bytes

    def _reduce_rows(self) -> Gradient:
        scales = [self._row_scales(rank, gradient) for rank, gradient in zip(self.local, self._rows)]
        known = [scale for scale in scales if scale is not None]
        shared = torch.stack(known).amax(0) if known else None
        encoded = [self._encode_rows(rank, gradient, shared) for rank, gradient in zip(self.local, self._rows)]
        self._count_rows(encoded[0][1])
        messages = [messages for messages, _ in encoded]
        if not self.owners_sum:
            return add_up(self.row_codec, [sent for (sent,) in messages])
        seed = self._seed(TABLES_OWNER)
        totals = [reduce(self.row_codec, received, seed)[0] for received in zip(*messages)]
        return join(self.row_codec, totals)

    def _gathered(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.owner_residual is not None:
            own["mlp_owner_residual"] = self.owner_residual
        return own
