"""`dqrm predict`: an artifact, a raw log, probabilities."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dqrm.data.batches import Batch
from dqrm.data.config import PrepareConfig
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.export.artifact import Artifact
from dqrm.export.origin import require_dataset
from dqrm.models.base import ClickModel
from dqrm.options import build
from dqrm.serving.config import PredictConfig
from dqrm.serving.writer import predict as write_predictions

_DEFAULTS = PredictConfig()


def predict(
    model: str | Path,
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    config: PredictConfig = _DEFAULTS,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Score every row of raw logs with an artifact, in a stream: the log may be larger than memory.

    The log is read as the model's own was: the same columns, layout, crosses and transformations; it needs no label.
    Ids that the model does not know are looked up as row 0 of their table.

    Args:
        model: the file that `dqrm export` wrote (.dqrm).
        sources: CSV, TSV, Parquet or Criteo's layout, also compressed; several files and globs.
        output: .parquet, .csv or .tsv: the kept columns, then `probability` (float32), for each row of the log.

    Returns:
        rows, skipped (malformed lines), damaged, unseen, seconds, rows_per_second, threads (that it computed on;
        torch's number is as before afterwards), output, and subsampling: which click rate the probabilities are on.

    Raises:
        UserError: the artifact is damaged or lacks vocabularies, a column is missing (names it), a malformed line, or
            an output that cannot be written.
    """
    opened = Artifact.open(model, config.verify)
    packed = opened.model(config.in_memory)
    options, columns, vocabularies = reading(opened, config.data, config.verify, progress)
    given = {name: getattr(config, name) for name in ("delimiter", "multi_separator")}
    given = {name: value for name, value in given.items() if value is not None}
    read_as = build(PrepareConfig, {**options, **given}, "predict" if given else str(model))
    _require_another(Path(output), opened, config.data)
    log = RawLog(sources, RawEncoder(read_as, columns, vocabularies, config.keep, config.on_error))
    found = write_predictions(scorer(packed), log, Path(output), config.batch_size, progress, config.threads)
    return {**found, "output": str(output), "subsampling": opened.base_rate.header()}


def scorer(model: ClickModel) -> Callable[[Batch], torch.Tensor]:
    """A function from a batch to the model's logits [B]."""

    def score(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(batch.dense, batch.ids, batch.bags)
        return logits

    return score


def reading(
    opened: Artifact,
    data: str | Path | None = None,
    verify: bool = True,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[dict[str, Any], list[Any], list[Vocabulary]]:
    """How the log of an artifact was read: options of `prepare`, columns, and their vocabularies.

    data: the dataset folder, for an artifact without vocabularies. verify: compare the folder's with their checksums.

    Raises:
        UserError: the artifact lacks them, or is damaged; the folder holds another dataset.
    """
    content = opened.content
    options, columns = content.get("options"), content["schema"]["columns"]
    vocabularies: list[Vocabulary]
    if data is not None:
        dataset = require_dataset(content, data, opened.path)
        if verify:
            dataset.verify("vocabulary", tell=progress)
        options, columns = dataset.info["options"], dataset.info["schema"]["columns"]
        vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    else:
        vocabularies = [
            Vocabulary.read(opened.vocabulary(number), f"the vocabulary of {column['name']}")
            for number, column in enumerate(columns)
        ]
    if options is None:
        raise UserError(
            f"{opened.path} does not say how its log was read, since its dataset was gone when it was exported; "
            "name the dataset folder with --data (in Python data=...)"
        )
    return options, columns, vocabularies


def _require_another(output: Path, opened: Artifact, data: str | None) -> None:
    """Raise UserError where the output would overwrite what the scoring reads: the model, or a dataset's file."""
    for own in (opened.path, *([] if data is None else Path(data).rglob("*"))):
        with suppress(OSError):
            if output.samefile(own):
                raise UserError(f"{output} is read for scoring and would be overwritten, expected another output")
