"""The roles of a log's columns, and their values, checked and typed: one polars query per block."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import cells
from dqrm.data.coding import code_numbers
from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig, cross_parts
from dqrm.data.hashing import HashedRows
from dqrm.data.lines import Block
from dqrm.errors import UserError
from dqrm.options import did_you_mean

CRITEO_COLUMNS = ("label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)

# What a key is: Criteo's 32-bit number in hexadecimal, two of them in 64 bits, a 32-bit number that is one already, or
# text (the parts of a cross joined by _JOIN).
KeyKind = Literal["hex", "hex*hex", "id", "text"]
_LARGEST = 2**32 - 1
_JOIN = "\x1f"
# Name of the check of the weights among those of columns.
_WEIGHT = "\x1fweight"


@dataclass(frozen=True)
class KeyColumn:
    """A column that has keys: a categorical one, a cross, or the one that decides the split.

    multi: whether a row has several table rows: of a cell with several ids (`lists`), or of several hash functions.
    """

    name: str
    parts: tuple[str, ...]
    kind: KeyKind
    multi: bool = False
    lists: bool = False

    def hash_name(self) -> str:
        """The function whose value is taken modulo the cap."""
        return {"hex": "value", "hex*hex": "splitmix64", "id": "value", "text": "crc32"}[self.kind]

    def modulo(self, keys: pl.Series, rows: int) -> NDArray[np.uint32]:
        """The keys' hashes modulo `rows`: fixed functions, so that any program can look an id up."""
        if self.kind == "text":
            numbers = np.fromiter((zlib.crc32(key.encode()) for key in keys), np.uint64, len(keys))
        else:
            numbers = keys.to_numpy().astype(np.uint64)
        if self.kind == "hex*hex":
            # The low word alone would decide if `rows` were a power of two.
            numbers = _splitmix64(numbers)
        return (numbers % np.uint64(rows)).astype(np.uint32)

    def entries(self, cells: pl.Series) -> tuple[pl.Series, pl.Series | None]:
        """The keys of a column of `Plan.typed` one by one, and how many each row has, where cells are lists."""
        return (cells.explode(empty_as_null=False), cells.list.len()) if self.lists else (cells, None)

    def code(self, cells: pl.Series, rows: int | None) -> tuple[pl.Series, NDArray[Any], pl.Series | None]:
        """The distinct keys of a column of `Plan.typed`, sorted, the code of each entry into them, and a multi-valued
        column's entries per row.

        rows: what keys are taken modulo of (None: they are not). The codes are of the smallest unsigned type.
        """
        cells, lengths = self.entries(cells)
        if cells.dtype == pl.UInt32 and len(cells):
            keys, codes = code_numbers(cells.to_numpy())
        else:
            keys = cells.unique().sort()
            codes = keys.search_sorted(cells).to_numpy()
        if rows is not None:
            remainders, inverse = np.unique(self.modulo(keys, rows), return_inverse=True)
            keys, codes = pl.Series(remainders), inverse[codes]
        return keys, codes.astype(np.min_scalar_type(max(0, len(keys) - 1)), copy=False), lengths


@dataclass(frozen=True)
class Plan:
    """The columns of a configuration in the order of the schema: single-valued ones, crosses, multi-valued ones.

    label: the label's column, None where rows need none; weight and group likewise. copied: columns whose cells are
    handed on as they are. key_version: the rules by which values become keys, those of the vocabularies that keys are
    looked up in. hashing: of each of the keys, where ids are hashed to rows.
    """

    config: PrepareConfig
    keys: tuple[KeyColumn, ...]
    split: KeyColumn | None
    label: str | None
    copied: tuple[str, ...] = ()
    weight: str | None = None
    group: KeyColumn | None = None
    key_version: int = cells.KEY_VERSION
    hashing: tuple[HashedRows, ...] | None = None

    @property
    def criteo(self) -> bool:
        return self.config.kind.columns == "criteo"

    @property
    def numbered(self) -> bool:
        """Whether Criteo's categories are numbers in place of text."""
        return self.config.kind.columns == "ids"

    @property
    def sparse(self) -> bool:
        """Whether lines are lists of features, as in LIBSVM's files."""
        return self.config.kind.columns == "features"

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """The canonical texts that mean missing, besides the empty one."""
        return cells.markers_of(self.config.null_values)

    @property
    def dense(self) -> tuple[str, ...]:
        return self.config.dense_names

    @property
    def used(self) -> tuple[str, ...]:
        """The columns of the log that the dataset is made from."""
        label = [] if self.label is None else [self.label]
        weight = [] if self.weight is None else [self.weight]
        others = [part for key in (*self.keys, *self.unmodelled) for part in key.parts]
        return tuple(dict.fromkeys([*label, *self.dense, *weight, *others]))

    @property
    def unmodelled(self) -> tuple[KeyColumn, ...]:
        """The columns with keys that are no table of the model: the group, then the split's."""
        return tuple(column for column in (self.group, self.split) if column is not None)

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns of the log that are read."""
        return tuple(dict.fromkeys([*self.used, *self.copied]))

    def check(self, known: Sequence[str], where: str, text: bool = False) -> None:
        """Whether a file has the columns. text: it names them in its first line.

        Raises:
            UserError: one is missing, there twice, or the configuration names none at all.
        """
        if not self.dense and not self.keys:
            raise UserError(f"no column was named in categorical or dense; {where} has {', '.join(known)}")
        if text and self.needed and not set(self.needed) & set(known) and any(map(_is_number, known)):
            start = ",".join(known)
            raise UserError(
                f"the first line of {where} is '{start[:60] + '...' * (len(start) > 60)}', which looks like data, "
                "expected a line with the names of the columns"
            )
        for name in self.needed:
            if name not in known:
                raise UserError(f"no column '{name}' in {where}{did_you_mean(name, known)}")
            if list(known).count(name) > 1:
                raise UserError(f"{where} has {list(known).count(name)} columns named '{name}', expected one")

    def typed(self, block: Block) -> pl.DataFrame:
        """The good rows of a block; the others are added to `block.bad`.

        Columns: label UInt8, if there is one, d<n> Float32 (transformed), k<n> keys (UInt32, UInt64 or String;
        List(String) for a multi-valued column), where the split needs it, s String, and c<n>, the copied ones; w
        Float32 and g, a key, where there are weights and groups.
        """
        # The log may use our names, or what polars takes for a pattern, so its columns get others.
        raw = pl.DataFrame([block.fields.get_column(name).alias(f"r{at}") for at, name in enumerate(self.needed)])
        kinds = dict(zip(self.needed, raw.dtypes))
        if self.criteo and self.markers:
            marked = pl.col(pl.String).is_in(list(self.config.null_values))
            raw = raw.with_columns(pl.when(marked).then(None).otherwise(pl.col(pl.String)).name.keep())
        parsed = raw.select(
            *((self._label(kinds).alias("label"),) if self.label is not None else ()),
            *(self._number(name, kinds[name]).alias(f"d{n}") for n, name in enumerate(self.dense)),
            *((self._weight(kinds).alias("w"),) if self.weight is not None else ()),
            *((_hex if self.criteo else _id)(self._raw(name)).alias(name) for name in self._number_columns()),
        )
        values = raw.hstack(parsed).select(
            *(("label",) if self.label is not None else ()),
            *(self.transform(pl.col(f"d{n}")).alias(f"d{n}") for n in range(len(self.dense))),
            *(self._key(key, kinds).alias(f"k{n}") for n, key in enumerate(self.keys)),
            *(("w",) if self.weight is not None else ()),
            *((self._key(self.group, kinds).alias("g"),) if self.group is not None else ()),
            *((self._text(self.split.name, kinds).alias("s"),) if self.split else ()),
            *(self._raw(name).alias(f"c{n}") for n, name in enumerate(self.copied)),
        )
        everything = raw.hstack(parsed)
        checks = [check.alias(name) for name, check in self._checks(kinds).items()]
        if checks and not all(everything.select(check.all() for check in checks).row(0)):
            good = everything.select(checks)
            keep = good.select(pl.all_horizontal(pl.all())).to_series()
            for row in (~keep).arg_true():
                name = next(name for name in good.columns if not good[name][row])
                column = self.weight if name == _WEIGHT and self.weight is not None else name
                text = raw[f"r{self.needed.index(column)}"].slice(row, 1).to_list()[0]
                block.bad.append((int(block.lines[row]), self._reason(name, text, kinds[column])))
            values = values.filter(keep)
        return values

    def _raw(self, name: str) -> pl.Expr:
        return pl.col(f"r{self.needed.index(name)}")

    def _number_columns(self) -> list[str]:
        """Criteo's categories in use, alone or in a cross, which are 32-bit numbers."""
        return [name for name in self.used if name in CRITEO_CATEGORICAL] if self.criteo or self.numbered else []

    def _label(self, kinds: dict[str, pl.DataType]) -> pl.Expr:
        assert self.label is not None
        column, kind = self._raw(self.label), kinds[self.label]
        value = cells.label(column, kind, signed=self.sparse)
        return pl.when(~cells.missing(column, kind, self.markers)).then(value) if self.markers else value

    def _weight(self, kinds: dict[str, pl.DataType]) -> pl.Expr:
        assert self.weight is not None
        return self._number(self.weight, kinds[self.weight]).cast(pl.Float32)

    def _number(self, name: str, kind: pl.DataType) -> pl.Expr:
        column = self._raw(name)
        if self.criteo:
            return column.cast(pl.Int64, strict=False)
        value = cells.number(column, kind)
        return pl.when(~cells.missing(column, kind, self.markers)).then(value) if self.markers else value

    def transform(self, number: pl.Expr) -> pl.Expr:
        """What a number of a dense column becomes, Float32; missing is 0."""
        known = number.cast(pl.Float64).fill_nan(None).fill_null(0.0)
        return (known.clip(0.0).log1p() if self.config.dense_transform == "log1p" else known).cast(pl.Float32)

    def _key(self, key: KeyColumn, kinds: dict[str, pl.DataType]) -> pl.Expr:
        parts = [self._raw(part) for part in key.parts]
        if key.kind == "id":
            return pl.col(key.name)
        if key.kind == "hex":
            return pl.col(key.name).fill_null(0)
        if key.kind == "hex*hex":
            high, low = (pl.col(part).fill_null(0).cast(pl.UInt64) for part in key.parts)
            return pl.when((high == 0) | (low == 0)).then(0).otherwise(high * 2**32 + low).cast(pl.UInt64)
        if key.lists:
            separator = self.config.multi_separator
            return cells.bags(parts[0], kinds[key.name], separator, self.markers, self.key_version)
        texts = [self._text(name, kinds) for name in key.parts]
        if len(texts) == 1:
            return texts[0]
        missing = pl.any_horizontal(text == "" for text in texts)
        return pl.when(missing).then(pl.lit("")).otherwise(pl.concat_str(texts, separator=_JOIN))

    def _text(self, name: str, kinds: dict[str, pl.DataType]) -> pl.Expr:
        column = self._raw(name)
        if self.criteo:
            # One number, one text, however it is written.
            hexadecimal = name in CRITEO_CATEGORICAL
            return (column.str.to_lowercase().str.zfill(8) if hexadecimal else column).fill_null("")
        return cells.text(column, kinds[name], self.markers, self.key_version)

    def _checks(self, kinds: dict[str, pl.DataType]) -> dict[str, pl.Expr]:
        """Per checked column of the log, whether a row's field is in order. Never null."""
        checks = {} if self.label is None else {self.label: pl.col("label").is_not_null()}
        for n, name in enumerate(self.dense):
            number = pl.col(f"d{n}")
            sound = number.is_not_null()
            if not self.criteo:
                # Before the transformation, which would make a number of minus infinity.
                sound = sound & (number.is_nan() | (number.abs() <= cells.FLOAT32_MAX)).fill_null(False)
            checks[name] = cells.missing(self._raw(name), kinds[name], self.markers) | sound
        for name in self.used:
            sound_text = cells.is_text(self._raw(name), kinds[name])
            if sound_text is not None:
                checks[name] = checks[name] & sound_text if name in checks else sound_text
        if self.weight is not None:
            # Under a name of its own: the column may be a dense one, too.
            checks[_WEIGHT] = (pl.col("w").is_finite() & (pl.col("w") >= 0)).fill_null(False)
        for name in self._number_columns():
            if self.numbered:
                checks[name] = pl.col(name).is_not_null()
                continue
            # Parsing alone would take a sign, and more digits if they are zeros.
            sound = (self._raw(name).str.len_bytes() <= 8) & ~self._raw(name).str.starts_with("+")
            checks[name] = self._raw(name).is_null() | (pl.col(name).is_not_null() & sound)
        return checks

    def _reason(self, name: str, text: Any, kind: pl.DataType) -> str:
        told = name
        if name == _WEIGHT:
            told, wanted = f"{self.weight}, the weight,", "a finite number of 0 or more"
        elif name == self.label:
            wanted = "0 or 1 (or -1 for 0)" if self.sparse else "0 or 1"
            if text is not None and str(text) in self.config.null_values:
                wanted += " (null_values says that it means missing)"
        elif name in self.dense:
            wanted = "a whole number or nothing" if self.criteo else "a finite number within float32's range or nothing"
        elif self.numbered and name in CRITEO_CATEGORICAL:
            wanted = f"a whole number from 0 to {_LARGEST}"
        elif not self.criteo:
            told, wanted = (
                f"{name} of type {kind}",
                "numbers or text in UTF-8 (bytes can be written as hexadecimal text)",
            )
        else:
            wanted = "up to 8 hexadecimal digits or nothing"
        got = "nothing" if text is None or text == "" else repr(text)
        return f"column {told} holds {got if len(got) <= 60 else got[:60] + '...'}, expected {wanted}"


def make_plan(config: PrepareConfig) -> Plan:
    """The columns that a configuration asks for.

    Raises:
        UserError: rows of tables that do not go with the columns.
    """
    criteo = config.kind.columns == "criteo"
    number: KeyKind = "hex" if criteo else "id" if config.kind.columns == "ids" else "text"
    bags = config.hashes > 1
    singles = [
        KeyColumn(name, (name,), number, bags) for name in config.categorical_names if name not in config.multi_names
    ]
    for cross in config.cross:
        parts = cross_parts(cross)
        pair = criteo and len(parts) == 2 and all(part in CRITEO_CATEGORICAL for part in parts)
        singles.append(KeyColumn(cross, parts, "hex*hex" if pair else "text", bags))
    multis = [
        KeyColumn(name, (name,), "text", multi=True, lists=True)
        for name in config.categorical_names
        if name in config.multi_names
    ]
    split = KeyColumn(config.split_column, (config.split_column,), "text") if config.split_column else None
    group = None
    if config.group:
        group = KeyColumn(config.group, (config.group,), number if config.group in CRITEO_CATEGORICAL else "text")
    keys, hashing = (*singles, *multis), None
    if config.vocabulary == "hash":
        try:
            table_rows = config.hashed_rows([key.name for key in keys])
        except ValueError as error:
            raise UserError(str(error)) from None
        hashing = tuple(HashedRows(rows, seed, config.hashes) for seed, rows in enumerate(table_rows))
    return Plan(config, keys, split, config.label, weight=config.weight, group=group, hashing=hashing)


def check_types(plan: Plan, schema: pl.Schema, where: str) -> None:
    """Whether a Parquet file's columns have types that can be what they are named for.

    Raises:
        UserError: one has not.
    """
    for name in plan.used:
        kind = schema[name]
        multi = name in plan.config.multi_names
        if cells.is_list(kind) and not multi:
            # Only a categorical column that nothing else uses can be a multi one.
            used = [part for key in (*plan.keys, *plan.unmodelled) for part in key.parts]
            could = name in plan.config.categorical and used.count(name) == 1 and name != plan.config.label
            hint = "; name it in multi too, or leave it out" if could else ", expected one number or text per row"
            raise UserError(f"{_role(plan, name)} {name} of {where} holds lists{hint}")
        inner = kind.inner if isinstance(kind, (pl.List, pl.Array)) else kind
        if multi and not (cells.is_list(kind) or cells.is_textual(kind) or kind == pl.Null):
            raise UserError(f"multi column {name} of {where} is of type {kind}, expected lists or text")
        if not cells.can_be_key(inner):
            raise UserError(f"{_role(plan, name)} {name} of {where} is of type {kind}, expected numbers or text")
        if (name in plan.dense or name == plan.weight) and not (
            kind.is_numeric() or cells.is_textual(kind) or kind in (pl.Boolean, pl.Null)
        ):
            what = "dense column" if name in plan.dense else "weight column"
            raise UserError(f"{what} {name} of {where} is of type {kind}, expected numbers")


def _role(plan: Plan, name: str) -> str:
    if plan.group and name == plan.group.name:
        return "group column"
    return "split_column" if plan.split and name == plan.split.name else "column"


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _hex(column: pl.Expr) -> pl.Expr:
    return column.str.to_integer(base=16, strict=False, dtype=pl.UInt32)


def _id(column: pl.Expr) -> pl.Expr:
    """UInt32: whole numbers that fit, null for others and for text that is none."""
    number = column.cast(pl.Float64, strict=False)  # exact for all that fit
    return pl.when(number == number.floor()).then(number).cast(pl.UInt32, strict=False)


def _splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of Steele, Lea and Flood's SplitMix64, modulo 2^64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
