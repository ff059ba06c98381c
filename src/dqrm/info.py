"""What `dqrm info` and the ends of `prepare`, `train`, `eval`, `export` and `predict` print."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqrm.console import figure, messages, print_table, results, size
from dqrm.data.dataset import Dataset
from dqrm.data.subsampling import negative_weight
from dqrm.errors import UserError, printable
from dqrm.quant.config import QATConfig
from dqrm.training.footprint import describe_table_bytes
from dqrm.training.metrics import legend
from dqrm.training.run import Run

# Share of unknown ids from which on `predict` asks whether a column is the one it seems to be.
_ALMOST_ALL = 0.95
# Magnitude of dense values above which training hardly works.
_TOO_WIDE = 1e4
# Mean weight of the rows (or one over it) above which the learning rate is not what it seems.
_FAR_FROM_1 = 5


def describe(path: str, verify: bool = False) -> dict[str, Any]:
    """The facts about a dataset folder, a run folder or an artifact.

    Args:
        verify: compare all bytes with their checksums: of an artifact, a dataset, or a run's checkpoints.

    Raises:
        UserError: it is none of them, or the artifact is damaged.
    """
    if Path(path).is_file():
        from dqrm.artifact.file import Artifact

        opened = Artifact.open(path, verify)
        if verify:
            opened.verify_vocabularies()
        return {**opened.describe(), "verified": verify}
    if (Path(path) / "run.json").exists():
        run = Run.open(path)
        content = {"kind": "run", **run.info, "finished": run.summary is not None, "summary": run.summary}
        content["table_bytes"] = run.table_bytes()
        return {**content, "verified": verify and run.verify()}
    if (Path(path) / "dataset.json").exists():
        dataset = Dataset(path)
        return {"kind": "dataset", **dataset.describe(), "verified": verify and dataset.verify()}
    what = "is neither a dataset folder nor a run folder nor an artifact" if Path(path).exists() else "does not exist"
    raise UserError(f"{path} {what}; `dqrm prepare`, `train` and `export` make them")


def print_description(path: str, verify: bool = False) -> None:
    """Print what `describe` finds."""
    content = describe(path, verify)
    if content["kind"] == "artifact":
        print_artifact(content)
    elif content["kind"] == "dataset":
        print_dataset(Dataset(path))
    elif content["finished"]:
        print_summary(Path(path), content["summary"])
    else:
        data = content["data"]
        results.print(
            f"{path}: a run that is not finished, on data {data['fingerprint'][:16]} "
            f"({len(data['dense'])} dense columns, {len(data['columns'])} tables); "
            f"`dqrm train --resume {shlex.quote(path)}` continues it"
        )
        _print_table_bytes(Run.open(path))
    if verify and content["kind"] != "artifact":  # which says so beside where it comes from
        _say(f"{path}: {'checksums match' if content['verified'] else 'not verified, no checksums to compare with'}")


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
    if dataset.day:
        described = dataset.describe()
        told = ", ".join(f"{count:,} {_CHANGES[name]}" for name, count in described["changes"].items())
        _say(f"Day {dataset.day}, extends data {described['extends'][:16]}: {told}")
    for what in ("weight", "group"):
        if name := getattr(dataset, what):
            _say(f"{what.capitalize()} of each row: column {name}")
    if dataset.hashed and dataset.columns:
        hashes = dataset.info["schema"]["columns"][0].get("hashes", 1)
        _say(f"Ids are hashed to rows, each to {hashes} of its table")


def warn_of_data(dataset: Dataset) -> None:
    """Warn of values with which training hardly works."""
    for name, value in dataset.wide(above=_TOO_WIDE).items():
        messages.print(
            f"Warning: dense column {name} holds values up to {value:.3g}, with which training is likely to diverge; "
            "use --dense-transform log1p, or leave it out if it is a time or an id"
        )
    if (mean := dataset.mean_weight) is not None and not 1 / _FAR_FROM_1 <= mean <= _FAR_FROM_1:
        messages.print(
            f"Warning: the mean weight of the training rows is {mean:.3g}, which scales loss and gradients as much; "
            "divide the weights by it, or choose --learning-rate for it"
        )


def print_metrics(title: str, metrics: dict[str, Any], subsample_negatives: float = 0.0) -> None:
    """One line of figures, and of which click rate they are."""
    if subsample_negatives:
        on = "true base rate" if metrics["base_rate"] == "true" else "base rate of the sampled rows"
        title = f"{title}, {on}"
    names = _measured(metrics)
    print_table(title, names, [[figure(metrics[name], 6) for name in names]])
    results.print(legend(names))
    if newer := metrics.get("newer_ids"):
        share = newer["ids"] / newer["all"] if newer["all"] else 0
        _say(
            f"{newer['ids']:,} of {newer['all']:,} ids ({share:.2%}) are newer than the model's vocabularies and are "
            "looked up as row 0 (unseen)"
        )
    if subsample_negatives:
        share, weight = f"{subsample_negatives:g}", f"{negative_weight(subsample_negatives):.6g}"
        _say(
            f"Negatives were subsampled (subsample_negatives {share}): each one left counts {weight} times"
            if metrics["base_rate"] == "true"
            else f"Rows count as they are after subsample_negatives {share}, as in training; the true odds are "
            f"{weight} times smaller"
        )


def _measured(metrics: dict[str, Any]) -> list[str]:
    """What was measured, of metrics that are not registered here too."""
    return [name for name, value in metrics.items() if not isinstance(value, (str, dict))]


def print_predictions(log: Sequence[str], result: dict[str, Any]) -> None:
    """What `dqrm predict` made of a log."""
    from dqrm.artifact.base_rate import BaseRate

    for text in result["damaged"]:
        messages.print(f"{text}; the rows before were scored")
    for name, share in result["unseen"].items():
        if share > _ALMOST_ALL:
            messages.print(
                f"Warning: {share:.1%} of the ids in {name} are unknown to the model; are they written as in the log "
                "that it was trained on (true and not True, 7 and not 007)?"
            )
    told = BaseRate(**result["subsampling"]).tell()
    if told is not None:
        messages.print(told)
    if not result["rows"]:
        messages.print(f"Warning: no row of {', '.join(log)} was scored; the log holds none that is sound")
    skipped = f", {result['skipped']:,} malformed lines skipped" if result["skipped"] else ""
    threads = f" on {result['threads']} CPU thread{'s' * (result['threads'] != 1)}" if result["threads"] else ""
    rate = f"{result['rows_per_second']:,.0f} a second{threads}"
    messages.print(f"{result['output']}: {result['rows']:,} rows, {rate}{skipped}")


def print_summary(path: Path, summary: dict[str, Any]) -> None:
    """The result of a training run."""
    best, quantization = summary["best"], summary["config"]["quantization"]
    names = _measured(best["metrics"])
    rows = [["validation", *(figure(best["metrics"][name], 5) for name in names)]]
    if summary["test"]:
        rows.append(["test", *(figure(summary["test"].get(name), 5) for name in names)])
    print_table(f"{path}: step {best['step']}, {summary['selection']}", ["split", *names], rows)
    results.print(legend(names))
    if share := Run.open(path).info["data"].get("subsample_negatives"):
        results.print(
            f"These are figures on the sampled rows (subsample_negatives {share:g}); `dqrm eval` gives those on the "
            "true base rate, and `dqrm export` corrects the model's probabilities to it"
        )
    bits = [quantization[name] or quantization["bits"] for name in ("table_bits", "mlp_bits")]
    small = ""
    if quantization.get("small_table_bits"):
        small = f" ({quantization['small_table_bits']} below {quantization['small_table_rows']:,} rows)"
    columns, dim = Run.open(path).info["data"]["columns"], summary["config"]["model"]["embedding_dim"]
    of_tables = 8 * summary["stored_bytes"]["tables"] / max(1, dim * sum(column["rows"] for column in columns))
    results.print(
        f"Tables {bits[0]} bits{small}, MLP {bits[1]} bits{_quantizers(quantization)}: "
        f"{size(summary['stored_bytes']['total'])} of weights, {_scales(quantization, of_tables)}; "
        f"{summary['steps']:,} steps, {summary['samples_per_second']:,.0f} samples per second of training"
    )
    _print_table_bytes(Run.open(path))
    if exchange := summary.get("exchange"):
        parts = ", ".join(f"{part.replace('_', ' ')} {count:,.0f}" for part, count in exchange["payload_parts"].items())
        results.print(
            f"{exchange['ranks']} ranks: payload {exchange['payload_bytes']:,.0f} bytes per step and rank ({parts}); "
            f"{exchange['sent_bytes']:,.0f} bytes sent, {exchange['waited_ms']:.1f} ms waited"
        )


def _print_table_bytes(run: Run) -> None:
    if (memory := run.table_bytes()) is not None:
        results.print(describe_table_bytes(memory, run.config, run.table_weights))


def print_artifact(content: dict[str, Any]) -> None:
    """Columns and tables, sizes, and where the model comes from."""
    from dqrm.models.registry import described_config, model_class
    from dqrm.quant.packing import storage_bytes

    model, schema, provenance = content["model"], content["schema"], content["provenance"]
    sizes, run = content["sizes"], provenance["run"]
    columns = [(column["name"], column["multi"]) for column in schema["columns"]]
    bits = model["table_bits"] if isinstance(model["table_bits"], list) else [model["table_bits"]] * len(columns)
    widths = [storage_bytes(model["config"]["embedding_dim"], each) for each in bits]
    print_table(
        f"{content['path']}: {model['num_dense']} dense columns, {len(columns)} tables",
        ["column", "rows", "ids per sample", "bits", "codes"],
        [
            [name, figure(rows), "many" if multi else "1", str(each), size(rows * width)]
            for (name, multi), rows, each, width in zip(columns, model["table_rows"], bits, widths)
        ],
    )
    if schema["dense"]:
        _say(f"Dense columns: {', '.join(schema['dense'])}")
    _print_parts(sizes, content["bits_per_weight"])
    config = described_config(model)
    _say(
        f"{model_class(config).describe(config)}; "
        f"tables {_told(bits, model['table_bits'])} bits ({_scales(model, content['table_bits_per_weight'])}), "
        f"MLP {model['mlp_bits']} bits ({_METHODS[content['quantization']['method']]})"
    )
    print_base_rate(content)
    kept = content["vocabulary"]["mode"]
    where = {
        "embed": "in the file", "beside": "in a second file beside it", "none": "left out",
        "hash": "not needed: ids are hashed to rows",
    }[kept]  # fmt: skip
    _say(
        f"Vocabularies {where}; data {provenance['data']['fingerprint'][:16]}, written by dqrm {provenance['dqrm']} "
        f"from the {run['checkpoint']} checkpoint, step {run['step']:,}{'; checksums match' * content['verified']}"
    )
    measured = [(name, metrics) for name, metrics in run["metrics"].items() if metrics]
    if measured:
        names = _measured(measured[0][1])
        rows = [[name, *(figure(metrics.get(key), 6) for key in names)] for name, metrics in measured]
        before = " before quantization, in FP32" if content["quantization"]["method"] == "ptq" else ""
        before += ", on the sampled rows" if content["subsampling"]["subsample_negatives"] else ""
        print_table(f"The run's metrics{before}", ["split", *names], rows)
        results.print(legend(names))


def _told(bits: Sequence[int], described: Any) -> str:
    """'4', or '4 (7 of them) and 8 (3)'."""
    if not isinstance(described, list):
        return str(described)
    return " and ".join(f"{each} ({bits.count(each)} of {len(bits)})" for each in sorted({*bits}))


def _scales(described: dict[str, Any], bits: float) -> str:
    """What the tables' weights take, and how many of them share a scale."""
    granularity = str(described.get("table_granularity", "table"))
    told = f"{bits:.3f} bits per weight of the tables"
    if bits >= 32:
        return told
    of = f"{granularity.partition(':')[2]} rows" if granularity.startswith("block:") else granularity
    zero_point = " and zero point" if described.get("table_qscheme") == "affine" else ""
    return f"{told} with a scale{zero_point} per {of}"


def print_export(result: dict[str, Any]) -> None:
    """What `dqrm export` and `dqrm quantize` wrote."""
    _print_parts(result["parts"], result["bits_per_weight"])
    compared = result["compared"]
    results.print(
        f"{', '.join(result['files'])}: {size(result['bytes'])} ({figure(result['bytes'])} bytes); in FP32 the weights "
        f"are {size(result['fp32_bytes'])}"
    )
    results.print(
        f"Verified on {compared['rows']:,} rows ({compared['of']}): probabilities differ from the model's by at most "
        f"{result['largest_difference']:.2g}"
    )
    print_base_rate(result)
    for note in result["notes"]:
        _say(note)
    if "largest_difference_from_fp32" in result:
        results.print(
            f"Against the FP32 model, quantization moved them by at most {result['largest_difference_from_fp32']:.2g}"
        )


def print_base_rate(content: dict[str, Any]) -> None:
    """Which click rate a file's probabilities are on, where negatives were subsampled, and how they are calibrated."""
    from dqrm.artifact.base_rate import BaseRate
    from dqrm.models.calibration import Calibration

    calibration = Calibration.of(content)
    for told in (BaseRate(**content["subsampling"]).tell(), None if calibration is None else calibration.tell()):
        if told is not None:
            _say(told)


def _say(text: str) -> None:
    results.print(printable(text))


def _quantizers(quantization: dict[str, Any]) -> str:
    """Which quantizers a run was trained with, where they are not the default ones."""
    default = QATConfig.__dataclass_fields__
    used = [quantization.get(name, default[name].default) for name in ("quantizer", "activation_quantizer")]
    told = [f"quantizer {used[0]}"] * (used[0] != default["quantizer"].default)
    if (bits := quantization.get("activation_bits", 32)) != 32:
        told.append(f"inputs of layers {bits} bits, {used[1]}")
    return f" ({'; '.join(told)})" if told else ""


_CHANGES = {
    "new": "new rows", "reused": "vacant rows reused", "freed": "rows freed", "vacant": "rows vacant",
    "rare": "ids without a row",
}  # fmt: skip
_METHODS = {"qat": "as trained", "ptq": "quantized after training", "none": "not quantized"}


def _print_parts(sizes: dict[str, int], bits: float) -> None:
    rows = [[part, figure(count), size(count)] for part, count in sizes.items() if count and part != "file"]
    print_table(
        f"{'Packed' if bits < 32 else 'Not quantized'}: {bits:.3f} bits per weight", ["part", "bytes", "size"], rows
    )
