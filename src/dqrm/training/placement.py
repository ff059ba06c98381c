"""Where the tables of a run are while it trains, as `TrainingConfig.tables` names it.

`Placement` itself: whole on each rank, as every other tensor. A subclass, entered in `config.PLACEMENTS`, has them
elsewhere; checkpoints are the same files, so a run is evaluated, exported and started from on one machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dqrm.config import PLACEMENTS, Config
from dqrm.data.dataset import Dataset
from dqrm.distributed.exchange import Exchange
from dqrm.distributed.rows import ShardedRows
from dqrm.distributed.world import RankLost, World
from dqrm.models.base import ClickModel
from dqrm.quant.config import registered
from dqrm.quant.convert import stored_bytes
from dqrm.training.callbacks import Callback
from dqrm.training.checkpoints import (
    CALLBACKS,
    EXCHANGE,
    WEIGHTS,
    load_more,
    load_state,
    load_weights,
    verify_checkpoint,
)
from dqrm.training.footprint import TableBytes, table_bytes
from dqrm.training.run import Run
from dqrm.training.start import Start, share_state, share_tensors, share_weights
from dqrm.training.step import TrainStep
from dqrm.training.tensor_files import Streamed

Saved = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


class Placement:
    """All tables whole on each rank.

    Args:
        config: of the run. world: its ranks, all of which call each method.

    Attributes:
        collective: whether a forward is one of all ranks, which then evaluate equally many batches.
    """

    collective = False

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world

    def check(self, dataset: Dataset) -> None:
        """Raise UserError where a run of this configuration cannot be trained so on this dataset."""

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Raise UserError for a callback that cannot work so."""

    def new_model(self, run: Run, drawn: bool = True) -> ClickModel:
        """The run's model with its initial weights; `drawn` False: whose tables' values do not matter."""
        return self.world.together(lambda: run.new_model(drawn=drawn))

    def carry_weights(self, start: Start | None, model: ClickModel, verify: bool) -> None:
        """The weights of the run that rank 0's `start` names, into a model as it was drawn, on all ranks."""

        def carry() -> None:
            if start is not None:
                if verify:
                    start.verify()
                start.carry_weights(model, self.config)

        self.world.together(carry)
        share_weights(self.world, model)

    def carry_state(self, start: Start | None, model: ClickModel, optimizers: Sequence[Any]) -> None:
        """Likewise the state of its optimizers [of the tables, of everything else]."""
        self.world.together(lambda: start and start.carry_optimizers(model, optimizers, self.config))
        share_state(self.world, optimizers)

    def step(self, model: ClickModel) -> TrainStep:
        """A training step of this model."""
        return TrainStep(model, self.config, self.world)

    def load_weights(self, checkpoint: Path, model: ClickModel, verify: bool) -> None:
        """Those of a checkpoint: rank 0 reads them and sends them to the others."""

        def load() -> None:
            if verify:
                verify_checkpoint(checkpoint, WEIGHTS)
            load_weights(checkpoint, model)

        self.world.together(lambda: load() if self.world.first else None)
        share_weights(self.world, model)

    def load_state(self, checkpoint: Path, optimizers: Sequence[Optimizer], verify: bool) -> Saved:
        """Everything else of a checkpoint, likewise: optimizers and random state in place; returns its state.json, and
        the tensors of the exchange and of callbacks."""

        saved = self._read_state(checkpoint, optimizers, verify)
        share_state(self.world, optimizers)
        return saved

    def _read_state(self, checkpoint: Path, optimizers: Sequence[Optimizer | None], verify: bool) -> Saved:
        def load() -> dict[str, Any]:
            if verify:
                verify_checkpoint(checkpoint)
            return load_state(checkpoint, optimizers)

        def exchange() -> dict[str, Tensor]:
            found = load_more(checkpoint, EXCHANGE)
            if self.world.size > 1 and found and len(found["counters"]) != self.world.size:
                return {"counters": found["counters"]}  # the residuals of so many ranks are of no use
            return found

        values = self.world.on_first(load)
        of_callbacks = share_tensors(self.world, lambda: load_more(checkpoint, CALLBACKS))
        return values, share_tensors(self.world, exchange), of_callbacks

    @contextmanager
    def saving(
        self, model: ClickModel, optimizers: Sequence[Optimizer], exchange: Exchange
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """Inside, rank 0 writes a checkpoint: what of it is not in the model and the optimizers, or on several ranks,
        by file and name."""
        state, residuals = exchange.state(), exchange.residual_rows()
        columns = self._columns(model, optimizers) | {(EXCHANGE, name): rows for name, rows in residuals.items()}
        each = list(columns.values())
        if not self.world.first:
            while (request := self.world.shared(None)) is not None:
                number, first, last = request
                each[number].gather(first, last)
            yield {}
            return

        def pieces(number: int) -> Iterator[Tensor]:
            for first, last in each[number].pieces():
                self.world.shared((number, first, last))
                piece = each[number].gather(first, last)
                assert piece is not None
                yield piece

        found: dict[str, dict[str, Tensor | Streamed]] = {EXCHANGE: {**state}}
        for number, ((file, name), rows) in enumerate(columns.items()):
            found.setdefault(file, {})[name] = Streamed(rows.shape, rows.dtype, partial(pieces, number))
        try:
            yield found
        except RankLost:  # nobody waits for a request
            raise
        except BaseException:
            self.world.shared(None)
            raise
        self.world.shared(None)

    def _columns(self, model: ClickModel, optimizers: Sequence[Any] = ()) -> dict[tuple[str, str], ShardedRows]:
        """What a checkpoint has of the tables and is on several ranks, by file and name."""
        return {}

    def table_bytes(self, model: ClickModel, optimizers: Sequence[Optimizer]) -> TableBytes:
        """What the tables take in training, on all ranks that share them together."""
        return table_bytes(model.tables.weight, optimizers[0])

    def stored_bytes(self, model: ClickModel) -> dict[str, int]:
        """See `quant.convert.stored_bytes`."""
        return stored_bytes(model)


def placement_of(config: Config, world: World) -> Placement:
    """The placement that a configuration names.

    Raises:
        UserError: a package that it needs is not installed.
    """
    placement: Placement = registered(config.training.tables, PLACEMENTS)(config, world)
    return placement
