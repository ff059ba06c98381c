"""One training step: batch -> loss -> gradients -> exchange -> update. The loop calls it, and so does the benchmark."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm import kernels
from dqrm.config import Config
from dqrm.data.batches import Batch
from dqrm.distributed.codecs import mix
from dqrm.distributed.exchange import Exchange, Gradient
from dqrm.distributed.local import LocalExchange
from dqrm.distributed.real import RealRanks
from dqrm.distributed.simulated import SimulatedRanks
from dqrm.distributed.world import World
from dqrm.models.base import ClickModel
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.training.optimizers import Pair, build_optimizers
from dqrm.training.parameter_groups import RATE_FACTOR, parameter_groups


class TrainStep:
    """A model with its optimizers and the exchange between its ranks.

    Args:
        world: the ranks that take part in each step; default: this process alone.

    Attributes:
        optimizers: [of the tables, of everything else].
        exchange: the identity with one rank.
        whole_batches: whether each rank is given whole batches, of which it takes its shard.
    """

    exchange: Exchange

    def __init__(self, model: ClickModel, config: Config, world: World | None = None) -> None:
        self.model = model
        self._parameters = list(model.parameters())
        self._learned: list[Any] = [module for module in model.modules() if hasattr(module, "updated")]
        others = [parameter for parameter in self._parameters if parameter is not model.tables.weight]
        groups = parameter_groups(model, others, config.optimizer)
        self.optimizers = self._build_optimizers(groups, config)
        model.tables.only_looked_up_rows_change()  # a SparseOptimizer changes no others, or says so (`catch_up`)
        self.optimizers[0].tables = model.tables
        self.exchange = self._build_exchange(others, config, world or World())
        # Each rank brings up to date what any rank looks up, so that scales stay equal.
        self.whole_batches = self.optimizers[0].catches_up and self.exchange.size > 1
        self._table_factor, self._clip_norm = config.optimizer.table_rate_factor, config.optimizer.clip_norm
        self._seed = config.training.seed
        quantizers = (module for module in model.modules() if isinstance(module, WeightFakeQuantizer))
        self._stepped = [quantizer for quantizer in quantizers if quantizer.needs_step]
        for count, quantizer in enumerate(self._stepped):
            quantizer.rounding_seed = mix(self._seed, count)
        # With one rank, dropout masks continue from the generator state in the checkpoint.
        self._drops = self.exchange.size > 1 and any(isinstance(module, nn.Dropout) for module in model.modules())

    def _build_optimizers(self, groups: list[Any], config: Config) -> Pair:
        """Of the tables and of everything else, whose parameter groups these are."""
        return build_optimizers([self.model.tables.weight], groups, config.optimizer, config.training.seed)

    def _build_exchange(self, others: list[nn.Parameter], config: Config, world: World) -> Exchange:
        """Between the ranks, of the gradients of the tables and of all others."""
        tables, seed = self.model.tables, config.training.seed
        if world.size > 1:
            return RealRanks(tables, others, config.exchange, world, seed)
        if config.exchange.simulate_ranks > 1:
            return SimulatedRanks(tables, others, config.exchange, seed)
        return LocalExchange(tables.weight.device)

    def __call__(
        self, batch: Batch, rate: float, samples: int | None = None, number: int = 0, flags: int = 0
    ) -> Tensor:
        """One step at learning rate `rate`.

        Args:
            batch: this rank's shard of the batch; the whole batch with one rank, where ranks are simulated, and with
                `whole_batches`.
            samples: of the whole batch; default: those of `batch`.
            number: step count, the same on all ranks.
            flags: see `Exchange.begin`.

        Returns:
            The (weighted) loss over the samples of each local rank, reduced as `exchange.reduction` says: float32
            without a graph, a scalar for one local rank, else [local ranks].
        """
        exchange = self.exchange
        local, losses = exchange.local, []
        exchange.begin(number, flags)
        for quantizer in self._stepped:  # the same on all ranks
            quantizer.step = number
        if self.optimizers[0].catches_up:
            self.optimizers[0].catch_up(self.model.tables.rows(batch.ids, batch.bags))
        whole = len(local) > 1 or self.whole_batches
        for rank in local:
            shard = batch.share(rank, exchange.size) if whole else batch
            if self._drops:  # masks depend on step and rank only: the same in simulated and resumed runs
                torch.manual_seed(mix(self._seed, number, rank))
            loss = self.forward(shard)
            losses.append(loss.detach())
            self.backward(exchange.objective(loss, len(batch) if samples is None else samples))
            exchange.collect(rank)
        if self._drops:  # the saved state must not depend on which process runs which ranks
            torch.manual_seed(mix(self._seed, number))
        self.update(rate, exchange.finish())
        return losses[0] if len(losses) == 1 else torch.stack(losses)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch on the model's device, reduced as `exchange.reduction` says, of weight * loss."""
        logits = self.model(batch.dense, batch.ids, batch.bags)
        return F.binary_cross_entropy_with_logits(
            logits, batch.labels, batch.weights, reduction=self.exchange.reduction
        )

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients in the parameters: sparse for the tables, dense for the MLP."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()

    def update(self, rate: float, of_tables: Gradient | None = None) -> None:
        """Update the weights from their gradients at learning rate `rate` of the MLP; `of_tables` is the result of an
        exchange."""
        tables, others = self.optimizers
        for optimizer, factor in ((tables, self._table_factor), (others, 1.0)):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get(RATE_FACTOR, factor)
        exchanged = of_tables is not None
        if self._clip_norm:
            of_tables = self._clipped(of_tables)
        if of_tables is None:
            tables.step()
        else:
            tables.step_rows(*of_tables)
            if exchanged:
                self.model.tables.rows_changed(of_tables[0])
        others.step()
        for quantizer in self._learned:  # before callbacks see, average or replace what it learns
            quantizer.updated()

    @torch.no_grad()
    def _clipped(self, of_tables: Gradient | None) -> Gradient | None:
        """Scale all gradients by min(1, clip_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does with dense
        ones; returns that of the tables, each row once."""
        table = self.model.tables.weight
        if of_tables is None and table.grad is not None:
            of_tables = table.grad._indices()[0].contiguous(), table.grad._values().float()
        others = (parameter.grad for parameter in self._parameters if parameter is not table)
        gradients = [gradient for gradient in others if gradient is not None]
        if of_tables is not None:
            of_tables = kernels.sum_duplicates(*of_tables)
            gradients.append(of_tables[1])
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (self._clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return of_tables
