"""One step's exchange: what is common to real ranks (`real`) and simulated ones (`simulated`).

    exchange.begin(step)
    for rank in exchange.local:     the ranks whose share of the batch this process runs: one, or all simulated ones
        ... forward and backward of its share; the loss is the sum over its samples / samples of the whole batch ...
        exchange.collect(rank)
    rows, values = exchange.finish()

Afterwards the MLP's parameters have the sum of the ranks' gradients in `.grad`, and (rows, values) is the tables'.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqrm import kernels
from dqrm.config import ExchangeConfig
from dqrm.distributed.codecs import Codec, mix
from dqrm.distributed.dense import MLPLayout
from dqrm.distributed.sparse import RowCodec, RowResiduals, split

# From so many ranks on, owners sum rows before all get them; below, everybody gets everything (docs/distributed.md).
ALL_TO_ALL_FROM = 64
PARTS = ("ids", "table_scales", "table_values", "mlp_scales", "mlp_values")
"""Parts of a rank's payload."""

Gradient = tuple[Tensor, Tensor]
# Kinds of messages, each with a random stream of its own.
MLP, TABLES, MLP_OWNER, TABLES_OWNER = range(4)


class Exchange(ABC):
    """The gradients of N ranks, summed.

    Args:
        tables: the model's `QuantEmbeddingBagCollection`.
        parameters: all others that are trained, in an order that is the same on all ranks.
        config: codecs and strategies.
        size: how many ranks there are.
        local: those that run in this process.
        seed: of stochastic rounding.

    Attributes:
        module: what to call for a forward pass.
        payload: bytes of one rank's encoded gradients so far, by part (`PARTS`), each counted once: of the first local
            rank. sent: bytes that this process has given to collectives for other ranks. waited: seconds that it stood
            still for them. steps: exchanges so far.
    """

    module: nn.Module

    def __init__(
        self,
        tables: Any,
        parameters: Sequence[nn.Parameter],
        config: ExchangeConfig,
        size: int,
        local: range,
        seed: int,
    ) -> None:
        self.tables, self.config, self.size, self.local, self.seed = tables, config, size, local, seed
        self.parameters = list(parameters)
        stochastic = config.codec_rounding == "stochastic"
        self.mlp_codec = Codec(config.mlp_codec, stochastic)
        device = tables.weight.device
        self.device = device
        self.layout = MLPLayout([parameter.shape for parameter in self.parameters], config.bucket_values)
        self.row_codec = RowCodec(
            tables.table_rows, tables.embedding_dim, Codec(config.table_codec, stochastic),
            config.table_codec_scale == "row", device,
        )  # fmt: skip
        self.owners_sum = config.table_exchange == "all_to_all" or (
            config.table_exchange == "auto" and size >= ALL_TO_ALL_FROM
        )
        compensate = config.mlp_compensation and not self.mlp_codec.lossless
        # What ranks lose, and what the owners of sums lose; the latter by value, whoever owns it.
        self.residuals = torch.zeros(len(local), self.layout.total, device=device) if compensate else None
        self.owner_residual = torch.zeros(self.layout.total, device=device) if compensate else None
        slots = config.table_compensation_rows if not self.row_codec.codec.lossless else 0
        self.row_residuals = [RowResiduals(slots, tables.embedding_dim, device) for _ in local] if slots else []
        self.payload = dict.fromkeys(PARTS, 0.0)
        self.sent, self.waited, self.steps, self.step = 0, 0.0, 0, 0
        self.flags = 0
        # The trainer's, kept here because each rank has its own: the loss of its samples in this epoch.
        self.loss_sums = torch.zeros(len(local), dtype=torch.float64)

    def begin(self, step: int, flags: int = 0) -> None:
        """A step begins; `flags` (bits) are joined over the ranks by the time it ends."""
        self.step, self.flags = step, flags

    @abstractmethod
    def collect(self, rank: int) -> None:
        """Take the gradients that the backward pass of this rank's share has left."""

    @abstractmethod
    def finish(self) -> Gradient:
        """Exchange; the tables' gradient as rows int64 [U] and values float32 [U, dim], the MLP's in `.grad`."""

    def state(self) -> dict[str, Tensor]:
        """Everything of all ranks that a resumed run needs; on rank 0, and empty on the others."""
        return self._gathered(self._own_state())

    @abstractmethod
    def _gathered(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of each rank, stacked in their order [N, ...], from that of this process's [local, ...]."""

    def _own_state(self) -> dict[str, Tensor]:
        """Per local rank, [local, ...]."""
        counts = [*self.payload.values(), self.sent, self.waited, self.steps]
        own = {"counters": torch.tensor([counts] * len(self.local), dtype=torch.float64), "loss_sums": self.loss_sums}
        if self.residuals is not None:
            own["mlp_residual"] = self.residuals
        if self.row_residuals:
            own["row_residual_rows"] = torch.stack([kept.rows for kept in self.row_residuals])
            own["row_residual_values"] = torch.stack([kept.values for kept in self.row_residuals])
        return own

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave on rank 0; each rank finds its own in it.

        Raises:
            ValueError: it is of another number of ranks; nothing is taken.
        """
        if len(state["counters"]) != self.size:
            raise ValueError(f"the state is of {len(state['counters'])} ranks, there are {self.size}")
        ranks = slice(self.local.start, self.local.stop)
        self.loss_sums.copy_(state["loss_sums"][ranks])
        *payload, sent, self.waited, steps = state["counters"][ranks][0].tolist()
        self.payload = dict(zip(PARTS, payload))
        self.sent, self.steps = int(sent), int(steps)
        if self.residuals is not None and "mlp_residual" in state:
            self.residuals.copy_(state["mlp_residual"][ranks])
            self._load_owner_residual(state["mlp_owner_residual"])
        for rank, kept in zip(self.local, self.row_residuals):
            kept.rows.copy_(state["row_residual_rows"][rank])
            kept.values.copy_(state["row_residual_values"][rank])

    def _load_owner_residual(self, residual: Tensor) -> None:
        assert self.owner_residual is not None
        self.owner_residual.copy_(residual)

    def report(self) -> dict[str, Any]:
        """Averages per step: payload bytes in all and by part, bytes sent to other ranks, milliseconds stood still."""
        steps = max(self.steps, 1)
        parts = {part: round(count / steps, 1) for part, count in self.payload.items()}
        return {
            "ranks": self.size,
            "payload_bytes": round(sum(self.payload.values()) / steps, 1),
            "payload_parts": parts,
            "sent_bytes": round(self.sent / steps, 1),
            "waited_ms": round(1e3 * self.waited / steps, 4),
        }

    # What both kinds of ranks do.

    def _seed(self, part: int, rank: int = 0) -> int:
        return mix(self.seed, self.step, part, rank)

    def _residual(self, local: int) -> Tensor | None:
        return None if self.residuals is None else self.residuals[local]

    def _local_rows(self) -> Gradient:
        """The tables' gradient that a backward pass left, each row once."""
        grad = self.tables.weight.grad
        self.tables.weight.grad = None
        if grad is None:  # no table was looked up
            return torch.empty(0, dtype=torch.int64, device=self.device), torch.empty(
                0, self.tables.embedding_dim, device=self.device
            )
        return kernels.sum_duplicates(grad._indices()[0].contiguous(), grad._values().float())

    def _encode_rows(self, rank: int, gradient: Gradient, scales: Tensor | None) -> tuple[list[Tensor], dict[str, int]]:
        """A rank's messages: one for all, or one for each owner; and the bytes of their parts."""
        rows, values = gradient
        kept = self.row_residuals[rank - self.local.start] if self.row_residuals else None
        if kept is not None:
            values = kept.added(rows, values)
        shares = split(rows, values, self.size) if self.owners_sum else [(rows, values)]
        seed, total, messages = self._seed(TABLES, rank), {"ids": 0, "scales": 0, "values": 0}, []
        for owner, share in enumerate(shares):
            message, parts = self.row_codec.encode(*share, seed=mix(seed, owner), scales=scales)
            messages.append(message)
            total = {name: count + parts[name] for name, count in total.items()}
            if kept is not None:
                kept.keep(share[0], share[1] - self.row_codec.decode(message)[1])
        return messages, total

    def _row_scales(self, rank: int, gradient: Gradient) -> Tensor | None:
        """What a rank's scales would be, where they are shared."""
        if not (self.config.shared_scales and self.row_codec.codec.bits):
            return None
        rows, values = gradient
        if self.row_residuals:
            values = self.row_residuals[rank - self.local.start].added(rows, values)
        return self.row_codec.scales(rows, values)

    def _count_rows(self, parts: dict[str, int]) -> None:
        self.payload["ids"] += parts["ids"]
        self.payload["table_scales"] += parts["scales"]
        self.payload["table_values"] += parts["values"]
