"""The origin of an exported file: its run, the dataset that it was trained on, and their record in the file."""

from pathlib import Path
from typing import Any

from dqrm import __version__
from dqrm.artifact.watch import Watch
from dqrm.data.dataset import Dataset
from dqrm.data.lineage import as_seen_by
from dqrm.errors import UserError
from dqrm.export.calibrate import SPLIT
from dqrm.export.check import sampled_split
from dqrm.export.config import ExportConfig
from dqrm.training.checkpoints import WEIGHTS, checkpoint_path
from dqrm.training.environment import Progress
from dqrm.training.run import Run, versions


def require_dataset(content: dict[str, Any], data: Dataset | str | Path, source: Path) -> Dataset:
    """The dataset folder `data` as the artifact's model reads it (`lineage.as_seen_by`).

    Raises:
        UserError: it has other vocabularies, or is not a dataset.
    """
    return as_seen_by(Dataset.of(data), content["provenance"]["data"], source)


def dataset_of(run: Run, data: str | None, needed: bool, otherwise: str = "") -> Dataset | None:
    """The dataset folder `data` as the run's model reads it, by default the one on which it was trained; None if that
    no longer exists.

    Args:
        needed: raise UserError if it no longer exists, or holds other data by now.
        otherwise: the remedy in the message, besides naming the folder.
    """
    path = data or run.info["data"]["path"]
    if data is None and not Path(path).is_dir():
        if needed:
            raise UserError(
                f"the dataset folder {path}, on which {run.path} was trained, does not exist; name it with --data"
                f"{otherwise}"
            )
        return None
    try:
        dataset = run.require_vocabularies(Dataset(path))
    except UserError:
        if needed or data is not None:
            raise
        return None
    return dataset


def watch_checkpoint(run: Run, step: int, user: str, remedy: str) -> Watch:
    """A `Watch` on the file of a checkpoint that its tables are memory-mapped from."""
    path = checkpoint_path(run.checkpoints, step) / WEIGHTS
    try:
        return Watch(path.open("rb"), path, user, remedy)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def check_data(dataset: Dataset, shipped: bool, config: ExportConfig, progress: Progress) -> None:
    """Raise UserError if the parts of a dataset that the export reads are damaged: rows to compare, vocabularies."""
    split = sampled_split(dataset)
    used = [*([split] if split else []), *(["vocabulary"] if shipped else [])]
    if config.calibrate != "none" and split != SPLIT:
        used.append(SPLIT)
    if dataset.narrowed:  # whose batches depend on its vocabularies
        used = sorted({*used, "vocabulary"})
    if config.verify and used:
        dataset.verify(*used, tell=progress)
    for name in used:
        if name != "vocabulary":
            dataset.validate(name)


def subsample_negatives(run: Run, dataset: Dataset | None) -> float | None:
    """The dataset's value, else that in run.json; None if the dataset is gone and an older version wrote run.json."""
    fraction: float | None = (
        run.info["data"].get("subsample_negatives") if dataset is None else dataset.subsample_negatives
    )
    return fraction


def known_schema(run: Run) -> dict[str, Any]:
    data = run.info["data"]
    return {"dense": data["dense"], "columns": data["columns"]}


def provenance(run: Run, state: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The origin of the model, without paths of this machine."""
    best, summary = state["best"], run.summary
    at_best = best is not None and best["step"] == state["step"]
    return {
        "dqrm": __version__,
        "versions": versions(),
        "data": {key: run.info["data"].get(key) for key in ("fingerprint", "vocabulary_digest", "rows", "split")},
        "run": {
            "config": run.info["config"],
            "checkpoint": checkpoint,
            "step": state["step"],
            "metrics": {
                "validation": best["metrics"] if at_best else None,
                "test": summary["test"] if summary and at_best else None,
            },
        },
    }
