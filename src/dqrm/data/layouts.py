"""The layouts of logs: a register. Imports neither torch nor polars, so that `--help` is quick.

A layout is one line of `LAYOUTS`, and where it is neither text nor Parquet a `Format` (`dqrm.data.formats.base`).
"""

from dataclasses import dataclass
from typing import Any, Literal

CRITEO_DENSE = tuple(f"I{number}" for number in range(1, 14))
CRITEO_CATEGORICAL = tuple(f"C{number}" for number in range(1, 27))
# LIBSVM's only column.
LIBSVM_COLUMN = "features"


@dataclass(frozen=True)
class Layout:
    """What the configuration has to know of a layout.

    columns: whose they are. criteo: Criteo's 13 and 26, categories in hexadecimal; ids: the same, categories as
    numbers; named: the user's own; features: lists of features.
    split: the rule where none is given. seven_days: whether a split by time is that of Criteo's Kaggle log.
    format: a `Format`, or where it is; None: text, or for named columns also Parquet.
    """

    columns: Literal["criteo", "ids", "named", "features"]
    split: Literal["time", "file", "random"]
    format: Any = None
    seven_days: bool = False


_ARRAYS = "dqrm.data.formats.criteo_arrays"
LAYOUTS: dict[str, Layout] = {
    "criteo-kaggle": Layout("criteo", "time", seven_days=True),
    "criteo-terabyte": Layout("criteo", "file"),
    "table": Layout("named", "random"),
    "libsvm": Layout("features", "random"),
    "libffm": Layout("features", "random"),
    "dlrm-kaggle": Layout("ids", "time", f"{_ARRAYS}.NpzFormat", seven_days=True),
    "dlrm-terabyte": Layout("ids", "file", f"{_ARRAYS}.NpzFormat"),
    "mlperf-binary": Layout("ids", "file", f"{_ARRAYS}.RecordFormat"),
    "criteo-npy": Layout("ids", "file", f"{_ARRAYS}.NpyFormat"),
    "fuxictr": Layout("named", "file", "dqrm.data.formats.fuxictr.FuxiFormat"),
}
"""What a PrepareConfig can name as `layout`."""
