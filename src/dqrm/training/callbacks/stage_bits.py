"""Quantization in stages: the first epochs train with more bits, or unquantized."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.quant.config import BITS, QATConfig
from dqrm.quant.linear import QuantLinear
from dqrm.quant.quantizer import FakeQuantized
from dqrm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer

Stages = tuple[int, ...]


class StageBits(Callback):
    """Train the weights of the first epochs with other bits than the configuration's, which follow.

    `tables=32,mlp=16-8` trains the tables unquantized in epoch 1, and the MLP with 16 bits in epoch 1 and 8 in epoch 2.
    Evaluation, checkpoints and export always have the bits of the configuration: in these epochs, those of
    quantization after training. Their evaluations may be chosen as the best, but do not count for patience, early
    stopping or a drop of the learning rate (`Callback.evaluation_counts`). The inputs of linear layers have
    `activation_bits` from the start. What applies depends on the epoch only.

    Args:
        tables: bits of the tables in epochs 1, 2, ...: 32 each.
        mlp: bits of the MLP weights in epochs 1, 2, ..., falling, as (32, 16, 8); the biases are quantized with them.
    """

    def __init__(self, tables: tuple[int, ...] = (), mlp: tuple[int, ...] = ()) -> None:
        if not tables and not mlp:
            raise ValueError(
                "no stages are given, expected tables or mlp: the bits of each of the first epochs, as 32-32"
            )
        if any(bits != 32 for bits in tables):
            raise ValueError(f"tables is {shown(tables)}, expected 32 (not quantized) for each epoch, as 32-32")
        if list(mlp) != sorted(mlp, reverse=True) or any(bits not in BITS for bits in mlp):
            raise ValueError(f"mlp is {shown(mlp)}, expected falling numbers among {shown(BITS[::-1])}, as 32-16-8")
        self.tables, self.mlp = tuple(tables), tuple(mlp)
        self.whole_tables = bool(tables)

    def check(self, config: Config) -> None:
        qat, epochs = config.quantization, config.training.epochs
        if qat.learns_scales:
            raise UserError(
                f"stage_bits: quantizer is '{qat.quantizer}', whose scales are learned in quantized training; use max, "
                "mse, percentile or naive"
            )
        for name, stages, bits in zip(("tables", "mlp"), (self.tables, self.mlp), final_bits(qat)):
            if stages and (bits == 32 or min(stages) < bits):
                wanted = "no stages" if bits == 32 else f"no fewer than {bits}"
                raise UserError(
                    f"stage_bits: {name} is {shown(stages)}, but the configuration gives {name} {bits} bits (32: not "
                    f"quantized); expected {wanted}"
                )
            staged = sum(each != bits for each in stages)
            if staged >= epochs:
                raise UserError(
                    f"stage_bits: {name} is {shown(stages)}, but the run has {epochs} epoch{'s' * (epochs > 1)}, which "
                    f"leaves none to train in {bits} bits; raise epochs above {staged}"
                )

    def on_epoch_start(self, trainer: "Trainer") -> None:
        for layer, stages in self._layers(trainer):
            bits = stage(stages, trainer.state.epoch, layer)
            if layer.training_bits != bits:
                layer.train_with_bits(bits)
        if not self.evaluation_counts(trainer):
            tables, mlp = trainer.model.tables, next(layer for layer in linear_layers(trainer.model))
            trainer.log(
                f"Epoch {trainer.state.epoch + 1} trains with {tables.training_bits or tables.bits} bits in the tables "
                f"and {mlp.training_bits or mlp.bits} in the MLP; evaluated with {tables.bits} and {mlp.bits}"
            )

    def on_resume(self, trainer: "Trainer") -> None:
        # At the start of an epoch, as at the end of the one before it: `on_epoch_start` follows.
        epoch = trainer.state.epoch - (trainer.state.batch == 0)
        for layer, stages in self._layers(trainer) if epoch >= 0 else ():
            if (bits := stage(stages, epoch, layer)) is not None:  # else scales are those of the checkpoint
                layer.train_with_bits(bits)

    def evaluation_counts(self, trainer: "Trainer") -> bool:
        return all(layer.training_bits is None for layer, _ in self._layers(trainer))

    def on_evaluation(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if trainer.state.finished and not self.evaluation_counts(trainer):
            trainer.warn(
                f"the run ends in epoch {trainer.state.epoch + 1}, before stage_bits reached the final bits: its "
                "result was quantized after training"
            )

    def _layers(self, trainer: "Trainer") -> Iterator[tuple[FakeQuantized, Stages]]:
        if self.tables:
            yield trainer.model.tables, self.tables
        if self.mlp:
            yield from ((layer, self.mlp) for layer in linear_layers(trainer.model))


def linear_layers(model: nn.Module) -> Iterator[QuantLinear]:
    """All of a model."""
    return (module for module in model.modules() if isinstance(module, QuantLinear))


def stage(stages: Stages, epoch: int, layer: FakeQuantized) -> int | None:
    """The bits with which a layer trains in epoch `epoch` (from 0), where they are not its own; else None."""
    return stages[epoch] if epoch < len(stages) and stages[epoch] != layer.bits else None


def final_bits(qat: QATConfig) -> tuple[int, int]:
    """Bits of tables (the fewest of them) and MLP in the end."""
    tables = qat.effective_table_bits
    return tables if qat.small_table_bits is None else min(tables, qat.small_table_bits), qat.effective_mlp_bits


def shown(bits: Sequence[int]) -> str:
    """As they are written in a configuration."""
    return "-".join(map(str, bits))
