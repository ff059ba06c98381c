"""Metrics of an exported file on a split of the dataset that it was trained on."""

from pathlib import Path
from typing import Any

import numpy as np

from dqrm.errors import UserError
from dqrm.export.artifact import Artifact
from dqrm.export.base_rate import BaseRate
from dqrm.export.pipeline import require_dataset, score_file
from dqrm.training.environment import Progress
from dqrm.training.evaluation import evaluate, measure_on, score_split


def evaluate_file(
    path: str | Path,
    data: str | Path,
    split: str = "test",
    batch_size: int = 8192,
    progress: Progress | None = None,
    verify: bool = True,
    correct_subsampling: bool = True,
) -> dict[str, Any]:
    """Metrics of an exported file, .dqrm or .onnx: see `training.evaluation.evaluate`.

    Of a dataset with `subsample_negatives`, those of the file's own probabilities on the log's click rate, whether it
    corrects them or not; with correct_subsampling False those of the trained model on the rows as they are.

    Args:
        verify: compare the artifact (an .onnx file has none) and the split with their checksums first.

    Raises:
        UserError: the file is damaged or of another kind, or was trained on other data.
    """
    path = Path(path)
    if path.suffix == ".dqrm":
        content = Artifact.open(path, verify).content
    elif path.suffix == ".onnx":
        from dqrm.export.runtimes import onnx_content

        content = onnx_content(path)
    else:
        why = "; torch.export.load can run code that is in a .pt2, so dqrm opens none" if path.suffix == ".pt2" else ""
        raise UserError(f"{path} cannot be evaluated, expected a run folder, a .dqrm or a .onnx file{why}")
    dataset = require_dataset(content, data, path)
    if verify:
        dataset.verify(split, tell=progress)
    dataset.validate(split)
    if path.suffix == ".dqrm":
        return evaluate(Artifact.open(path).model(), dataset, split, batch_size, progress, False, correct_subsampling)
    logits = score_split(score_file(path), dataset, split, batch_size, progress)
    if not correct_subsampling:
        logits -= np.float32(BaseRate.of(content).offset)
    return measure_on(logits, dataset, split, correct_subsampling)
