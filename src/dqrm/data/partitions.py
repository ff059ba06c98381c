"""Columns that Hive and Spark write into the names of folders: dt=2026-01-02/part-00000.parquet."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from urllib.parse import unquote

import numpy as np
import polars as pl
from polars.selectors import by_name

from dqrm.data.cells import is_list
from dqrm.data.cells import text as key_text
from dqrm.data.lines import Block
from dqrm.errors import UserError

# What Hive and Spark write where there is no value.
_MISSING = "__HIVE_DEFAULT_PARTITION__"
Partitions = Mapping[str, str | None]


def is_partition(part: str) -> bool:
    """Whether the name of a folder is a column and its value."""
    return part.partition("=")[0] != "" and "=" in part


def partitions(path: PurePath, where: str = "") -> dict[str, str | None]:
    """The columns that the folders of a path name, as text (%XX decoded), None where the value is missing.

    where: the path in messages.

    Raises:
        UserError: two folders give one column different values.
    """
    columns: dict[str, str | None] = {}
    for part in filter(is_partition, path.parts[:-1]):
        name, value = map(unquote, part.split("=", 1))
        known = None if value in ("", _MISSING) else value
        if columns.setdefault(name, known) != known:
            raise UserError(
                f"{where or path} gives column {name} two values, '{columns[name]}' and '{known}', expected one"
            )
    return columns


def offered(names: Sequence[str], given: Partitions) -> list[str]:
    """The columns of a file and of its path."""
    return [*names, *(name for name in given if name not in names)]


def in_file(needed: Sequence[str], names: Sequence[str], given: Partitions) -> list[str]:
    """Those of the needed columns that have to be read from the file: one at least, to know its rows."""
    return [name for name in needed if name in names or name not in given] or list(names[:1])


def complete(blocks: Iterable[Block], needed: Sequence[str], given: Partitions, where: str) -> Iterable[Block]:
    """The blocks with the needed columns of the path added.

    Raises:
        UserError: a column is in the file too, and a row has another value there.
    """
    added = {name: given[name] for name in needed if name in given}
    if not added:
        return blocks
    return (_complete(block, needed, added, where) for block in blocks)


def _complete(block: Block, needed: Sequence[str], added: Partitions, where: str) -> Block:
    fields = block.fields
    for name, value in added.items():
        if name in fields.columns:
            _require_same(block, name, value, where)
        else:
            fields = fields.with_columns(pl.lit(value, pl.String).alias(name))
    return Block(fields.select(by_name(*needed)), block.lines, block.bad, block.end)


def _require_same(block: Block, name: str, value: str | None, where: str) -> None:
    cells = block.fields[name]
    if not is_list(cells.dtype):
        text = pl.DataFrame({"cell": cells}).select(key_text(pl.col("cell"), cells.dtype)).to_series()
        # 07 in the path and the number 7 in the file are the same month.
        numbers = text.cast(pl.Float64, strict=False) == pl.Series([value], dtype=pl.String).cast(
            pl.Float64, strict=False
        )
        same = (text == (value or "")) | numbers.fill_null(False)
        if same.all():
            return
        row = int(np.argmin(same.to_numpy()))
        raise UserError(
            f"{where}, row {block.lines[row]}: column {name} holds '{text[row]}', but the path says {name}={value}; "
            "expected the same, or one of them under another name"
        )
    raise UserError(f"{where}: column {name} holds lists, but the path says {name}={value}; expected the same value")
