"""`dqrm predict`: probabilities of a model for a raw log."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dqrm.data.config import PrepareConfig
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.errors import UserError
from dqrm.options import build
from dqrm.serving.config import PredictConfig
from dqrm.serving.sources import Model, Source, open_source
from dqrm.serving.writer import predict as write_predictions
from dqrm.training.environment import Progress

_DEFAULTS = PredictConfig()


def predict(
    model: Model,
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    config: PredictConfig = _DEFAULTS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every row of raw logs as a stream: the log may be larger than memory.

    The log is read as the model's own was: the same columns, layout, crosses and transformations; it needs no label.
    Ids that the model does not know are looked up as row 0 of their table.

    Args:
        model: the file that `dqrm export` wrote; a run folder, whose best checkpoint scores with the vocabularies of
            its dataset folder; or a model in memory. config.data names the dataset folder where none is known: for
            .onnx files, and for a model that `dqrm.load` did not give.
        sources: CSV, TSV, Parquet or Criteo's layout, also compressed; several files and globs.
        output: .parquet, .csv or .tsv: the kept columns, then `probability` (float32), for each row of the log.

    Returns:
        rows, skipped (malformed lines), damaged, unseen, seconds, rows_per_second, threads (the number used; torch's
        own is restored afterwards), output, and subsampling: the click rate that the probabilities are on.

    Raises:
        UserError: the model is damaged or lacks vocabularies, a column is missing (names it), a malformed line, or
            an output that cannot be written.
    """
    opened = open_source(model, config, progress)
    given = {name: getattr(config, name) for name in ("delimiter", "multi_separator")}
    given = {name: value for name, value in given.items() if value is not None}
    read_as = build(PrepareConfig, {**opened.log.options, **given}, "predict" if given else opened.name)
    _require_another(Path(output), opened, config.data)
    encoder = RawEncoder(read_as, opened.log.columns, opened.log.vocabularies, config.keep, config.on_error)
    log = RawLog(sources, encoder)
    with opened.scoring as score:
        result = write_predictions(score, log, Path(output), config.batch_size, progress, opened.threads)
    return {**result, "output": str(output), "subsampling": opened.rate.header()}


def _require_another(output: Path, opened: Source, data: str | None) -> None:
    """Raise UserError if the output would overwrite a file that scoring reads: the model's or a dataset's."""
    for read in (*opened.files, *([] if data is None else [Path(data)])):
        for own in (read, *read.rglob("*")):
            with suppress(OSError):
                if output.samefile(own):
                    raise UserError(f"{output} is read for scoring and would be overwritten, expected another output")
