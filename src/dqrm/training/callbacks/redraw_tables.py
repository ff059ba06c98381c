"""Fresh tables at the start of each epoch (MEDA)."""

from typing import TYPE_CHECKING

from torch import Tensor

from dqrm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer


class RedrawTables(Callback):
    """Redraw large tables at the start of each epoch but the first, and reset their optimizer state.

    Embeddings of rare ids overfit in the second epoch, and the other layers adapt to a new embedding space: MEDA (arXiv
    2305.19531), which draws all tables. Values depend on seed, epoch and table, so all ranks and a resumed run draw the
    same; scales are computed from the new values.

    Args:
        min_rows: tables with at least this number of rows are redrawn.
    """

    def __init__(self, min_rows: int = 10_000) -> None:
        if min_rows < 0:
            raise ValueError(f"min_rows is {min_rows}, expected 0 (all tables) or more")
        self.min_rows = min_rows

    def on_epoch_start(self, trainer: "Trainer") -> None:
        model, epoch, start = trainer.model, trainer.state.epoch, 0
        if epoch == 0:
            return
        large = [number for number, rows in enumerate(model.tables.table_rows) if rows >= self.min_rows]
        model.redraw_tables(trainer.config.training.seed, epoch, large)
        for number, rows in enumerate(model.tables.table_rows):
            if number in large:
                trainer.optimizers[0].reset_rows(slice(start, start + rows))
            start += rows
        scale = model.tables.weight_fake_quantizer.scale
        for value in trainer.optimizers[1].state.get(scale, {}).values():  # of a learned scale
            if isinstance(value, Tensor) and value.shape == scale.shape:
                value[large] = 0
