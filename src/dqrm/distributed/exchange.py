"""One step's exchange: the interface, and the common part of real ranks (`real`) and simulated ones (`simulated`). A
single rank is in `local`.

    exchange.begin(step)
    for rank in exchange.local:     the ranks whose shard of the batch this process runs: one, or all simulated ones
        loss = ... forward of its shard, with exchange.reduction ...
        exchange.objective(loss, samples of the whole batch).backward()
        exchange.collect(rank)
    gradient = exchange.finish()

Afterwards the MLP's parameters have the sum of the ranks' gradients in `.grad`; the tables' is `gradient`, or in
`.grad` too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqrm import kernels
from dqrm.distributed.codecs import Codec, mix
from dqrm.distributed.config import ExchangeConfig
from dqrm.distributed.dense import Bucket, MLPLayout
from dqrm.distributed.rows import ShardedRows
from dqrm.distributed.sparse import RowCodec, split

# World size from which on owners sum rows first; below it, all ranks get all rows (docs/distributed.md).
ALL_TO_ALL_FROM = 64
PARTS = ("ids", "table_scales", "table_values", "mlp_scales", "mlp_values")
"""Parts of a rank's payload."""

Gradient = tuple[Tensor, Tensor]
# Kinds of messages; each has its own random stream.
MLP, TABLES, MLP_OWNER, TABLES_OWNER = range(4)


class Exchange(ABC):
    """Sums the gradients of all ranks in each step.

    Args:
        size: world size. local: the ranks that run in this process.
        device: of `loss_sums`.

    Attributes:
        reduction: how the loss of a shard is reduced over its samples: 'mean', or 'sum' if there are other ranks.
        flags: bits that any rank set for this step, joined over the ranks when it has ended.
        loss_sums: sum over the epoch's samples so far of each local rank's loss, float64 [local ranks].
    """

    reduction = "sum"

    def __init__(self, size: int, local: range, device: torch.device | str = "cpu") -> None:
        self.size, self.local = size, local
        self.step, self.flags = 0, 0
        self.loss_sums = torch.zeros(len(local), dtype=torch.float64, device=device)

    def begin(self, step: int, flags: int = 0) -> None:
        """Start a step; `flags` (bits) are joined over the ranks by the end of it."""
        self.step, self.flags = step, flags

    @abstractmethod
    def objective(self, loss: Tensor, samples: int) -> Tensor:
        """The objective to differentiate: this shard's part of the mean loss over the `samples` of the whole batch."""

    @abstractmethod
    def add_losses(self, losses: Tensor, samples: int) -> None:
        """Add a step's losses, one of each local rank as `reduction` gives it, to `loss_sums`."""

    @abstractmethod
    def collect(self, rank: int) -> None:
        """Take the gradients of the backward pass of this rank's shard."""

    @abstractmethod
    def finish(self) -> Gradient | None:
        """Exchange. Returns the tables' gradient as unique rows int64 [U] and values float32 [U, dim]; None if it is in
        `.grad`, as the MLP's is."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of all ranks, but for `residual_rows`; on rank 0, and empty on the others."""
        return {}

    def residual_rows(self) -> dict[str, ShardedRows]:
        """The rest of it by name, on all ranks: too large to be gathered as a whole."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (nothing without state)
        """Restore what `state` and `residual_rows` had, in one mapping on all ranks; each takes its own part.

        Raises:
            ValueError: the world size differs; nothing is restored.
        """

    def report(self) -> dict[str, Any]:
        """Averages per step: payload bytes in total and by part, bytes sent to other ranks, milliseconds waited; empty
        if nothing is sent."""
        return {}


class RankExchange(Exchange):
    """Several ranks, whose gradients are encoded.

    Args:
        tables: the model's `QuantEmbeddingBagCollection`.
        parameters: all others that are trained, in an order that is the same on all ranks.
        config: codecs and strategies.
        size: world size.
        local: the ranks that run in this process.
        owners: number of ranks that share the summation of the MLP's gradients.
        seed: of stochastic rounding.

    Attributes:
        payload: bytes of one rank's encoded gradients so far, by part (`PARTS`), each counted once: of the first local
            rank. sent: bytes that this process has passed to collectives for other ranks. waited: seconds that it was
            blocked in them. steps: exchanges so far.
    """

    def __init__(
        self,
        tables: Any,
        parameters: Sequence[nn.Parameter],
        config: ExchangeConfig,
        size: int,
        local: range,
        owners: int,
        seed: int,
    ) -> None:
        super().__init__(size, local)
        self.tables, self.config, self.seed = tables, config, seed
        self.parameters = list(parameters)
        stochastic = config.codec_rounding == "stochastic"
        self.mlp_codec = Codec(config.mlp_codec, stochastic)
        device = tables.weight.device
        self.device = device
        self.layout = MLPLayout([parameter.shape for parameter in self.parameters], config.bucket_values)
        self.bucket = Bucket(self.layout, owners, self.mlp_codec, device)
        self.row_codec = RowCodec(
            tables.table_rows, tables.embedding_dim, Codec(config.table_codec, stochastic),
            config.table_codec_scale == "row", device,
        )  # fmt: skip
        self.owners_sum = config.table_exchange == "all_to_all" or (
            config.table_exchange == "auto" and size >= ALL_TO_ALL_FROM
        )
        compensate = config.mlp_compensation and not self.mlp_codec.lossless
        # Residuals of the ranks, and of the owners' sums; the latter by value, whoever owns it.
        self.residuals = torch.zeros(len(local), self.layout.total, device=device) if compensate else None
        self.owner_residual = _untouched_zeros(self.layout.total, device) if compensate else None
        # The MLP's gradients of each local rank, flat; the reduced ones take the place of the first.
        self.gradients = torch.zeros(len(local), self.layout.total, device=device)
        bounds = list(pairwise([*self.layout.starts, self.layout.total]))
        self._views = [
            [flat[begin:end].view_as(parameter) for parameter, (begin, end) in zip(self.parameters, bounds)]
            for flat in self.gradients
        ]
        self.rows: list[Gradient] = []  # the tables' gradients of each local rank
        self.payload = dict.fromkeys(PARTS, 0.0)
        self.sent, self.waited, self.steps = 0, 0.0, 0

    def begin(self, step: int, flags: int = 0) -> None:
        super().begin(step, flags)
        self.rows.clear()

    def objective(self, loss: Tensor, samples: int) -> Tensor:
        return loss / samples

    def add_losses(self, losses: Tensor, samples: int) -> None:
        self.loss_sums += losses.double().to(self.loss_sums.device)

    def collect(self, rank: int) -> None:
        for parameter, view in zip(self.parameters, self._views[rank - self.local.start]):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
        self.rows.append(self._local_rows())

    @torch.no_grad()
    def finish(self) -> Gradient:
        gradient = self._exchange()
        for parameter, view in zip(self.parameters, self._views[0]):
            parameter.grad = view
        self.steps += 1
        return gradient

    @abstractmethod
    def _exchange(self) -> Gradient:
        """The tables' gradient, summed; the MLP's goes into gradients[0]."""

    def _own_state(self) -> dict[str, Tensor]:
        """Per local rank, [local, ...]; without residuals."""
        counts = [*self.payload.values(), self.sent, self.waited, self.steps]
        return {"counters": torch.tensor([counts] * len(self.local), dtype=torch.float64), "loss_sums": self.loss_sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if len(state["counters"]) != self.size:
            raise ValueError(f"the state has a world size of {len(state['counters'])}, expected {self.size}")
        ranks = slice(self.local.start, self.local.stop)
        self.loss_sums.copy_(state["loss_sums"][ranks])
        *payload, sent, self.waited, steps = state["counters"][ranks][0].tolist()
        self.payload = dict(zip(PARTS, payload))
        self.sent, self.steps = int(sent), int(steps)
        if self.residuals is not None and "mlp_residual" in state:
            self.residuals.copy_(state["mlp_residual"][ranks])
            self._load_owner_residual(state["mlp_owner_residual"])

    @abstractmethod
    def _load_owner_residual(self, residual: Tensor) -> None:
        """What this process owns of it, float32 [values of all parameters]."""

    def report(self) -> dict[str, Any]:
        steps = max(self.steps, 1)
        parts = {part: round(count / steps, 1) for part, count in self.payload.items()}
        return {
            "ranks": self.size,
            "payload_bytes": round(sum(self.payload.values()) / steps, 1),
            "payload_parts": parts,
            "sent_bytes": round(self.sent / steps, 1),
            "waited_ms": round(1e3 * self.waited / steps, 4),
        }

    # Common to both kinds of ranks.

    def _seed(self, part: int, rank: int = 0) -> int:
        return mix(self.seed, self.step, part, rank)

    def _residual(self, local: int) -> Tensor | None:
        return None if self.residuals is None else self.residuals[local]

    def _local_rows(self) -> Gradient:
        """The tables' gradient of a backward pass, with unique rows."""
        grad = self.tables.weight.grad
        self.tables.weight.grad = None
        if grad is None:  # no table was looked up
            return torch.empty(0, dtype=torch.int64, device=self.device), torch.empty(
                0, self.tables.embedding_dim, device=self.device
            )
        return kernels.sum_duplicates(grad._indices()[0].contiguous(), grad._values().float())

    def _encode_rows(self, rank: int, gradient: Gradient, scales: Tensor | None) -> tuple[list[Tensor], dict[str, int]]:
        """A rank's messages: one for all, or one for each owner; and the bytes of their parts."""
        shards = split(*gradient, self.size) if self.owners_sum else [gradient]
        seed, total, messages = self._seed(TABLES, rank), {"ids": 0, "scales": 0, "values": 0}, []
        for owner, shard in enumerate(shards):
            message, parts = self.row_codec.encode(*shard, seed=mix(seed, owner), scales=scales)
            messages.append(message)
            total = {name: count + parts[name] for name, count in total.items()}
        return messages, total

    def _row_scales(self, gradient: Gradient) -> Tensor | None:
        """The scales of a rank's gradient if scales are shared, else None."""
        return self.row_codec.scales(*gradient) if self.config.shared_scales else None

    def _count(self, parts: dict[str, int]) -> None:
        """Add a step's payload: the bytes of the rows' parts, and the MLP's, which are always the same."""
        self.payload["ids"] += parts["ids"]
        self.payload["table_scales"] += parts["scales"]
        self.payload["table_values"] += parts["values"]
        self.payload["mlp_scales"] += self.bucket.scale_bytes
        self.payload["mlp_values"] += self.bucket.value_bytes


def _untouched_zeros(count: int, device: torch.device) -> Tensor:
    """float32 [count]. On the CPU pages are in memory once they are written: a rank writes those of what it owns."""
    return torch.from_numpy(np.zeros(count, np.float32)) if device.type == "cpu" else torch.zeros(count, device=device)
