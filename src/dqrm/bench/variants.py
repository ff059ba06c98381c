"""The variants of a whole training step, each as the same few calls: data, and a step whole or part by part."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm import recipe
from dqrm.bench.baseline import PlainDLRM
from dqrm.bench.config import ARCHITECTURES, NUM_DENSE, Architecture, BenchStepConfig, Scheme
from dqrm.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.batches import Batch
from dqrm.models.base import ClickModel
from dqrm.quant.config import QATConfig
from dqrm.training.footprint import TableBytes, table_bytes
from dqrm.training.step import TrainStep

LEARNING_RATE = 0.1


class _Variant:
    """A model with its optimizer, its own stream of batches and its last loss."""

    title: ClassVar[str] = ""

    def __init__(self, name: str, tables: nn.Module) -> None:
        self.name, self.tables = name, tables
        self.batches: Iterator[Batch] = iter(())
        self.loss: Any = None
        self.table_bytes: TableBytes = {"weights": 0, "optimizer": 0}


class Ours(_Variant):
    """A model of this package, trained as `dqrm train` trains it."""

    def __init__(self, name: str, config: Config, model: ClickModel, device: torch.device) -> None:
        super().__init__(name, model.tables)
        self.device, self.model = device, model.train()
        model.tables.clamps.quiet = True  # figures of speed, not of accuracy
        self.train_step = TrainStep(model, config)
        self.rate = config.optimizer.rate
        self.table_bytes = table_bytes(model.tables.weight, self.train_step.optimizers[0])

    def prepare(self, batch: Batch) -> Any:
        return batch.to(self.device)

    def step(self, batch: Batch) -> None:
        self.loss = self.train_step(batch, self.rate)

    def forward(self, batch: Batch) -> Tensor:
        return self.train_step.forward(batch)

    def backward(self, loss: Tensor) -> None:
        self.train_step.backward(loss)

    def update(self) -> None:
        self.train_step.update(self.rate)


class Plain(_Variant):
    """The baseline, trained as torch's tutorials train: sparse gradients and torch.optim.SGD."""

    title = "nn.EmbeddingBag + nn.Linear"

    def __init__(self, name: str, arch: Architecture, weights: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.model = PlainDLRM(NUM_DENSE, arch.bottom_mlp, arch.top_mlp, weights).to(device)
        super().__init__(name, self.model.tables)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE)
        self.table_bytes["weights"] = sum(weight.nbytes for weight in weights)

    def prepare(self, batch: Batch) -> Any:
        # One contiguous row of int64 per table is what nn.EmbeddingBag works on.
        ids = batch.ids.to(self.device).t().contiguous().long()
        return batch.dense.to(self.device), ids, batch.labels.to(self.device)

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        loss = self.forward(batch)
        self.backward(loss)
        self.update()
        self.loss = loss.detach()

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        dense, ids, labels = batch
        return F.binary_cross_entropy_with_logits(self.model(dense, ids), labels)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()


Variant = Ours | Plain


def training_config(options: BenchStepConfig, scheme: Scheme) -> Config:
    """The configuration with which `dqrm train` would train `scheme`."""
    arch = ARCHITECTURES[options.arch]
    return Config(
        model=ModelConfig(embedding_dim=arch.embedding_dim, bottom_mlp=arch.bottom_mlp, top_mlp=arch.top_mlp),
        quantization=QATConfig(
            bits=scheme.bits,
            **(recipe.quantization({}) if scheme.recipe else {}),
            scale_refresh=scheme.refresh,
            scale_period=options.scale_period if scheme.refresh == "periodic" else None,
        ),
        optimizer=OptimizerConfig(options.optimizer, recipe.learning_rate(options.optimizer, max(options.batch_size))),
        training=TrainingConfig(
            precision="bf16" if scheme.bf16 else "fp32",
            table_dtype=scheme.table_dtype,
            device=options.device,
            threads=options.threads,
            seed=options.seed,
        ),
    )
