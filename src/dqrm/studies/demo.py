"""`make demo`: a DLRM on a generated click log by the default recipe in INT4 and in FP32, and by the DQRM paper's in
FP32; and the table that compares them."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dqrm.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.console import bars, figure, messages, print_json, print_table, results, size
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate, truth_path
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.export.pipeline import export_run
from dqrm.files import exclusive, write_json
from dqrm.quant.config import QATConfig
from dqrm.serving.evaluation import evaluate
from dqrm.training.launch import train
from dqrm.training.metrics import METRICS, legend

LOG = GenerateConfig()
CONFIG = Config(
    model=ModelConfig(embedding_dim=16, bottom_mlp=(128, 64, 16), top_mlp=(128, 64, 1)),
    # A second thread gains steps this small nothing, and costs them tenfold where another program holds the core.
    # On this log the first or second epoch is the best, and two more show it as well as five.
    training=TrainingConfig(threads=1, patience=2),
)
BITS = {"FP32": QATConfig(bits=32), "INT4": CONFIG.quantization}
PAPER = "FP32, paper's recipe"

# Locked while a demo runs; a folder with it may be emptied.
_MARKER = ".dqrm-demo"
_PARTS = ("log.txt", "log.truth.npy", "data", "fp32", "int4", "paper_fp32", "int4.dqrm", "demo.json")


def variants_of(config: Config) -> dict[str, tuple[str, Config]]:
    """What is compared, by name: the folder and the configuration of each."""
    alike = {name: (name.lower(), replace(config, quantization=bits)) for name, bits in BITS.items()}
    # The DQRM paper's on Kaggle, as configs/kaggle_fp32.yaml has it.
    options = replace(config.training, epochs=5, batch_size=128, patience=0, callbacks=())
    paper = replace(config, quantization=BITS["FP32"], optimizer=OptimizerConfig("sgd", 0.1), training=options)
    return alike | {PAPER: ("paper_fp32", paper)}


def run_demo(folder: Path, as_json: bool = False, log: GenerateConfig = LOG, config: Config = CONFIG) -> dict[str, Any]:
    """Generate, prepare, train three times, compare, export; leaves log, dataset, runs and artifact in `folder`.

    Args:
        folder: made if it is not there; what an earlier demo left in it is replaced.
        as_json: print the result as JSON instead of tables.
        log: the log to draw.
        config: what to train; each variant replaces its quantization, the paper's its recipe.

    Returns:
        {'data', 'ceiling': AUC of the known model per split, 'variants': {name: summary and evaluations}, 'artifact':
        what was exported and its test metrics, 'seconds'}.

    Raises:
        UserError: the folder holds something that is not a demo, or another demo is running there.
    """
    started = time.monotonic()
    _require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / _MARKER, f"another dqrm demo is running in {folder}; name another folder with -o"):
        for name in _PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
            if (folder / name).is_file():
                (folder / name).unlink()
        return _run(folder, as_json, log, config, started)


def _require_own(folder: Path) -> None:
    """Raise UserError unless the folder may be emptied: it is empty, or a demo made it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected the name of a folder")
    if any(folder.iterdir()) and not any((folder / name).is_file() for name in (_MARKER, "demo.json")):
        raise UserError(f"{folder} is not empty and holds no demo; name another folder with -o")


def _run(folder: Path, as_json: bool, log: GenerateConfig, config: Config, started: float) -> dict[str, Any]:
    """The demo in a folder of its own."""
    with bars(quiet=as_json) as progress:
        source = folder / "log.txt"
        progress.log(f"Drawing {log.rows:,} lines of a click log from a known model (generated data, not real clicks)")
        generate(source, log, progress=progress)
        dataset = prepare([source], folder / "data", PrepareConfig(layout="criteo-kaggle"), progress=progress)
        variants = {}
        for name, (part, variant) in variants_of(config).items():
            progress.log(f"Training DLRM in {name}")
            run = folder / part
            summary = train(dataset, run, variant, progress, progress.log)
            variants[name] = {**summary, "evaluations": _evaluations(run)}
        packed = folder / "int4.dqrm"
        artifact = export_run(folder / "int4", packed, progress=progress)
        artifact["test"] = evaluate(packed, dataset.path, progress=progress)
    result = {
        "data": "generated",
        "rows": dataset.rows,
        "ceiling": _ceiling(dataset, truth_path(source)),
        "variants": variants,
        "artifact": artifact,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(folder / "demo.json", result)
    if as_json:
        print_json(result)
    else:
        _show(result, dataset)
        messages.print(f"Log, dataset, runs and artifact are in {folder}; {result['seconds']:.0f} seconds.")
    return result


def _evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == "evaluation"]


def _ceiling(dataset: Dataset, truth: Path) -> dict[str, float]:
    """AUC of the true click probabilities on each split: no model that sees the same columns can expect more."""
    from sklearn.metrics import roc_auc_score

    # The Kaggle rule: lines in order of time are first training, then test, then validation.
    probabilities, start, ceiling = np.load(truth, mmap_mode="r"), 0, {}
    for split in ("train", "test", "validation"):
        end = start + dataset.rows[split]
        ceiling[split] = float(roc_auc_score(np.asarray(dataset.split(split).labels()), probabilities[start:end]))
        start = end
    return ceiling


def _show(result: dict[str, Any], dataset: Dataset) -> None:
    names = [name for name, metric in METRICS.items() if not metric.needs_group]
    header = ["", "epoch", "training loss", *(name.replace("_", " ") for name in names)]
    rows = [
        [
            name + (" *" if line["step"] == variant["best"]["step"] else ""),
            figure(line["epoch"]),
            figure(line["train_loss"]),
            *(figure(line[metric]) for metric in names),
        ]
        for name, variant in result["variants"].items()
        for line in variant["evaluations"]
    ]
    results.print(
        "\nThese figures are of GENERATED data: they show that the program works, not how well on your clicks."
    )
    print_table("Validation, epoch by epoch (* the epoch that validation chose)", header, rows)
    chosen = [
        [
            name,
            figure(variant["best"]["epoch"]),
            *(figure(variant["test"][metric]) for metric in names),
            size(variant["stored_bytes"]["total"]),
            figure(round(variant["samples_per_second"])),
        ]
        for name, variant in result["variants"].items()
    ]
    header = ["", "epoch", *(name.replace("_", " ") for name in names), "weights", "samples/s"]
    print_table("Test, at the chosen epoch", header, chosen)
    results.print(legend(names))
    results.print(
        f"The known model that the clicks were drawn from reaches AUC {result['ceiling']['test']:.4f} on test and "
        f"{result['ceiling']['validation']:.4f} on validation: the ceiling.\n"
        f"Weights: {sum(dataset.table_rows):,} table rows and the MLP at the bits they are trained in."
    )
    artifact = result["artifact"]
    vocabularies = artifact["parts"]["vocabularies"]
    results.print(
        f"{Path(artifact['output']).name}, packed: {size(artifact['bytes'] - vocabularies)} and {size(vocabularies)} "
        f"of vocabularies; AUC {artifact['test']['auc']:.4f} on test, probabilities differ "
        f"from the trained model's by at most {artifact['largest_difference']:.1g}."
    )
