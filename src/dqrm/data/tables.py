"""Tables in memory as sources: polars, pandas, Arrow, and dicts. Those packages are used only where the caller's own
object is of them.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.selectors import by_name

from dqrm.data.cells import text as key_text
from dqrm.data.columns import Plan, check_types
from dqrm.data.config import CRITEO_CATEGORICAL
from dqrm.data.listing import resolve
from dqrm.data.python_values import to_series
from dqrm.data.sources import Source
from dqrm.errors import UserError
from dqrm.options import did_you_mean

TABLES = "a polars or pandas DataFrame, an Arrow table, record batch or dataset"


@dataclass(frozen=True)
class Table:
    """What a caller holds.

    names: of its columns, as often as they are there. take: given some of them, their types and a function that gives
    all rows, in order, as frames of at most that many.
    """

    names: tuple[str, ...]
    take: Callable[[Sequence[str]], tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]]


@dataclass
class TableSource(Source):
    """A table in memory (`in_memory`) or behind a package that reads it, hashed if `hashing`.

    where: what it is called. bytes: how much of it was hashed.
    """

    table: Table | None = field(default=None, repr=False)
    schema: pl.Schema = field(default_factory=pl.Schema, repr=False)
    hashing: bool = True
    in_memory: bool = True
    read: Callable[[int], Iterator[pl.DataFrame]] = field(default=lambda size: iter(()), repr=False)

    def describe(self) -> dict[str, Any]:
        """For dataset.json."""
        return {**super().describe(), "in_memory": self.in_memory}

    def check(self, plan: Plan) -> None:
        """Whether it has the columns of the plan, in types that can be what they are named for.

        Raises:
            UserError: a column is missing (all missing ones are named), duplicated, or of the wrong type.
        """
        assert self.table is not None
        where, names = self.where, self.table.names
        missing = [name for name in plan.needed if name not in names]
        if len(missing) > 1:
            quoted = ", ".join(f"'{name}'" for name in missing)
            raise UserError(f"no columns {quoted} in {where}{did_you_mean(missing[0], names)}")
        plan.check(names, where)
        self.schema, self.read = self.table.take(plan.needed)
        if plan.criteo:
            self._check_criteo(plan)
        else:
            check_types(plan, self.schema, where)

    def blocks(self, plan: Plan, size: int) -> Iterator[pl.DataFrame]:
        """All rows, at most `size` at a time; then size and hash of what they hold are known."""
        columns = [_Hash() for _ in self.schema] if self.hashing else []
        for frame in self.read(size):
            for hashed, column in zip(columns, frame):
                hashed.update(column)
            yield _as_criteo_text(frame) if plan.criteo else frame
        if not self.hashing:
            return
        for name, hashed in zip(self.schema, columns):
            self.digest.update(name.encode() + b"\0")
            hashed.finish(self.digest)
        self.bytes = sum(hashed.bytes for hashed in columns)
        self.sha256 = self.digest.hexdigest()

    def _check_criteo(self, plan: Plan) -> None:
        for name, kind in self.schema.items():
            if name in CRITEO_CATEGORICAL and kind not in (pl.String, pl.Null, pl.Categorical, pl.Enum):
                raise UserError(
                    f"column {name} of {self.where} is of type {kind}, but layout {plan.config.layout} has hexadecimal "
                    "text there, as '68fd1e64'"
                )
            if kind.is_nested():
                raise UserError(f"column {name} of {self.where} holds lists, expected one number or text per row")


def table_source(data: Any, name: str) -> TableSource | None:
    """A polars, pandas or Arrow table as a source that is called `name`; None for other objects."""
    table = _recognise(data)
    return None if table is None else TableSource(Path(name), True, table=table)


def rows_source(data: Any) -> TableSource | None:
    """The same for rows to be scored, which may also be one dict or several; None where there are none.

    Raises:
        UserError: it is something else, or a row lacks a column that another one has.
    """
    if (source := table_source(data, "the table")) is not None:
        assert source.table is not None
        empty = not source.table.names and not (hasattr(data, "__len__") and len(data))
        source.hashing = False
        return None if empty else source
    given = data
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Path, np.ndarray)):
        rows = list(data)
        odd = next((row for row in rows if not isinstance(row, Mapping)), None)
        if odd is None:
            table = _of_dicts(rows)
            return TableSource(Path("the rows"), True, table=table, hashing=False) if rows else None
        data = odd
    named = isinstance(given, (str, Path))
    got = repr(str(given)) if named else f"an object of type {type(given).__name__}"
    if data is not given:
        got += f" that holds one of type {type(data).__name__}"
    raise UserError(
        f"got {got}, expected rows of raw values: a dict, a list of dicts, "
        f"{TABLES}{'; dqrm.predict scores files' * named}"
    )


def as_list(given: Any) -> list[Any]:
    """One source of a log, or several, as a list.

    Raises:
        UserError: it is neither the name of a file, nor a table, nor a list.
    """
    if isinstance(given, (str, Path)) or _recognise(given) is not None:
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UserError(f"got a source of type {type(given).__name__}, expected the name of a file, or {TABLES}")
    return list(given)


def gather(given: Sequence[Any]) -> list[Source]:
    """Sources of a log: files, folders, globs of them, pipes, and tables, in the order given.

    Raises:
        UserError: as `resolve`, or an object that is neither.
    """
    names = [item for item in given if isinstance(item, (str, Path))]
    if len(names) == len(given):
        return resolve(names)
    files = iter(resolve(names) if names else [])
    sources: list[Source] = []
    for number, item in enumerate(given, 1):
        if isinstance(item, (str, Path)):
            sources += islice(files, len(resolve([item])))
            continue
        source = table_source(item, f"table {number}")
        if source is None:
            raise UserError(
                f"source {number} is of type {type(item).__name__}, expected the name of a file, or {TABLES}"
            )
        sources.append(source)
    return sources


def _recognise(data: Any) -> Table | None:
    if isinstance(data, pl.DataFrame):
        return Table(tuple(data.columns), lambda wanted: _whole(data.select(by_name(*wanted))))
    if isinstance(data, pl.LazyFrame):
        return Table(tuple(data.collect_schema().names()), lambda wanted: _lazy(data.select(by_name(*wanted))))
    package = type(data).__module__.partition(".")[0]
    if package == "pandas" and hasattr(data, "iloc") and hasattr(data, "columns"):
        names = tuple(map(str, data.columns))
        return Table(
            names, lambda wanted: _whole(_framed([_of_pandas(n, data.iloc[:, names.index(n)]) for n in wanted], wanted))
        )
    if package == "pyarrow" and hasattr(data, "scanner"):
        return Table(tuple(data.schema.names), lambda wanted: _scanned(data, wanted))
    if isinstance(data, pl.Series) or package == "pandas":
        return None
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
        try:
            frame = pl.DataFrame(data)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError) as error:
            raise UserError(f"the Arrow table cannot be read ({' '.join(str(error).split())})") from None
        return Table(tuple(frame.columns), lambda wanted: _whole(frame.select(by_name(*wanted))))
    return None


def _framed(columns: Sequence[pl.Series], names: Sequence[str]) -> pl.DataFrame:
    frame = pl.DataFrame(columns)
    frame.columns = list(names)  # a Series without a name would be given one
    return frame


def _whole(frame: pl.DataFrame) -> tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]:
    return frame.schema, lambda size: (frame[at : at + size] for at in range(0, frame.height, size))


def _lazy(frame: pl.LazyFrame) -> tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]:
    return frame.collect_schema(), lambda size: frame.collect_batches(chunk_size=size, maintain_order=True)


def _scanned(data: Any, wanted: Sequence[str]) -> tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]:
    """An Arrow dataset, which may be larger than memory."""
    import pyarrow  # the caller has it

    def read(size: int) -> Iterator[pl.DataFrame]:
        for batch in data.scanner(columns=list(wanted), batch_size=size).to_batches():
            yield pl.DataFrame(batch)

    fields = [data.schema.field(name) for name in wanted]
    return pl.DataFrame(pyarrow.schema(fields).empty_table()).schema, read


def _of_pandas(name: str, column: Any) -> pl.Series:
    """A column without pyarrow, which pandas need not have; NaN is missing, as pandas means it."""
    kind = column.dtype
    if isinstance(kind, np.dtype) and kind.kind in "biuf":
        values = np.ascontiguousarray(column.to_numpy())
        return pl.Series(name, values.astype(np.float32) if kind == np.float16 else values, nan_to_null=True)
    if isinstance(kind, np.dtype) and kind.kind in "mM":
        values = column.to_numpy()
        return pl.Series(name, values.astype(f"{kind.kind}8[ms]") if np.datetime_data(kind)[0] == "s" else values)
    if getattr(kind, "tz", None) is not None:
        utc = _of_pandas(name, column.dt.tz_convert("UTC").dt.tz_localize(None))
        return utc.dt.replace_time_zone("UTC").dt.convert_time_zone(str(kind.tz))
    missing = column.isna().tolist()
    return to_series(name, [None if gone else value for value, gone in zip(column.astype(object).tolist(), missing)])


def _of_dicts(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = tuple(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))

    def take(wanted: Sequence[str]) -> tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]:
        columns = []
        for name in wanted:
            lacking = next((number for number, row in enumerate(rows, 1) if name not in row), None)
            if lacking is not None:
                known = did_you_mean(name, map(str, rows[lacking - 1]))
                raise UserError(f"row {lacking} has no '{name}'; a value that is missing is given as None{known}")
            columns.append(to_series(name, [row[name] for row in rows]))
        return _whole(_framed(columns, wanted))

    return Table(names, take)


def _as_criteo_text(frame: pl.DataFrame) -> pl.DataFrame:
    """What Criteo's files would hold: text, whole numbers without a point, null where there is nothing."""
    columns = []
    for name, kind in frame.schema.items():
        column = by_name(name).as_expr().fill_nan(None) if kind.is_float() else by_name(name).as_expr()
        columns.append(key_text(column, kind).replace("", None).alias(name))
    return frame.select(columns)


class _Hash:
    """SHA-256 of a column's values, the same however the rows are cut into blocks and where the table came from."""

    def __init__(self) -> None:
        self._nulls, self._lengths, self._values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._inner: _Hash | None = None
        self._own = 0

    @property
    def bytes(self) -> int:
        return self._own + (self._inner.bytes if self._inner else 0)

    def update(self, column: pl.Series) -> None:
        kind = column.dtype
        self._put(self._nulls, column.is_null().to_numpy())
        if isinstance(kind, (pl.List, pl.Array)):
            lists = column.cast(pl.List(kind.inner)).drop_nulls()
            self._inner = self._inner or _Hash()
            self._put(self._lengths, lists.list.len().to_numpy())
            self._inner.update(lists.explode(empty_as_null=False))
        elif (kind.is_integer() or kind.is_float()) and kind != pl.Int128:
            self._put(self._values, column.drop_nulls().to_numpy())
        else:
            texts = (column if kind == pl.Binary else column.cast(pl.String)).drop_nulls().to_list()
            pieces = [text if isinstance(text, bytes) else text.encode() for text in texts]
            self._put(self._lengths, np.array([len(piece) for piece in pieces], np.uint32))
            self._put(self._values, np.frombuffer(b"".join(pieces), np.uint8))

    def finish(self, into: Any) -> None:
        for part in (self._nulls, self._lengths, self._values):
            into.update(part.digest())
        if self._inner:
            self._inner.finish(into)

    def _put(self, digest: Any, values: Any) -> None:
        data = np.ascontiguousarray(values).tobytes()
        digest.update(data)
        self._own += len(data)
