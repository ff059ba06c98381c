"""One training step: batch -> loss -> gradients -> update. The loop calls it, and so does the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm.config import Config
from dqrm.data.batches import Batch
from dqrm.distributed.codecs import mix
from dqrm.distributed.exchange import Exchange, Gradient
from dqrm.distributed.real import RealRanks
from dqrm.distributed.simulated import SimulatedRanks
from dqrm.distributed.world import World
from dqrm.models.base import ClickModel
from dqrm.training.optimizers import build_optimizers


class TrainStep:
    """A model with its optimizers and, where there are several ranks, their exchange.

    Args:
        world: the ranks that take part in each step; default: this process alone.

    Attributes:
        optimizers: [of the tables, of everything else].
        exchange: None with one rank.
    """

    def __init__(self, model: ClickModel, config: Config, world: World | None = None) -> None:
        self.model = model
        tables = [model.tables.weight]
        self._parameters = list(model.parameters())
        self._drops = any(isinstance(module, nn.Dropout) for module in model.modules())
        others = [parameter for parameter in self._parameters if parameter is not tables[0]]
        self.optimizers = build_optimizers(tables, others, config.optimizer, config.training.seed)
        model.tables.only_looked_up_rows_change()  # true of all our optimizers of tables
        self.optimizers[0].tables = model.tables  # type: ignore[attr-defined]
        self.exchange: Exchange | None = None
        self._module: nn.Module = model
        if world is not None and world.size > 1:
            self.exchange = RealRanks(model, model.tables, others, config.exchange, world, config.training.seed)
        elif config.exchange.simulate_ranks > 1:
            self.exchange = SimulatedRanks(model, model.tables, others, config.exchange, config.training.seed)
        if self.exchange is not None:
            self._module = self.exchange.module

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """One step at learning rate `rate`; returns the batch's mean loss, a scalar tensor without a graph."""
        loss = self.forward(batch)
        self.backward(loss)
        self.update(rate)
        return loss.detach()

    def exchanged(self, batch: Batch, rate: float, samples: int, step: int, flags: int = 0) -> Tensor:
        """One step of several ranks.

        Args:
            batch: this rank's share of the batch; the whole batch where ranks are simulated.
            samples: of the whole batch.
            step: number of the step, the same on all ranks.
            flags: see `Exchange.begin`.

        Returns:
            The sum of the (weighted) losses of each local rank's samples: float32 [local ranks], without a graph.
        """
        exchange = self.exchange
        assert exchange is not None
        exchange.begin(step, flags)
        losses = []
        for rank in exchange.local:
            share = batch if len(exchange.local) == 1 else batch.share(rank, exchange.size)
            if self._drops:  # masks of the rank's own, whichever process it is and whether or not the run was resumed
                torch.manual_seed(mix(exchange.seed, step, rank))
            loss = F.binary_cross_entropy_with_logits(
                self._module(share.dense, share.ids, share.bags), share.labels, share.weights, reduction="sum"
            )
            losses.append(loss.detach())
            self.backward(loss / samples)
            exchange.collect(rank)
        if self._drops:  # the state that is saved does not depend on who runs which ranks
            torch.manual_seed(mix(exchange.seed, step))
        self.update(rate, exchange.finish())
        return torch.stack(losses)

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch that lies on the model's device; with weights the mean of weight * loss."""
        logits = self.model(batch.dense, batch.ids, batch.bags)
        return F.binary_cross_entropy_with_logits(logits, batch.labels, batch.weights)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients in the parameters: sparse for the tables, dense for the MLP."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()

    def update(self, rate: float, of_tables: Gradient | None = None) -> None:
        """Change the weights by their gradients at learning rate `rate`; `of_tables` is what an exchange gave."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if of_tables is not None and optimizer is self.optimizers[0]:
                optimizer.step_rows(*of_tables)  # type: ignore[attr-defined]
                self.model.tables.rows_changed(of_tables[0])
            else:
                optimizer.step()
