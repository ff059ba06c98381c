"""Sources for scoring: a run folder, a file that `dqrm export` wrote, or a model in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.artifact.base_rate import BaseRate
from dqrm.artifact.file import Artifact
from dqrm.data.batches import Batch
from dqrm.data.dataset import Dataset
from dqrm.data.hashing import HashedRows
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.export.check import logits_of
from dqrm.export.formats import either, formats
from dqrm.export.formats.base import Format
from dqrm.export.origin import dataset_of, require_dataset, watch_checkpoint
from dqrm.serving.config import PredictConfig
from dqrm.training.environment import Progress
from dqrm.training.evaluation import evaluating
from dqrm.training.run import Run

Score = Callable[[Batch], Tensor]
Model = nn.Module | str | Path
"""A model, the path of a run folder, or that of an exported file."""


@dataclass(frozen=True)
class LogFormat:
    """How the log of a model is read: options of `prepare`, columns, and the vocabulary of each column or its hash."""

    options: dict[str, Any]
    columns: list[Any]
    vocabularies: Sequence[Vocabulary] | Sequence[HashedRows]

    @classmethod
    def of_dataset(cls, dataset: Dataset, verify: bool = True, progress: Progress | None = None) -> "LogFormat":
        """As the dataset folder says. verify: compare its vocabularies with their checksums first."""
        if verify:
            dataset.verify("vocabulary", tell=progress)
        columns = dataset.info["schema"]["columns"]
        return cls(dataset.info["options"], columns, dataset.row_maps())

    @classmethod
    def of_artifact(
        cls,
        opened: Artifact,
        data: str | Path | None = None,
        verify: bool = True,
        progress: Progress | None = None,
    ) -> "LogFormat":
        """As the artifact says. data: the dataset folder, for one without vocabularies; verify: of that folder.

        Raises:
            UserError: the artifact lacks them, or is damaged; the folder is another dataset.
        """
        if data is not None:
            return cls.of_dataset(require_dataset(opened.content, data, opened.path), verify, progress)
        options, columns = opened.content.get("options"), opened.content["schema"]["columns"]
        vocabularies: Sequence[Vocabulary] | Sequence[HashedRows] | None = HashedRows.of_columns(columns)
        if vocabularies is None:
            vocabularies = [
                Vocabulary.read(opened.vocabulary(number), f"the vocabulary of {column['name']}")
                for number, column in enumerate(columns)
            ]
        if options is None:
            raise UserError(
                f"{opened.path} does not record how its log was read, since its dataset was missing at export; "
                "name the dataset folder with --data (in Python data=...)"
            )
        return cls(options, columns, vocabularies)


@dataclass(frozen=True)
class Source:
    """An opened model, ready to score raw logs.

    Attributes:
        name: for messages. scoring: inside, once, a function from a batch to logits [B]. log: how its log is read.
        rate: the click rate that the probabilities are on. files: files that are read while it scores.
        threads: CPU threads to score on; 0: the fastest number.
    """

    name: str
    scoring: AbstractContextManager[Score]
    log: LogFormat
    rate: BaseRate
    files: tuple[Path, ...]
    threads: int = 0


def path_of(model: Any) -> Path | None:
    """The path of a run folder or of an exported file; None for a model in memory.

    Raises:
        UserError: `model` is something else.
    """
    if isinstance(model, (str, Path)):
        return Path(model)
    if isinstance(model, nn.Module) and hasattr(model, "tables"):
        return None
    raise UserError(
        f"model is a {type(model).__name__}, expected the path of a run folder or of a file that `dqrm export` wrote, "
        "or a model"
    )


def is_exported_file(path: Path) -> bool:
    """Whether the path is, or by its suffix should be, that of an exported file rather than of a run folder."""
    return not path.is_dir() and (path.exists() or path.suffix in formats())


def scored_format(path: Path, doing: str = "evaluated") -> Format:
    """The format of an exported file that is to be scored. doing: for the error.

    Raises:
        UserError: its format cannot be scored.
    """
    known = formats()
    file_format = known.get(path.suffix)
    if file_format is None or file_format.not_evaluated:
        names = [f"a {suffix}" for suffix, other in known.items() if not other.not_evaluated]
        why = f"; {file_format.not_evaluated}" if file_format is not None else ""
        raise UserError(f"{path} cannot be {doing}, expected {either(['a run folder', *names])} file{why}")
    return file_format


def open_source(model: Model, config: PredictConfig, progress: Progress | None = None) -> Source:
    """Open a source for scoring, with the log format that it was trained on.

    Raises:
        UserError: it is damaged or not a source, its vocabularies are missing, or its data does not match.
    """
    path = path_of(model)
    if path is None:
        return _of_module(model, config, progress)
    if not is_exported_file(path):
        return _of_run(path, config, progress)
    # Whatever its name is: an artifact is recognized by its header.
    if path.suffix in formats() and not formats()[path.suffix].is_artifact:
        return _of_file(path, config, progress)
    opened = Artifact.open(path, config.verify)
    packed = opened.model(config.in_memory)
    log = LogFormat.of_artifact(opened, config.data, config.verify, progress)
    return Source(str(path), nullcontext(partial(logits_of, packed)), log, opened.base_rate, (path,), config.threads)


def _of_run(path: Path, config: PredictConfig, progress: Progress | None) -> Source:
    """The best checkpoint of a run, its tables memory-mapped unless config.in_memory."""
    run = Run.open(path)
    dataset = dataset_of(run, config.data, needed=True)
    assert dataset is not None
    log = LogFormat.of_dataset(dataset, config.verify, progress)
    model, state = run.load_model(mapped=not config.in_memory, verify=config.verify)
    watch = watch_checkpoint(run, state["step"], "the loaded model", "load it again")
    rate = BaseRate.chosen(dataset.subsample_negatives, True)
    model.logit_offset = rate.offset

    def watched(batch: Batch) -> Tensor:
        watch.check()
        return logits_of(model, batch)

    scoring: Score = partial(logits_of, model) if config.in_memory else watched
    return Source(str(path), nullcontext(scoring), log, rate, (path, dataset.path), config.threads)


def _of_file(path: Path, config: PredictConfig, progress: Progress | None) -> Source:
    """A file of a format without vocabularies: those of the dataset folder are used."""
    kind = scored_format(path, "scored")
    if config.data is None:
        raise UserError(
            f"{path} holds no vocabularies; name the dataset folder that it was trained on with --data (in Python "
            "data=...)"
        )
    content = kind.content(path)
    log = LogFormat.of_dataset(require_dataset(content, config.data, path), config.verify, progress)
    threads = config.threads or torch.get_num_threads()  # a session's number is fixed when it is opened
    return Source(str(path), nullcontext(kind.open(path, threads)), log, BaseRate.of(content), (path,), threads)


def _of_module(model: Any, config: PredictConfig, progress: Progress | None) -> Source:
    """A model in memory: one from `dqrm.load` has its artifact, another needs the dataset folder."""
    from dqrm.serving.loaded import LoadedModel

    name, scoring = type(model).__name__, evaluating(model, sampled=False)
    if isinstance(model, LoadedModel):
        opened, data = model._opened, config.data or model._data
        log = LogFormat.of_artifact(opened, data, config.verify, progress)
        return Source(str(opened.path), scoring, log, opened.base_rate, (opened.path,), config.threads)
    if config.data is None:
        raise UserError(
            f"a {name} in memory has no vocabularies; name the dataset folder that it was trained on: "
            "PredictConfig(data=...)"
        )
    dataset = Dataset(config.data)
    if (rows := [column.rows for column in dataset.columns]) != list(model.tables.table_rows):
        raise UserError(f"{config.data} has tables of {rows} rows, but the model's are {list(model.tables.table_rows)}")
    log = LogFormat.of_dataset(dataset, config.verify, progress)
    share = dataset.subsample_negatives
    if model.logit_offset is not None:
        return Source(name, scoring, log, BaseRate(share, bool(share and model.logit_offset)), (), config.threads)
    rate = BaseRate.chosen(share, True)
    return Source(name, _corrected(model, rate.offset), log, rate, (), config.threads)


@contextmanager
def _corrected(model: Any, offset: float) -> Iterator[Score]:
    """Inside, the model is in evaluation mode; yields its logits with the offset added."""
    with evaluating(model, sampled=False) as logits:
        yield lambda batch: logits(batch) + offset
