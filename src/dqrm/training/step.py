"""One training step: batch -> loss -> gradients -> update. The loop calls it, and so does the benchmark."""

import torch.nn.functional as F
from torch import Tensor

from dqrm.config import Config
from dqrm.data.batches import Batch
from dqrm.models.dlrm import DLRM
from dqrm.training.optimizers import build_optimizers


class TrainStep:
    """A model with its optimizers.

    Attributes:
        optimizers: [of the tables, of everything else].
    """

    def __init__(self, model: DLRM, config: Config) -> None:
        self.model = model
        tables = [model.tables.weight]
        self._parameters = list(model.parameters())
        others = [parameter for parameter in self._parameters if parameter is not tables[0]]
        self.optimizers = build_optimizers(tables, others, config.optimizer, config.training.seed)
        model.tables.only_looked_up_rows_change()  # true of all our optimizers of tables

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """One step at learning rate `rate`; returns the batch's mean loss, a scalar tensor without a graph."""
        loss = self.forward(batch)
        self.backward(loss)
        self.update(rate)
        return loss.detach()

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch that lies on the model's device."""
        return F.binary_cross_entropy_with_logits(self.model(batch.dense, batch.ids, batch.bags), batch.labels)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients in the parameters: sparse for the tables, dense for the MLP."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()

    def update(self, rate: float) -> None:
        """Change the weights by their gradients at learning rate `rate`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
