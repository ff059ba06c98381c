"""Histograms of tables' weights while a run trains, as Figures 6 and 7 of the DQRM paper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.options import did_you_mean
from dqrm.quant.storage import storage_of
from dqrm.quant.uniform import fake_quantize
from dqrm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer

_BINS, _LARGEST = 64, 3
# Rows of a table that are looked at, evenly spaced, and distinct values that are counted one by one: the codes of 8
# bits.
_ROWS, _VALUES = 1 << 16, 1 << 8


class RecordHistograms(Callback):
    """At each evaluation, a line of the kind "histogram" in metrics.jsonl for each table: the distribution of its
    master weights, and of the values that the forward pass computes with. Of tables of more than 65,536 rows, that many
    rows are counted, evenly spaced. Training is not changed.

    Args:
        columns: names of categorical columns; or "largest": the three with the most rows.
    """

    whole_tables = True

    def __init__(self, columns: Sequence[str] = ("largest",)) -> None:
        self.columns = tuple(columns)

    def numbers(self, dataset: Dataset) -> list[int]:
        """The tables' numbers.

        Raises:
            UserError: no such column.
        """
        names, rows = [column.name for column in dataset.columns], dataset.table_rows
        found: list[int] = []
        for name in self.columns:
            if name in names:
                found.append(names.index(name))
            elif name == "largest":
                found += sorted(range(len(rows)), key=lambda number: -rows[number])[:_LARGEST]
            else:
                raise UserError(
                    f"record_histograms: no categorical column '{name}' in {dataset.path}{did_you_mean(name, names)}"
                )
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def on_evaluation(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if not trainer.world.first:
            return
        for number in self.numbers(trainer.dataset):
            trainer.record({
                "kind": "histogram", "table": trainer.dataset.columns[number].name, "step": trainer.state.step,
                "epoch": trainer.state.epoch + 1, **histograms(trainer.model.tables, number),
            })  # fmt: skip


def histograms(tables: Any, number: int) -> dict[str, Any]:
    """The weights of one table of a `QuantEmbeddingBagCollection`.

    Returns:
        bits; rows, how many were counted; master and quantized, each {low, high, counts} in bins of equal width, or
        {values, counts} where there are few distinct ones; quantized is None for a table of 32 bits.
    """
    first, size = int(tables.row_offsets[number]), tables.table_rows[number]
    count = min(size, _ROWS)
    rows = torch.arange(count, device=tables.row_offsets.device) * size // count
    weights, bits = storage_of(tables.weight).gather(tables.weight, rows + first).float(), tables.table_bits[number]
    quantized = None
    if bits != 32:
        scales = tables.weight_fake_quantizer.table_scales(tables.weight)[number]
        scale, zero_point = scales.of(rows)
        quantized = _counted(fake_quantize(weights, scale, bits, zero_point=zero_point))
    return {"bits": bits, "rows": count, "master": _binned(weights.cpu().numpy()), "quantized": quantized}


def _counted(values: torch.Tensor) -> dict[str, Any]:
    found, counts = np.unique(values.cpu().numpy(), return_counts=True)
    if len(found) > _VALUES:
        return _binned(values.cpu().numpy())
    return {"values": [_short(value) for value in found], "counts": counts.tolist()}


def _binned(values: np.ndarray) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    largest = float(np.abs(values).max(initial=0)) or 1.0
    counts, _ = np.histogram(values, _BINS, (-largest, largest))
    return {"low": _short(-largest), "high": _short(largest), "counts": counts.tolist()}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
