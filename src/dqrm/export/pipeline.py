"""Export of a run or an artifact to a file that is compared with its model.

The file is written and checked in a folder beside its target and renamed at the end (`workshop`); on failure the old
file stays.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqrm.artifact import file as artifact
from dqrm.artifact.base_rate import BaseRate
from dqrm.artifact.container import CALIBRATED_VERSION, GROWING_VERSION, Entry, write
from dqrm.artifact.file import Artifact
from dqrm.data.batches import Batch
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.export.calibrate import fit
from dqrm.export.check import compare, logits_of, looked_up, sample
from dqrm.export.config import ExportConfig, PTQConfig
from dqrm.export.formats import either, format_of, formats
from dqrm.export.formats.base import Format
from dqrm.export.formats.triton import NAME, check_triton, triton_config
from dqrm.export.origin import (
    check_data,
    dataset_of,
    known_schema,
    provenance,
    require_dataset,
    subsample_negatives,
    watch_checkpoint,
)
from dqrm.export.weights import EncodedWeights
from dqrm.export.workshop import publish, workshop
from dqrm.models.base import ClickModel
from dqrm.models.registry import describe_model, weight_count
from dqrm.training.environment import Progress
from dqrm.training.run import Run

_READ = 1 << 22
_DEFAULTS = ExportConfig()


def export_run(
    source: str | Path,
    output: str | Path,
    config: ExportConfig = _DEFAULTS,
    ptq: PTQConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a trained model as `output`, and compare what was written with the model.

    Args:
        source: a run folder; or an artifact, to be written in another format.
        output: its suffix is that of one of `dqrm.export.formats`: .dqrm (the artifact), .onnx, .pt2, .pte;
            a path that ends in a slash is a folder for browsers.
        ptq: quantize a run that was trained in FP32; None: with the bits and scales that it was trained in.

    Returns:
        files, bytes of each part, bits per weight, the largest difference between probabilities, and which click rate
        they are on (`subsampling`).

    Raises:
        UserError: no run, no dataset where one is needed, an output that cannot be written; or probabilities that
            differ by more than 1e-5: nothing is written then.
    """
    target = format_of(output)
    source, output = Path(source), Path(output)
    _check_target(target, output, config)
    with workshop(output, target) as folder:
        made = folder / output.name
        start = _from_artifact if source.is_file() else _from_run
        result = start(source, made, target, config, ptq, progress or (lambda what, done, total: None))
        names, result["bytes"] = publish(folder, output, target)
    files = [str(output.parent / name) for name in names]
    return {"output": str(output), "files": files, "notes": target.notes(output), **result}


def _check_target(target: Format, output: Path, config: ExportConfig) -> None:
    if config.triton:
        check_triton(output)
    if config.vocabulary == "beside" and not target.is_artifact:
        which = (
            "a folder for browsers has them inside"
            if target.is_folder
            else f"{target.suffix} files hold no vocabularies"
        )
        raise UserError(f"vocabulary {config.vocabulary} is for .dqrm files; {which}")
    if config.onnxruntime_web is not None and not target.is_folder:
        raise UserError(
            f"onnxruntime_web is for a folder for browsers (-o web/), and the output is a {target.suffix} file"
        )


def _from_run(
    source: Path, made: Path, target: Format, config: ExportConfig, ptq: PTQConfig | None, progress: Progress
) -> dict[str, Any]:
    run = Run.open(source)
    shipped, calibrated = target.has_vocabularies and config.vocabulary != "none", config.calibrate != "none"
    otherwise = "" if calibrated else ", or leave the vocabularies out with --vocabulary none"
    dataset = dataset_of(run, config.data, shipped or calibrated, otherwise)
    if dataset is not None:
        check_data(dataset, shipped, config, progress)
    # Memory-mapped: each table is read once, piece by piece, while it is packed.
    model, state = run.load_model(config.checkpoint, mapped=True, verify=config.verify)
    watch = watch_checkpoint(run, state["step"], "the export", "export again")

    def tell(what: str, done: int, total: int | None) -> None:
        watch.check()  # between pieces: reading a file that was cut short would end the process
        progress(what, done, total)

    weights = EncodedWeights(model, ptq, tell)
    described = describe_model(model, weights.table_bits, weights.mlp_bits, weights.granularity, weights.qscheme)
    batch, where = sample(described, dataset, config.check_rows)
    rate = BaseRate.chosen(subsample_negatives(run, dataset), config.correct_subsampling)
    reference = weights.reference()
    reference.logit_offset = model.logit_offset = rate.offset
    if calibrated and dataset is not None:
        model.calibration = fit(config.calibrate, reference, dataset, progress)
        reference.calibration = model.calibration
    expected = logits_of(reference, batch)
    method = {"method": "none" if (weights.table_bits, weights.mlp_bits) == (32, 32) else "qat"}
    content = {
        "model": described,
        "quantization": {"method": "ptq", **asdict(ptq)} if ptq else method,
        "schema": dataset.info["schema"] if dataset else known_schema(run),
        "options": dataset.info["options"] if dataset else None,
        "subsampling": rate.header(),
        "provenance": provenance(run, state, config.checkpoint),
        **_calibration(model),
    }
    first = made if target.is_artifact else made.parent / ".artifact.dqrm"
    entries = weights.entries()
    content["vocabulary"], more = _vocabulary(dataset if shipped else None, config, made, progress)
    entries += more
    version = artifact.version_of(described)
    if dataset is not None and (dataset.hashed or dataset.day):
        version = GROWING_VERSION
    if calibrated:
        version = CALIBRATED_VERSION
    write(first, artifact.KIND, content, entries, version)
    difference = None if ptq is None else compare(logits_of(model, batch), expected)
    watch.check()
    del model, weights, reference, entries  # which also unmaps the checkpoint
    opened = Artifact.open(first, verify=True)
    if shipped and dataset is not None:
        batch = looked_up(batch, opened, dataset)
    result = _finish(opened, rate, made, target, batch, expected, where, config, progress)
    return result if difference is None else {**result, "largest_difference_from_fp32": difference}


def _from_artifact(
    source: Path, made: Path, target: Format, config: ExportConfig, ptq: PTQConfig | None, progress: Progress
) -> dict[str, Any]:
    opened = Artifact.open(source, config.verify)
    if ptq is not None:
        raise UserError(f"{source} is an artifact; quantization after training starts from a run folder")
    if config.calibrate != "none":
        raise UserError(f"{source} is an artifact; calibrate '{config.calibrate}' starts from a run folder")
    if target.is_artifact:
        others = either([suffix for suffix, other in formats().items() if not other.is_artifact])
        raise UserError(f"{source} is an artifact already; name an output that ends in {others}")
    dataset = None
    if config.data is not None:
        dataset = require_dataset(opened.content, config.data, source)
        check_data(dataset, False, config, progress)
    batch, where = sample(opened.content["model"], dataset, config.check_rows)
    share = opened.base_rate.subsample_negatives if dataset is None else dataset.subsample_negatives
    rate = BaseRate.chosen(share, config.correct_subsampling)
    if opened.calibration and rate.offset != opened.base_rate.offset:
        raise UserError(
            f"{source} is calibrated, and its calibration is on the log's own click rate; leave out "
            "--no-correct-subsampling"
        )
    expected = logits_of(_model(opened, rate), batch)
    return _finish(opened, rate, made, target, batch, expected, where, config, progress)


def _model(opened: Artifact, rate: BaseRate) -> ClickModel:
    model = opened.model()
    model.logit_offset = rate.offset
    return model


def _finish(
    opened: Artifact,
    rate: BaseRate,
    made: Path,
    target: Format,
    batch: Batch,
    expected: Tensor,
    where: str,
    config: ExportConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Write the other formats from the artifact, then compare the file with the trained model's outputs."""
    model = _model(opened, rate)
    target.export(opened, model, made, _metadata(opened, rate), config, progress)
    model.tables.check_source()
    if config.triton:
        made.with_name(NAME).write_text(triton_config(opened.content["model"], made.name), encoding="utf-8")
    logits = target.open(made)(batch)
    difference = judged = compare(logits, expected)
    if opened.content["model"]["activation_bits"] != 32 and not target.is_artifact and difference < TIPPED:
        # Another order of summation may round an input between two codes the other way: allowed in 1 % of rows.
        judged = compare(logits, expected, leave_out=len(batch) // 100)
    if not judged <= TOLERANCE:
        raise UserError(
            f"the exported file's probabilities differ from the model's by up to {difference:.3g}, more than "
            f"{TOLERANCE:g}: nothing was written"
        )
    return {
        "parts": target.sizes(opened, made),
        "bits_per_weight": round(opened.bits_per_weight(), 4),
        "fp32_bytes": 4 * weight_count(opened.content["model"]),
        "largest_difference": difference,
        "compared": {"rows": len(batch), "of": where},
        "subsampling": rate.header(),
        **_calibration(model),
    }


TOLERANCE = 1e-5
"""The largest difference between probabilities of an exported file and of the model that it came from."""
TIPPED = 1e-2
"""The same for single rows if a model quantizes the inputs of its layers and another runtime sums them."""


def _metadata(opened: Artifact, rate: BaseRate) -> dict[str, str]:
    """The part of the artifact's header that files of other formats carry, as text."""
    kept = ("model", "quantization", "schema", "provenance")
    more = {"calibration": opened.content["calibration"]} if opened.calibration else {}
    described = {**{name: opened.content[name] for name in kept}, "subsampling": rate.header(), **more}
    return {"dqrm": json.dumps(described)}


def _calibration(model: ClickModel) -> dict[str, Any]:
    """The entry of a header, where there is a calibration."""
    return {"calibration": model.calibration.header()} if model.calibration else {}


def _vocabulary(
    dataset: Dataset | None, config: ExportConfig, made: Path, progress: Progress
) -> tuple[dict[str, Any], list[Entry]]:
    """The artifact's description of the vocabularies of a dataset (None: it has none), and those that it embeds;
    `vocabulary: beside` writes them into a second file."""
    if dataset is None:
        return {"mode": "none"}, []
    if dataset.hashed:
        return {"mode": "hash"}, []
    vocabularies = list(_vocabularies(dataset, made.parent, progress))
    if config.vocabulary != "beside":
        return {"mode": "embed"}, vocabularies
    written = made.parent / ".vocabularies"
    checksum = write(written, artifact.VOCABULARY_KIND, {}, vocabularies)
    os.replace(written, artifact.vocabulary_path(made, checksum))
    return {"mode": "beside", "sha256": checksum}, []


def _vocabularies(dataset: Dataset, folder: Path, progress: Progress) -> Iterator[Entry]:
    """One entry for each column; their bytes stay in `folder` until they are written, so that memory holds one."""
    for number in range(len(dataset.columns)):
        progress("reading vocabularies", number, len(dataset.columns))
        path = folder / f".{number}.parquet"
        path.write_bytes(dataset.vocabulary(number).to_bytes())
        size = path.stat().st_size
        yield Entry(artifact.vocabulary_name(number), torch.uint8, (size,), partial(_pieces, path))
    progress("reading vocabularies", len(dataset.columns), len(dataset.columns))


def _pieces(path: Path) -> Iterator[Tensor]:
    with path.open("rb") as file:
        while piece := bytearray(file.read(_READ)):
            yield torch.frombuffer(piece, dtype=torch.uint8)
