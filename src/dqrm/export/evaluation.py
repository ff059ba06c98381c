"""Metrics of an exported file on a split of the dataset that it was trained on."""

from pathlib import Path
from typing import Any

from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.export.artifact import Artifact
from dqrm.export.config import SUFFIXES
from dqrm.export.pipeline import require_dataset, score_file
from dqrm.training.environment import Progress
from dqrm.training.evaluation import measure, score_split


def evaluate_file(
    path: str | Path, data: str | Path, split: str = "test", batch_size: int = 8192, progress: Progress | None = None
) -> dict[str, Any]:
    """Metrics of an exported file (.dqrm, .onnx, .pt2, .pte): see `training.metrics.click_metrics`.

    Raises:
        UserError: the file is damaged or of another kind, or was trained on other data.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} should be a run folder, or a file that ends in {', '.join(SUFFIXES)}")
    dataset = Dataset(data)
    if path.suffix == ".dqrm":
        require_dataset(Artifact.open(path).content, data, path)
    dataset.validate(split)
    return measure(score_split(score_file(path), dataset, split, batch_size, progress), dataset, split)
