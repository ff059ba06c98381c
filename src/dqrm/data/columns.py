"""Which columns of a log become what, and their values, checked and typed: one polars query per block."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.lines import Block
from dqrm.errors import UserError
from dqrm.options import did_you_mean

CRITEO_COLUMNS = ("label", *CRITEO_DENSE, *CRITEO_CATEGORICAL)

# What a key is: Criteo's 32-bit number, two of them in 64 bits, or text (the parts of a cross joined by _JOIN).
KeyKind = Literal["hex", "hex*hex", "text"]
_JOIN = "\x1f"
# What the check of the weights is called beside those of columns.
_WEIGHT = "\x1fweight"
# Below it every whole number is a float of its own.
_EXACT = 2.0**53
# Types of Parquet columns, besides numbers, that polars can write as text.
_TEXTS = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Date, pl.Datetime, pl.Time, pl.Null)
_BOOLEANS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


@dataclass(frozen=True)
class KeyColumn:
    """A column that has keys: a categorical one, a cross, or the one that decides the split."""

    name: str
    parts: tuple[str, ...]
    kind: KeyKind
    multi: bool = False

    def hash_name(self) -> str:
        """The function whose value is taken modulo the cap."""
        return {"hex": "value", "hex*hex": "splitmix64", "text": "crc32"}[self.kind]

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

    def code(self, cells: pl.Series, rows: int | None) -> tuple[pl.Series, NDArray[Any], pl.Series | None]:
        """The distinct keys of a column of `Plan.typed`, sorted, the code of each entry into them, and a multi-valued
        column's entries per row.

        rows: what keys are taken modulo of (None: they are not). The codes are of the smallest unsigned type.
        """
        lengths = None
        if self.multi:
            lengths = cells.list.len()
            cells = cells.explode(empty_as_null=False)
        keys = cells.unique().sort()
        codes: NDArray[Any] = keys.search_sorted(cells).to_numpy()
        if rows is not None:
            remainders, inverse = np.unique(self.modulo(keys, rows), return_inverse=True)
            keys, codes = pl.Series(remainders), inverse[codes]
        return keys, codes.astype(np.min_scalar_type(max(0, len(keys) - 1))), lengths


@dataclass(frozen=True)
class Plan:
    """The columns of a configuration in the order of the schema: single-valued ones, crosses, multi-valued ones.

    label: the label's column, None where rows need none; weight and group likewise. copied: columns whose cells are
    handed on as they are.
    """

    config: PrepareConfig
    keys: tuple[KeyColumn, ...]
    split: KeyColumn | None
    label: str | None
    copied: tuple[str, ...] = ()
    weight: str | None = None
    group: KeyColumn | None = None

    @property
    def criteo(self) -> bool:
        return self.config.layout != "table"

    @property
    def dense(self) -> tuple[str, ...]:
        return self.config.dense_names

    @property
    def used(self) -> tuple[str, ...]:
        """The columns of the log whose cells become something."""
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

    def check(self, known: Sequence[str], where: str) -> None:
        """Whether a file has the columns.

        Raises:
            UserError: one is missing, there twice, or the configuration names none at all.
        """
        if not self.dense and not self.keys:
            raise UserError(f"no column was named in categorical or dense; {where} has {', '.join(known)}")
        for name in self.needed:
            if name not in known:
                raise UserError(f"no column '{name}' in {where}{did_you_mean(name, known)}")
            if list(known).count(name) > 1:
                raise UserError(f"{where} has {list(known).count(name)} columns of the name '{name}', expected one")

    def typed(self, block: Block) -> pl.DataFrame:
        """The good rows of a block; the others are added to `block.bad`.

        Columns: label UInt8, if there is one, d<n> Float32 (transformed), k<n> keys (UInt32, UInt64 or String;
        List(String) for a multi-valued column), where the split needs it, s String, and c<n>, the copied ones; w
        Float32 and g, a key, where there are weights and groups.
        """
        raw = block.fields.select(self.needed)
        kinds = dict(raw.schema)
        # The log may use our names, so it gets others.
        raw.columns = [f"r{at}" for at in range(raw.width)]
        parsed = raw.select(
            *((_label(self._raw(self.label)).alias("label"),) if self.label is not None else ()),
            *(self._number(name).alias(f"d{n}") for n, name in enumerate(self.dense)),
            *((self._number(self.weight).cast(pl.Float32).alias("w"),) if self.weight is not None else ()),
            *(_hex(self._raw(name)).alias(name) for name in self._hex_columns()),
        )
        values = raw.hstack(parsed).select(
            *(("label",) if self.label is not None else ()),
            *(self._transform(pl.col(f"d{n}")).alias(f"d{n}") for n in range(len(self.dense))),
            *(self._key(key, kinds).alias(f"k{n}") for n, key in enumerate(self.keys)),
            *(("w",) if self.weight is not None else ()),
            *((self._key(self.group, kinds).alias("g"),) if self.group is not None else ()),
            *((_text(self._raw(self.split.name), kinds[self.split.name]).alias("s"),) if self.split else ()),
            *(self._raw(name).alias(f"c{n}") for n, name in enumerate(self.copied)),
        )
        everything = raw.hstack(parsed).hstack(values.select(pl.col("^d\\d+$").name.prefix("value_")))
        checks = [check.alias(name) for name, check in self._checks(kinds).items()]
        if checks and not all(everything.select(check.all() for check in checks).row(0)):
            good = everything.select(checks)
            keep = good.select(pl.all_horizontal(pl.all())).to_series()
            for row in (~keep).arg_true():
                name = next(name for name in good.columns if not good[name][row])
                text = raw[f"r{self.needed.index(self.weight if name == _WEIGHT else name)}"][row]
                block.bad.append((int(block.lines[row]), self._reason(name, text)))
            values = values.filter(keep)
        return values

    def _raw(self, name: str) -> pl.Expr:
        return pl.col(f"r{self.needed.index(name)}")

    def _hex_columns(self) -> list[str]:
        """Criteo's categories in use, alone or in a cross."""
        return [name for name in self.used if name in CRITEO_CATEGORICAL] if self.criteo else []

    def _number(self, name: str) -> pl.Expr:
        return self._raw(name).cast(pl.Int64 if self.criteo else pl.Float64, strict=False)

    def _transform(self, number: pl.Expr) -> pl.Expr:
        known = number.cast(pl.Float64).fill_nan(None).fill_null(0.0)
        return (known.clip(0.0).log1p() if self.config.dense_transform == "log1p" else known).cast(pl.Float32)

    def _key(self, key: KeyColumn, kinds: dict[str, pl.DataType]) -> pl.Expr:
        parts = [self._raw(part) for part in key.parts]
        if key.kind == "hex":
            return pl.col(key.name).fill_null(0)
        if key.kind == "hex*hex":
            high, low = (pl.col(part).fill_null(0).cast(pl.UInt64) for part in key.parts)
            return pl.when((high == 0) | (low == 0)).then(0).otherwise(high * 2**32 + low).cast(pl.UInt64)
        if key.multi:
            lists = isinstance(kinds[key.name], pl.List)
            if kinds[key.name] == pl.Null:
                parts[0] = parts[0].cast(pl.String)
            cells = parts[0].cast(pl.List(pl.String)) if lists else parts[0].str.split(self.config.multi_separator)
            return cells.fill_null([]).list.eval(pl.element().filter(pl.element() != ""))
        if self.criteo:
            # One number, one text, however it is written.
            hexadecimal = zip(key.parts, parts)
            parts = [
                part.str.to_lowercase().str.zfill(8) if name in CRITEO_CATEGORICAL else part
                for name, part in hexadecimal
            ]
        texts = [_text(part, kinds[name]) for name, part in zip(key.parts, parts)]
        if len(texts) == 1:
            return texts[0]
        missing = pl.any_horizontal(text == "" for text in texts)
        return pl.when(missing).then(pl.lit("")).otherwise(pl.concat_str(texts, separator=_JOIN))

    def _checks(self, kinds: dict[str, pl.DataType]) -> dict[str, pl.Expr]:
        """Per checked column of the log, whether a row's field is in order. Never null."""
        checks = {} if self.label is None else {self.label: pl.col("label").is_not_null()}
        for n, name in enumerate(self.dense):
            missing = self._raw(name).is_null()
            if kinds[name] == pl.String:
                missing = missing | (self._raw(name) == "").fill_null(False)
            checks[name] = missing | (pl.col(f"d{n}").is_not_null() & pl.col(f"value_d{n}").is_finite())
        if self.weight is not None:
            # Under a name of its own: the column may be a dense one, too.
            checks[_WEIGHT] = (pl.col("w").is_finite() & (pl.col("w") >= 0)).fill_null(False)
        for name in self._hex_columns():
            # Parsing alone would take a sign, and more digits if they are zeros.
            sound = (self._raw(name).str.len_bytes() <= 8) & ~self._raw(name).str.starts_with("+")
            checks[name] = self._raw(name).is_null() | (pl.col(name).is_not_null() & sound)
        return checks

    def _reason(self, name: str, text: Any) -> str:
        if name == _WEIGHT:
            name, wanted = f"{self.weight}, the weight,", "a finite number of 0 or more"
        elif name == self.label:
            wanted = "0 or 1"
        elif name in self.dense:
            wanted = "a whole number or nothing" if self.criteo else "a finite number or nothing"
        else:
            wanted = "up to 8 hexadecimal digits or nothing"
        got = "nothing" if text is None or text == "" else repr(text)
        return f"column {name} holds {got if len(got) <= 60 else got[:60] + '...'}, expected {wanted}"


def make_plan(config: PrepareConfig) -> Plan:
    """The columns that a configuration asks for."""
    criteo = config.layout != "table"
    singles = [
        KeyColumn(name, (name,), "hex" if criteo else "text")
        for name in config.categorical_names
        if name not in config.multi
    ]
    for cross in config.cross:
        parts = tuple(cross.split("*"))
        pair = criteo and len(parts) == 2 and all(part in CRITEO_CATEGORICAL for part in parts)
        singles.append(KeyColumn(cross, parts, "hex*hex" if pair else "text"))
    multis = [KeyColumn(name, (name,), "text", multi=True) for name in config.categorical if name in config.multi]
    split = KeyColumn(config.split_column, (config.split_column,), "text") if config.split_column else None
    group = None
    if config.group:
        hexadecimal = criteo and config.group in CRITEO_CATEGORICAL
        group = KeyColumn(config.group, (config.group,), "hex" if hexadecimal else "text")
    label = "label" if criteo else config.label
    return Plan(config, (*singles, *multis), split, label, weight=config.weight, group=group)


def check_types(plan: Plan, schema: pl.Schema, where: str) -> None:
    """Whether a Parquet file's columns have types that can be what they are named for.

    Raises:
        UserError: one has not.
    """
    for name in plan.used:
        kind = schema[name]
        multi = name in plan.config.multi
        if isinstance(kind, pl.List) and not multi:
            # Only a categorical column that nothing else uses can be a multi one.
            used = [part for key in (*plan.keys, *plan.unmodelled) for part in key.parts]
            could = name in plan.config.categorical and used.count(name) == 1 and name != plan.config.label
            hint = "; name it in multi too, or leave it out" if could else ", expected one number or text per row"
            raise UserError(f"{_role(plan, name)} {name} of {where} holds lists{hint}")
        inner = kind.inner if isinstance(kind, pl.List) else kind
        if multi and not isinstance(kind, pl.List) and kind not in (pl.String, pl.Null):
            raise UserError(f"multi column {name} of {where} is of type {kind}, expected lists or text")
        if not isinstance(inner, pl.DataType) or not (inner.is_numeric() or inner in _TEXTS):
            raise UserError(f"{_role(plan, name)} {name} of {where} is of type {kind}, expected numbers or text")
        if (name in plan.dense or name == plan.weight) and not (
            kind.is_numeric() or kind in (pl.Boolean, pl.String, pl.Null)
        ):
            what = "dense column" if name in plan.dense else "weight column"
            raise UserError(f"{what} {name} of {where} is of type {kind}, expected numbers")


def _role(plan: Plan, name: str) -> str:
    if plan.group and name == plan.group.name:
        return "group column"
    return "split_column" if plan.split and name == plan.split.name else "column"


def _text(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Text, "" where missing. A whole number is written as one, in a column of floats too: where one number is missing,
    pandas makes floats of all."""
    text = column.cast(pl.String)
    if kind.is_float():
        whole = (column == column.floor()) & (column.abs() < _EXACT)
        text = pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(text)
    return text.fill_null("")


def _label(column: pl.Expr) -> pl.Expr:
    return column.cast(pl.String).str.to_lowercase().replace_strict(_BOOLEANS, default=None, return_dtype=pl.UInt8)


def _hex(column: pl.Expr) -> pl.Expr:
    return column.str.to_integer(base=16, strict=False, dtype=pl.UInt32)


def _splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of Steele, Lea and Flood's SplitMix64, modulo 2^64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
