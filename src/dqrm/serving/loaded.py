"""The model that `dqrm.load` returns: packed, and able to score rows of raw values."""

import threading
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.artifact.file import Artifact
from dqrm.data import ingest
from dqrm.data.config import PrepareConfig
from dqrm.data.raw import RawBlock, RawEncoder
from dqrm.data.tables import rows_source
from dqrm.errors import UserError
from dqrm.export.check import logits_of
from dqrm.models.base import ClickModel
from dqrm.options import build
from dqrm.serving.sources import LogFormat
from dqrm.serving.writer import probabilities

# One for all models: a lock of its own would keep a model from being copied and pickled.
_READING = threading.Lock()


class LoadedModel(ClickModel):
    """A model of packed layers: model(dense, ids, bags) -> logits, model.score(rows) -> probabilities.

    It is also an instance of the class that was trained: `load` of a DLRM gives a DLRM that is a LoadedModel.
    """

    _opened: Artifact
    _data: str | Path | None
    _encoder: RawEncoder | None

    @classmethod
    def of(cls, opened: Artifact, data: str | Path | None = None, in_memory: bool = False) -> "LoadedModel":
        """The model of an artifact. data: the dataset folder, where the artifact has no vocabularies."""
        packed = opened.model(in_memory)
        model: Any = packed
        model.__class__ = _loaded(type(packed))
        model._opened, model._data, model._encoder = opened, data, None
        loaded: LoadedModel = model
        return loaded

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles restore the class from the trained one
        return _empty, (type(self).__bases__[1],), self.__dict__

    def score(self, rows: Any, batch_size: int = 8192) -> NDArray[np.float32]:
        """The probability of a click for each row of raw values, as in the log: float32 [N], in order.

        The same as `dqrm predict` gives for these rows in a file. Columns may be in any order, and additional ones are
        ignored; a label is not needed. A missing value is None (or null, NaN, pandas' NA). Ids that the
        model does not know are looked up as row 0 of their table. May be called from several threads; the first call
        reads the vocabularies.

        Args:
            rows: a dict, a list of dicts, a polars DataFrame or LazyFrame, a pandas DataFrame, an Arrow table, record
                batch or dataset. Each dict has all columns of the log that the model uses.
            batch_size: rows scored at a time.

        Raises:
            UserError: a missing column or key, an invalid value (names row and
                column), an unsupported object, or an artifact without vocabularies.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, should be at least 1")
        scored, done = [np.empty(0, np.float32)], 0
        for block in encoded_rows(self._reader(), rows):
            scored.append(probabilities(partial(logits_of, self), block.batch, batch_size, done))
            done += len(block.batch)
        return np.concatenate(scored)

    def _reader(self) -> RawEncoder:
        if self._encoder is None:
            with _READING:
                if self._encoder is None:
                    self._encoder = encoder_of(self._opened, self._data)
        return self._encoder


def encoder_of(opened: Artifact, data: str | Path | None = None) -> RawEncoder:
    """What makes batches of raw rows for an artifact. data: the dataset folder, for one without vocabularies.

    Raises:
        UserError: there are no vocabularies, or they are damaged.
    """
    log = LogFormat.of_artifact(opened, data)
    read_as = build(PrepareConfig, log.options, str(opened.path))
    return RawEncoder(read_as, log.columns, log.vocabularies)


def encoded_rows(encoder: RawEncoder, rows: Any) -> Iterator[RawBlock]:
    """Raw rows in memory as batches, in order: what `LoadedModel.score` takes and raises."""
    source = rows_source(rows)
    if source is not None:
        ingest.check([source], encoder.plan)
        yield from encoder.blocks(source)


@cache
def _loaded(kind: type[ClickModel]) -> type[LoadedModel]:
    return type(f"Loaded{kind.__name__}", (LoadedModel, kind), {"__doc__": LoadedModel.__doc__})


def _empty(kind: type[ClickModel]) -> LoadedModel:
    made = _loaded(kind)
    return made.__new__(made)


def load(
    path: str | Path, verify: bool = False, data: str | Path | None = None, in_memory: bool = False
) -> LoadedModel:
    """A packed model for inference, from the file that `dqrm export` wrote.

    Called like the trained model: model(dense float32 [B, D], ids [B, S], bags) -> logits float32 [B]. The tables stay
    in the file, memory-mapped; the rest is read. No code from the file is run. `model.score(rows)` takes raw values.

    To replace a file in use, rename a new one onto it: the loaded model continues with the old one. Scoring
    raises UserError if the file was changed in place instead. (If it is truncated between that check and the lookup,
    the process still ends with SIGBUS, as with every memory-mapped file.)

    Args:
        verify: compare every tensor's bytes with its checksum first, which reads the whole file.
        data: the dataset folder, for `score` of a model that was exported without vocabularies.
        in_memory: read the tables into memory too; later changes of the file then have no effect.

    Raises:
        UserError: no such file, or a file that is not an artifact, truncated, damaged, or of a different version.
    """
    return LoadedModel.of(Artifact.open(path, verify), data, in_memory)
