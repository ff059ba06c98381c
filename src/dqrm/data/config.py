"""How a raw log is read: the fields of `dqrm prepare`. Imports no torch and no polars, so that `--help` is quick."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dqrm.data import budget, conditions
from dqrm.data.layouts import CRITEO_CATEGORICAL, CRITEO_DENSE, LAYOUTS, LIBSVM_COLUMN, Layout
from dqrm.options import check_fields, split_quoted, unquoted

__all__ = ["CRITEO_CATEGORICAL", "CRITEO_DENSE", "LIBSVM_COLUMN", "PrepareConfig", "cross_parts"]
_MOST_HASHES = 8
# Fields without a meaning where ids are not hashed, or where they are, and their defaults.
_OF_HASHING: dict[str, Any] = {"rows": None, "column_rows": (), "hashes": 1}
_OF_VOCABULARIES: dict[str, Any] = {
    "extend": None, "min_count": 1, "max_rows_per_table": None, "count_decay": 1.0, "evict_after": None
}  # fmt: skip


@dataclass(frozen=True)
class PrepareConfig:
    """Columns, split and vocabularies of a dataset.

    Raises:
        ValueError: a combination that cannot work, in one sentence.
    """

    layout: str = "table"
    """Layout of the log. table: CSV, TSV or Parquet whose columns you name; criteo-kaggle, criteo-terabyte: the raw
    files; libsvm, libffm: sparse text (libsvm has one multi-valued column and no dense ones: train with --interaction
    cat); processed by other programs: dlrm-kaggle, dlrm-terabyte (.npz), mlperf-binary, criteo-npy (TorchRec, HugeCTR),
    fuxictr (Parquet)."""
    label: str = "label"
    """Column of the label: 0 or 1, false or true (table layout)."""
    dense: tuple[str, ...] = ()
    """Numeric columns, joined by commas (table layout)."""
    categorical: tuple[str, ...] = ()
    """Categorical columns, joined by commas ("a,b" in double quotes is one name); layout libffm: its fields."""
    multi: tuple[str, ...] = ()
    """Those of the categorical columns whose cells hold several ids: lists in Parquet, or text to be split."""
    multi_separator: str = "|"
    """Separator between the ids of a cell in a multi-valued text column."""
    cross: tuple[str, ...] = ()
    """Crosses of two or more columns, each a categorical column of its own: user*director,movie*age."""
    weight: str | None = None
    """Column of each row's weight in loss and metrics: finite numbers of 0 or more (table layout)."""
    group: str | None = None
    """Column of the group, such as the user, within which GAUC compares rows; it need not be a feature."""
    delimiter: str | None = None
    """Field delimiter of a text table; none: a comma for .csv, a tab for .tsv, .tab and .txt."""
    quoting: bool = True
    """Whether fields of a text table may be quoted ("a, b"); false takes quote characters literally."""
    null_values: tuple[str, ...] = ()
    """Markers of missing values besides the empty one, joined by commas: NULL,NA (for every column)."""
    dense_transform: Literal["log1p", "none"] = "log1p"
    """Transformation of numeric columns: log1p sets negative to 0 and takes log(1 + x); missing is 0 in both."""
    min_count: int = 1
    """Ids seen less often than this share row 0 with unseen ones."""
    max_rows_per_table: int | None = None
    """Ids are taken modulo this before they are counted, so that a table has at most this many rows and row 0."""
    extend: str | None = None
    """Dataset folder of the days before: known ids keep their rows, new ones are appended; options come from it."""
    count_decay: float = 1.0
    """Factor on the counts of all ids for each day that extends the dataset, 1: none (for min_count)."""
    evict_after: int | None = None
    """Days after which an id that was not seen loses its row to a new one, with --extend; none: never."""
    vocabulary: Literal["train", "all", "hash"] = "train"
    """Rows whose ids get table rows: those of the training split, or all (as in the papers); hash: none, ids are hashed
    to one of --rows table rows."""
    rows: int | None = None
    """Rows of each table with --vocabulary hash; row 0 is for missing ids."""
    column_rows: tuple[str, ...] = ()
    """Tables of other sizes than --rows, by column: user=1000000,ad=5000."""
    hashes: int = 1
    """Hash functions with --vocabulary hash: an id has that many rows of its table, pooled (see --pooling of train)."""
    split: Literal["time", "file", "column", "random"] | None = None
    """Rule of the split; none: time for criteo-kaggle and dlrm-kaggle, random for tables and sparse text, file for the
    other layouts."""
    validation_fraction: float = 0.1
    """Fraction of rows for validation, with a split that is random or by time (table and criteo-terabyte)."""
    test_fraction: float = 0.1
    """Fraction of rows for the test, with a split that is random or by time (table and criteo-terabyte)."""
    split_column: str | None = None
    """Column that decides the split with --split column; it need not be a feature."""
    validation_values: tuple[str, ...] = ()
    """Validation rows: values of split_column, a range of them (>=2026-01-05,<2026-01-07), or file names."""
    test_values: tuple[str, ...] = ()
    """Test rows: values of split_column, a range of them (>=2026-01-07), or file names (dt=2026-01-07/*)."""
    subsample_negatives: float = 0.0
    """Fraction of the rows with label 0 to drop at random, in all splits; the paper: 0.875 on Terabyte."""
    seed: int = 0
    """Seed of the random split and of subsample_negatives."""
    on_error: Literal["stop", "skip"] = "stop"
    """On a malformed line: stop with file and line number, or skip and count it."""
    chunk_rows: int = 262_144
    """Rows in memory at a time; changes memory and speed, never the result."""
    memory: str | None = None
    """Limit on resident memory, such as 2GB or 1.5GiB: it sizes the chunks, and a vocabulary that does not fit is
    refused (with a larger limit the same command resumes); never changes the result; none: no limit."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: got {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if self.kind.columns == "named":
            _check_roles(self)
        else:
            _check_own_columns(self)
            if self.label != "label":
                raise ValueError(f"label is for layout table; layout {self.layout} has its own columns")
        for cross in self.cross:
            parts = cross_parts(cross)
            if len(parts) < 2 or not all(split_quoted(cross, "*")) or len(set(parts)) < len(parts):
                raise ValueError(f"cross is '{cross}', expected two or more different columns, as in user*director")
            for part in parts:
                if part in self.multi:
                    raise ValueError(f"cross '{cross}': {part} is a multi column and cannot be crossed")
                if part == self.label:
                    raise ValueError(f"cross '{cross}': {part} is the label")
        for field in ("weight", "group"):
            if getattr(self, field) == self.label:
                raise ValueError(f"column {self.label} is the label and cannot be the {field} too")
        if self.group is not None and self.group in self.multi_names:
            raise ValueError(f"group is '{self.group}', a multi column; expected a single-valued one")
        _check_unique("cross", ["*".join(sorted(cross_parts(cross))) for cross in self.cross])
        _check_split(self)
        _check_vocabulary(self)
        if self.max_rows_per_table is not None and not 1 <= self.max_rows_per_table < 2**31:
            raise ValueError(f"max_rows_per_table is {self.max_rows_per_table}, expected 1 to 2147483647")
        if not (math.isfinite(self.subsample_negatives) and 0 <= self.subsample_negatives < 1):
            raise ValueError(f"subsample_negatives is {self.subsample_negatives}, expected 0 or more and below 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}, expected 1 or more")
        if self.memory is not None:
            budget.parse(self.memory)
        if self.delimiter is not None and (len(self.delimiter.encode()) != 1 or self.delimiter in '"\r\n'):
            tab = "; in a shell a tab is $'\\t'" * (self.delimiter in ("\\t", "tab"))
            raise ValueError(f"delimiter is '{self.delimiter}', expected one ASCII character other than a quote{tab}")

    def hashed_rows(self, names: Sequence[str]) -> tuple[int, ...]:
        """Rows of the named columns' tables, where ids are hashed.

        Raises:
            ValueError: a column without rows, or rows for one that is not there.
        """
        given = {name: int(count) for name, _, count in (text.rpartition("=") for text in self.column_rows)}
        for name in given:
            if name not in names:
                raise ValueError(f"column_rows has '{name}', expected one of {', '.join(names)}")
        for name in names:
            if self.rows is None and name not in given:
                raise ValueError(f"column_rows lacks '{name}', and there is no rows for the columns that it lacks")
        return tuple(given.get(name) or self.rows or 0 for name in names)

    @property
    def kind(self) -> Layout:
        """What is known of the layout."""
        return LAYOUTS[self.layout]

    @property
    def split_rule(self) -> str:
        """The rule of the split, the layout's own where none is given."""
        return self.split or self.kind.split

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense columns, Criteo's own included."""
        return CRITEO_DENSE if self.kind.columns in ("criteo", "ids") else self.dense

    @property
    def categorical_names(self) -> tuple[str, ...]:
        """Names of the categorical columns, without crosses."""
        if self.layout == "libsvm":
            return (LIBSVM_COLUMN,)
        return CRITEO_CATEGORICAL if self.kind.columns in ("criteo", "ids") else self.categorical

    @property
    def multi_names(self) -> tuple[str, ...]:
        """Names of the categorical columns whose cells hold several ids."""
        return self.categorical_names if self.kind.columns == "features" else self.multi


def cross_parts(cross: str) -> tuple[str, ...]:
    """The columns of a cross; one whose name holds a * stands in double quotes: "a*b"*user."""
    return tuple(map(unquoted, split_quoted(cross, "*")))


def _check_own_columns(config: PrepareConfig) -> None:
    """Of the layouts whose files name no columns."""
    allowed = ("categorical",) if config.layout == "libffm" else ()
    for field in ("dense", "categorical", "multi", "weight", "delimiter"):
        if getattr(config, field) and field not in allowed:
            raise ValueError(f"{field} is for layout table; layout {config.layout} has its own columns")
    if config.kind.columns == "features":
        for field in ("cross", "null_values"):
            if getattr(config, field):
                raise ValueError(f"{field} is not for layout {config.layout}, whose lines are lists of features")
    if config.kind.columns == "ids" and config.null_values:
        raise ValueError(f"null_values is for text, and files of layout {config.layout} hold numbers")
    for name in config.categorical:
        if not (name.isdecimal() and name.isascii() and str(int(name)) == name):
            raise ValueError(f"categorical has {name!r}, expected field numbers, as in 0,1,2 (layout libffm)")
    _check_unique("categorical", config.categorical)


def _check_roles(config: PrepareConfig) -> None:
    for field in ("dense", "categorical", "multi"):
        _check_unique(field, getattr(config, field))
        if config.label in getattr(config, field):
            raise ValueError(f"column {config.label} is the label and cannot be in {field} too")
    for name in config.dense:
        if name in config.categorical:
            raise ValueError(f"column {name} is in both dense and categorical, expected in one of them")
    for name in config.multi:
        if name not in config.categorical:
            raise ValueError(f"multi has {name}, expected a column that is also in categorical")
    for name in config.cross:
        if name in config.categorical or name in config.dense:
            raise ValueError(f"cross '{name}' is also the name of a column; rename one of them")
    if not config.multi_separator:
        raise ValueError("multi_separator is empty, expected the text between two ids")


def _check_split(config: PrepareConfig) -> None:
    rule = config.split_rule
    for field in ("validation_fraction", "test_fraction"):
        if not (math.isfinite(getattr(config, field)) and 0 <= getattr(config, field) < 1):
            raise ValueError(f"{field} is {getattr(config, field)}, expected 0 or more and below 1")
    if config.validation_fraction + config.test_fraction >= 1:
        raise ValueError(
            f"validation_fraction is {config.validation_fraction} and test_fraction {config.test_fraction}, "
            "expected a sum below 1, which leaves rows for training"
        )
    if (rule == "column") != (config.split_column is not None):
        raise ValueError(
            f"split is {rule} and split_column is {config.split_column}; split_column goes with split 'column' only"
        )
    if rule == "column" and not (config.validation_values or config.test_values):
        raise ValueError("split by column needs validation_values or test_values")
    if rule in ("time", "random") and (config.validation_values or config.test_values):
        raise ValueError(f"validation_values and test_values are for a split by column or file, and split is {rule}")
    if config.split_column is not None and config.split_column in config.multi_names:
        raise ValueError(f"split_column is '{config.split_column}', a multi column; expected a single-valued one")
    if rule == "column":
        for field in ("validation_values", "test_values"):
            conditions.parse(field, getattr(config, field))
    for value in config.validation_values:
        if value in config.test_values:
            raise ValueError(f"'{value}' is in both validation_values and test_values, expected in one of them")


def _check_vocabulary(config: PrepareConfig) -> None:
    if config.min_count < 1:
        raise ValueError(f"min_count is {config.min_count}, expected 1 or more")
    if not (math.isfinite(config.count_decay) and 0 <= config.count_decay <= 1):
        raise ValueError(f"count_decay is {config.count_decay}, expected 0 to 1 (1: counts do not decay)")
    if config.evict_after is not None and config.evict_after < 1:
        raise ValueError(f"evict_after is {config.evict_after}, expected 1 day or more, or none")
    if config.vocabulary != "hash":
        for field, default in _OF_HASHING.items():
            if (value := getattr(config, field)) != default:
                raise ValueError(
                    f"{field} is {value}, but vocabulary is {config.vocabulary}; {field} needs vocabulary hash"
                )
        return
    for field, default in _OF_VOCABULARIES.items():
        if (value := getattr(config, field)) != default:
            raise ValueError(f"{field} is {value}, but with vocabulary hash there are no ids to count or to extend")
    if config.rows is None and not config.column_rows:
        raise ValueError("vocabulary hash needs rows, the number of rows of each table")
    if not 1 <= config.hashes <= _MOST_HASHES:
        raise ValueError(f"hashes is {config.hashes}, expected 1 to {_MOST_HASHES}")
    for text in (*map(str, () if config.rows is None else (config.rows,)), *config.column_rows):
        name, equals, count = text.rpartition("=")
        if (text in config.column_rows and not (name and equals)) or not count.isdecimal():
            raise ValueError(f"column_rows has '{text}', expected a column and a number of rows, as in user=1000000")
        if not 2 <= int(count) < 2**31:
            raise ValueError(f"rows is {text}, expected 2 to 2147483647 (row 0 is for missing ids)")


def _check_unique(field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{field} names {name} twice")
        seen.add(name)
