"""The file formats beside text and Parquet: data that other programs have processed.

A format of your own is a subclass of `base.Format` and a line in `dqrm.data.layouts.LAYOUTS`.
"""

from collections.abc import Sequence
from pkgutil import resolve_name

from dqrm.data.config import PrepareConfig
from dqrm.data.formats.base import Format
from dqrm.data.sources import Source
from dqrm.data.stores import StoredSource
from dqrm.data.tables import TableSource
from dqrm.errors import UserError


def format_of(config: PrepareConfig) -> Format | None:
    """The format of the layout; None: text or Parquet."""
    entry = config.kind.format
    if entry is None:
        return None
    known: Format = (resolve_name(entry) if isinstance(entry, str) else entry)()
    return known


def arrange(sources: Sequence[Source], config: PrepareConfig) -> list[Source]:
    """The sources of a log, of the files that were found: as the layout's format reads them, if it has one.

    Raises:
        UserError: as `Format.arrange`; a file is in a pipe, or not on this machine, and is read from several places.
    """
    known = format_of(config)
    if known is None:
        return list(sources)
    files = [source for source in sources if not isinstance(source, TableSource)]
    for source in files:
        if source.stream and not known.streamed:
            raise UserError(f"{source.where} is a pipe; layout {config.layout} can only be read from files")
        if isinstance(source, StoredSource) and not known.streamed:
            raise UserError(
                f"{source.where} is not on this machine; layout {config.layout} can only be read from local files, "
                "copy them first"
            )
    if len(files) == len(sources):
        return known.arrange(files)
    tables = [source for source in sources if isinstance(source, TableSource)]
    if files:
        raise UserError(
            f"{tables[0].where} is in memory and {files[0].where} is not, expected one or the other in layout "
            f"{config.layout}"
        )
    return list(tables)
