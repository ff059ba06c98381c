"""N ranks in one process: their shards of a batch run one after the other, through the same codecs and sums.

The result is, bit for bit, that of N processes with the same seed, machine and number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.distributed.config import ExchangeConfig
from dqrm.distributed.exchange import MLP, MLP_OWNER, TABLES_OWNER, Gradient, RankExchange
from dqrm.distributed.sparse import add_up, join, reduce


class SimulatedRanks(RankExchange):
    """See `RankExchange`."""

    def __init__(self, tables: Any, parameters: Sequence[nn.Parameter], config: ExchangeConfig, seed: int) -> None:
        size = config.simulate_ranks
        super().__init__(tables, parameters, config, size, range(size), 1, seed)  # one owner: the result is the same

    def collect(self, rank: int) -> None:
        super().collect(rank)
        if rank + 1 < self.size:
            self.tables.same_step()

    def _exchange(self) -> Gradient:
        self._reduce_mlp()
        return self._reduce_rows()

    def _reduce_mlp(self) -> None:
        bucket, shared = self.bucket, None
        if self.config.shared_scales and self.mlp_codec.bits:
            each = [bucket.scales(self.gradients[rank], self._residual(rank)) for rank in self.local]
            shared = torch.stack([scales for scales in each if scales is not None]).amax(0)
        messages = [
            bucket.encode(self.gradients[rank], self._residual(rank), self._seed(MLP, rank), shared)
            for rank in self.local
        ]
        total = bucket.reduce(0, messages, self.owner_residual, self._seed(MLP_OWNER))
        bucket.decode([total], self.gradients[0])

    def _reduce_rows(self) -> Gradient:
        scales = [self._row_scales(gradient) for gradient in self.rows]
        known = [scale for scale in scales if scale is not None]
        shared = torch.stack(known).amax(0) if known else None
        encoded = [self._encode_rows(rank, gradient, shared) for rank, gradient in zip(self.local, self.rows)]
        self._count(encoded[0][1])
        messages = [messages for messages, _ in encoded]
        if not self.owners_sum:
            return add_up(self.row_codec, [sent for (sent,) in messages])
        seed = self._seed(TABLES_OWNER)
        totals = [reduce(self.row_codec, received, seed)[0] for received in zip(*messages)]
        return join(self.row_codec, totals)

    def state(self) -> dict[str, Tensor]:
        state = self._own_state()
        if self.residuals is not None and self.owner_residual is not None:
            state |= {"mlp_residual": self.residuals, "mlp_owner_residual": self.owner_residual}
        return state

    def _load_owner_residual(self, residual: Tensor) -> None:
        assert self.owner_residual is not None
        self.owner_residual.copy_(residual)
