"""What a file format does; listed in `dqrm.data.layouts`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.lines import Block
from dqrm.data.sources import Source
from dqrm.errors import UserError

# Rows read at a time, if not fewer are asked for.
BLOCK_ROWS = 1 << 17
# The columns of formats that hold Criteo's logs.
COLUMNS = ("label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)


class Format(ABC):
    """How the files of a layout become blocks of rows. One instance serves all files and keeps no state.

    streamed: whether the bytes are hashed as `blocks` reads them; otherwise the file is hashed on its own.
    transformed: where dense values come from if they have been transformed already, "" if they have not.
    """

    streamed = False
    transformed = ""

    def arrange(self, sources: Sequence[Source]) -> list[Source]:
        """The sources of the log, of the files that were found: files that belong together become one, others that
        hold no rows are left out.

        Raises:
            UserError: a file is none of the format's, or one is missing.
        """
        return [replace(source, format=self, parquet=False) for source in sources]

    def complete(self, sources: Sequence[Source], config: PrepareConfig) -> PrepareConfig:
        """The configuration with what the files say in it, such as the names of columns."""
        return config

    @abstractmethod
    def schema(self, source: Source) -> pl.Schema:
        """The columns of a source and their types; checks what can be checked without reading the rows.

        Raises:
            UserError: it is not of this format.
        """

    @abstractmethod
    def blocks(self, source: Source, wanted: Sequence[str], rows: int) -> Iterator[Block]:
        """The wanted columns of all rows in order, about so many at a time; `Block.lines` counts rows from 1.

        Raises:
            UserError: it cannot be read.
            Damaged: after the last good row.
        """

    def check(self, source: Source, config: PrepareConfig) -> pl.Schema:
        """`schema`, and whether the configuration goes with it.

        Raises:
            UserError: as `schema`; the configuration transforms dense values that have been transformed.
        """
        schema = self.schema(source)
        floats = [name for name in config.dense_names if name in schema and schema[name].is_float()]
        if self.transformed and floats and config.dense_transform != "none":
            raise UserError(
                f"{source.where} holds dense values ({floats[0]}) that {self.transformed}, and dense_transform is "
                f"{config.dense_transform}; expected none, as in --dense-transform none"
            )
        return schema


def criteo_schema(label: np.dtype[Any], dense: np.dtype[Any], categorical: np.dtype[Any]) -> pl.Schema:
    """Types of Criteo's columns in arrays of these types."""
    kinds = [label, *[dense] * len(CRITEO_DENSE), *[categorical] * len(CRITEO_CATEGORICAL)]
    return pl.Schema({name: _series(name, np.zeros(0, kind)).dtype for name, kind in zip(COLUMNS, kinds)})


def criteo_block(
    wanted: Sequence[str],
    first: int,
    label: NDArray[np.generic],
    dense: NDArray[np.generic],
    categorical: NDArray[np.generic],
) -> Block:
    """The wanted ones of Criteo's columns, from arrays [rows] or [rows, 1], [rows, 13] and [rows, 26]."""
    columns = {"label": label.reshape(-1)}
    columns |= {name: dense[:, n] for n, name in enumerate(CRITEO_DENSE) if name in wanted}
    columns |= {name: categorical[:, n] for n, name in enumerate(CRITEO_CATEGORICAL) if name in wanted}
    frame = pl.DataFrame([_series(name, columns[name]) for name in wanted])
    end = first + len(label)
    return Block(frame, np.arange(first, end), end=end)


def _series(name: str, values: NDArray[np.generic]) -> pl.Series:
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return pl.Series(name, native.astype(np.float32) if native.dtype == np.float16 else native)
