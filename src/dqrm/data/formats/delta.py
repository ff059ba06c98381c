"""Delta Lake tables: the files that are in the newest version. Needs the package deltalake."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl

from dqrm.data.partitions import partitions
from dqrm.errors import UserError

LOG = "_delta_log"


def files(folder: Path) -> list[Path]:
    """The Parquet files of a table's newest version, in no order.

    Raises:
        UserError: deltalake is missing; the table cannot be read, or not without applying what its log says.
    """
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError:
        raise UserError(
            f"{folder} is a Delta Lake table, whose files also hold rows that were deleted or replaced; to read it "
            "install deltalake: pip install 'dqrm[delta]'"
        ) from None
    try:
        table = DeltaTable(str(folder))
        mapping = table.metadata().configuration.get("delta.columnMapping.mode") or "none"
        marked = "deletionVectors" in (table.protocol().reader_features or []) and _has_vectors(table)
        actions = pl.DataFrame(table.get_add_actions(flatten=True))
        columns = table.metadata().partition_columns
    except (DeltaError, OSError, pl.exceptions.PolarsError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be read as a Delta Lake table ({' '.join(str(error).split())[:200]})"
        ) from None
    if mapping != "none":
        raise UserError(f"{folder} is a Delta Lake table with mapped columns ({mapping}); {_REWRITE}")
    if marked:
        raise UserError(f"{folder} is a Delta Lake table with deletion vectors; {_REWRITE}")
    return [_file(folder, path, columns) for path in actions["path"].to_list()]


_REWRITE = "rewrite it without them, or export it as Parquet, first"


def _has_vectors(table: Any) -> bool:
    from deltalake.exceptions import DeltaError

    try:
        return pl.DataFrame(table.deletion_vectors().read_all()).height > 0
    except DeltaError:  # there are some, of a kind that deltalake does not read
        return True


def _file(folder: Path, text: str, columns: list[Any]) -> Path:
    candidates = [folder / text, folder / unquote(text)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} lacks {text}, which its Delta log lists; expected all files of its newest version")
    given = set(partitions(path.relative_to(folder)))
    if given != set(columns):
        raise UserError(
            f"{path} is partitioned by {', '.join(sorted(given)) or 'nothing'}, and its Delta log says "
            f"{', '.join(columns) or 'nothing'}; expected folders such as dt=2026-01-02"
        )
    return path
