"""Comparison of an exported file with its model: rows to score, and the largest difference of probabilities."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqrm.artifact.file import Artifact
from dqrm.data.batches import Batch
from dqrm.data.dataset import Dataset
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError


def sample(described: Mapping[str, Any], dataset: Dataset | None, rows: int) -> tuple[Batch, str]:
    """Rows to score, and their description: the first ones of the dataset's test split, or generated ones.

    Args:
        described: the model, as an artifact's header describes it.
    """
    if dataset is not None and (name := sampled_split(dataset)):
        return next(iter(dataset.split(name).batches(rows))), f"{name} split"
    return generate(described, rows), "generated ids"


def sampled_split(dataset: Dataset) -> str | None:
    """The split that `sample` takes its rows from."""
    return next((name for name in ("test", "validation", "train") if dataset.rows[name]), None)


def looked_up(batch: Batch, opened: Artifact, dataset: Dataset) -> Batch:
    """The rows of a batch as the artifact reads them from a log: their ids become the keys that the dataset has for
    them, and those are looked up in the artifact's own vocabularies, as predict does. Row 0 has no key and stays.

    All keys are looked up, one column after the other, and not only those of the batch.

    Raises:
        UserError: a vocabulary of the artifact gives a key another row than the dataset's does, or lacks one.
    """
    if dataset.hashed:
        return batch
    single, bags = [], []
    for number, column in enumerate(dataset.columns):
        known = dataset.vocabulary(number)
        shipped = Vocabulary.read(opened.vocabulary(number), f"the exported vocabulary of {column.name}")
        shipped_rows, rows = shipped.lookup(known.keys), known.table_rows
        wrong = np.flatnonzero(shipped_rows != rows)
        if len(wrong) or shipped.rows != column.rows:
            what = f"{shipped.rows} rows, expected {column.rows}"
            if len(wrong):
                at = int(wrong[0])
                what = f"row {shipped_rows[at]} for {known.keys[at]!r}, expected {rows[at]}"
            raise UserError(f"the exported vocabulary of column {column.name} has {what}: nothing was written")
        row_of = np.zeros(column.rows, np.int32)
        row_of[rows] = shipped_rows
        if column.multi:
            values, offsets = batch.bags[number - dataset.num_single]
            bags.append((torch.from_numpy(row_of[values.numpy()]), offsets))
        else:
            single.append(torch.from_numpy(row_of[batch.ids[:, number].numpy()]))
    ids = torch.stack(single, 1) if single else batch.ids
    return Batch(batch.dense, ids, tuple(bags), batch.labels)


def generate(described: Mapping[str, Any], rows: int, seed: int = 0) -> Batch:
    """`rows` random samples: ids over the whole of each table, first and last row included; bags of 0 to 4 ids."""
    random = np.random.default_rng(seed)
    single, bags = [], []
    for count, multi in zip(described["table_rows"], described["multi"]):
        lengths = random.integers(0, 5, rows) if multi else np.ones(rows, np.int64)
        ids = random.integers(0, count, int(lengths.sum()))
        ids[:1], ids[-1:] = 0, count - 1
        if multi:
            bags.append((torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(np.cumsum(lengths) - lengths)))
        else:
            single.append(torch.from_numpy(ids.astype(np.int32)))
    dense = np.log1p(random.exponential(20, (rows, described["num_dense"]))).astype(np.float32)
    return Batch(
        torch.from_numpy(dense),
        torch.stack(single, 1) if single else torch.empty(rows, 0, dtype=torch.int32),
        tuple(bags),
        torch.zeros(rows),
    )


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [B] of a model for a batch."""
    with torch.inference_mode():
        logits: Tensor = model(batch.dense, batch.ids, batch.bags)
    return logits


def compare(logits: Tensor, expected: Tensor, leave_out: int = 0) -> float:
    """The largest difference between the probabilities of two sets of logits; infinite where one is not finite.

    Args:
        leave_out: how many rows with the largest differences do not count; below the number of rows.
    """
    if logits.shape != expected.shape:
        return float("inf")
    if not len(logits):
        return 0.0
    differences = (logits.double().sigmoid() - expected.double().sigmoid()).abs()
    difference = differences.sort(descending=True).values[leave_out].item()
    finite = bool(logits.isfinite().all() and expected.isfinite().all())
    return float(difference) if finite else float("inf")
