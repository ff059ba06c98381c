"""What `dqrm info` and the ends of `prepare`, `train` and `eval` print."""

from pathlib import Path
from typing import Any

from dqrm.console import figure, print_table, results, size
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.training.run import Run

_METRICS = ("rows", "auc", "log_loss", "accuracy", "ne", "calibration")


def describe(path: str) -> dict[str, Any]:
    """The facts about a dataset folder or a run folder.

    Raises:
        UserError: it is neither.
    """
    if (Path(path) / "run.json").exists():
        run = Run.open(path)
        return {"kind": "run", **run.info, "finished": run.summary is not None, "summary": run.summary}
    if (Path(path) / "dataset.json").exists():
        return {"kind": "dataset", **Dataset(path).describe()}
    what = "is neither a dataset folder nor a run folder" if Path(path).exists() else "does not exist"
    raise UserError(f"{path} {what}; `dqrm prepare` makes the one, `dqrm train` the other")


def print_description(path: str) -> None:
    """Print what `describe` finds."""
    found = describe(path)
    if found["kind"] == "dataset":
        print_dataset(Dataset(path))
    elif found["finished"]:
        print_summary(Path(path), found["summary"])
    else:
        data = found["data"]
        results.print(
            f"{path}: a run that is not finished, on data {data['fingerprint'][:16]} "
            f"({len(data['dense'])} dense columns, {len(data['columns'])} tables); "
            f"`dqrm train --resume {path}` continues it"
        )


def print_dataset(dataset: Dataset) -> None:
    """Splits, then columns."""
    clicks = dataset.info["clicks"]
    print_table(
        f"{dataset.path}: data {dataset.fingerprint[:16]}",
        ["split", "rows", "clicks", "click rate"],
        [
            [name, figure(rows), figure(clicks[name]), figure(clicks[name] / rows if rows else None)]
            for name, rows in dataset.rows.items()
        ],
    )
    print_table(
        f"{len(dataset.dense)} dense columns, {len(dataset.columns)} tables",
        ["column", "rows", "ids per sample"],
        [[column.name, figure(column.rows), "many" if column.multi else "1"] for column in dataset.columns],
    )


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """One line of figures."""
    print_table(title, list(_METRICS), [[figure(metrics[name], 6) for name in _METRICS]])


def print_summary(path: Path, summary: dict[str, Any]) -> None:
    """The result of a training run."""
    best, quantization = summary["best"], summary["config"]["quantization"]
    rows = [["validation", *(figure(best["metrics"][name], 5) for name in _METRICS)]]
    if summary["test"]:
        rows.append(["test", *(figure(summary["test"][name], 5) for name in _METRICS)])
    print_table(f"{path}: step {best['step']}, {summary['selection']}", ["split", *_METRICS], rows)
    bits = [quantization[name] or quantization["bits"] for name in ("table_bits", "mlp_bits")]
    results.print(
        f"Tables {bits[0]} bits, MLP {bits[1]} bits: {size(summary['stored_bytes']['total'])} of weights; "
        f"{summary['steps']:,} steps, {summary['samples_per_second']:,.0f} samples per second of training"
    )
