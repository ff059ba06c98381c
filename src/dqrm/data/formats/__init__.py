"""The file formats beside text and Parquet, by layout: data that other programs have processed.

A format of your own is a subclass of `Format` and an entry here; its layout must be one of `PrepareConfig.layout`.
"""

from collections.abc import Sequence

from dqrm.data.config import PrepareConfig
from dqrm.data.formats.base import Format
from dqrm.data.formats.criteo_arrays import NpyFormat, NpzFormat, RecordFormat
from dqrm.data.formats.fuxictr import FuxiFormat
from dqrm.data.sources import Source
from dqrm.data.tables import TableSource
from dqrm.errors import UserError

FORMATS: dict[str, Format] = {
    "dlrm-kaggle": NpzFormat(),
    "dlrm-terabyte": NpzFormat(),
    "mlperf-binary": RecordFormat(),
    "criteo-npy": NpyFormat(),
    "fuxictr": FuxiFormat(),
}


def arrange(sources: Sequence[Source], config: PrepareConfig) -> list[Source]:
    """The sources of a log, of the files that were found: as the layout's format reads them, if it has one.

    Raises:
        UserError: as `Format.arrange`; a file is in a pipe that has to be read from more than one place.
    """
    known = FORMATS.get(config.layout)
    if known is None:
        return list(sources)
    files = [source for source in sources if not isinstance(source, TableSource)]
    for source in files:
        if source.stream and not known.streamed:
            raise UserError(f"{source.where} is a pipe; layout {config.layout} can only be read from files")
    if len(files) == len(sources):
        return known.arrange(files)
    tables = [source for source in sources if isinstance(source, TableSource)]
    if files:
        raise UserError(
            f"{tables[0].where} is in memory and {files[0].where} is not, expected one or the other in layout "
            f"{config.layout}"
        )
    return list(tables)
