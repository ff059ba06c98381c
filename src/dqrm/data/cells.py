"""The value of a cell, whatever its type: its key, whether it is missing, its number, its label.

    text(column, kind, markers)       the key, "" where the cell is missing
    bags(column, kind, ...)           the keys of a cell that holds several
    missing(column, kind, markers)    the one rule of what is missing
    number(column, kind), label(column, kind)

A value has one key in every type that can hold it: 29 whether it is an integer, a float (29.0), a decimal (29.00),
text, or an entry of a list. `prepare` and `predict` use these functions alike; docs/data.md has the table.
"""

from collections.abc import Sequence

import polars as pl

# Version of a dataset's keys, stored for each column. 1: before lists, decimals, times and NaN followed one rule.
KEY_VERSION = 2
FLOAT32_MAX = 3.4028234663852886e38
# Types that hold text, in one way or another.
_TEXTUAL = (pl.String, pl.Categorical, pl.Enum, pl.Binary)
# Types of Parquet columns that can have keys, besides numbers.
_KEYED = (*_TEXTUAL, pl.Boolean, pl.Date, pl.Datetime, pl.Time, pl.Null)
# Below it every whole number is a float of its own.
_EXACT = 2.0**53
_ZEROS = "0" * 400


def is_textual(kind: pl.DataType) -> bool:
    """Whether cells of this type are text."""
    return kind in _TEXTUAL


def is_list(kind: pl.DataType) -> bool:
    """Whether cells of this type hold several values."""
    return isinstance(kind, (pl.List, pl.Array))


def can_be_key(kind: object) -> bool:
    """Whether cells of this type, or the entries of such lists, have keys."""
    return isinstance(kind, pl.DataType) and (kind.is_numeric() or kind in _KEYED)


def plain(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """The text of a textual column as it stands; null where bytes are not UTF-8 text."""
    if kind == pl.Binary:
        return column.map_batches(_decode, return_dtype=pl.String)
    return column.cast(pl.String)


def is_text(column: pl.Expr, kind: pl.DataType) -> pl.Expr | None:
    """Boolean, never null: whether the bytes of a cell are UTF-8 text. None: it cannot hold any that are not."""
    if isinstance(kind, (pl.List, pl.Array)):
        assert isinstance(kind.inner, pl.DataType)
        entries = is_text(pl.element(), kind.inner)
        values = column if isinstance(kind, pl.List) else column.arr.to_list()
        return None if entries is None else values.list.eval(entries).list.all().fill_null(True)
    return column.is_null() | plain(column, kind).is_not_null() if kind == pl.Binary else None


def canonical(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """String: the one text of each value; null for null and NaN."""
    if is_textual(kind):
        return plain(column, kind).map_batches(_whole, return_dtype=pl.String)
    if kind.is_float():
        return _float(column)
    if kind.is_decimal():
        texts = column.cast(pl.String)
        return pl.when(texts.str.contains(".", literal=True)).then(_trimmed(texts)).otherwise(texts)
    if isinstance(kind, pl.Datetime):
        if kind.time_zone is not None:
            return _trimmed(column.dt.convert_time_zone("UTC").dt.to_string("%Y-%m-%dT%H:%M:%S%.f")) + "Z"
        return _trimmed(column.dt.to_string("%Y-%m-%dT%H:%M:%S%.f"))
    if kind == pl.Time:
        return _trimmed(column.dt.to_string("%H:%M:%S%.f"))
    return column.cast(pl.String)


def markers_of(null_values: Sequence[str]) -> tuple[str, ...]:
    """The canonical texts of the markers that mean missing."""
    texts = pl.DataFrame({"m": pl.Series(null_values, dtype=pl.String)})
    return tuple(texts.select(canonical(pl.col("m"), pl.String())).to_series().to_list())


def missing(column: pl.Expr, kind: pl.DataType, markers: Sequence[str] = ()) -> pl.Expr:
    """Boolean, never null: null, NaN, empty text, and what `markers_of` named."""
    none = column.is_null()
    if kind.is_float():
        none = none | column.is_nan().fill_null(False)
    if is_textual(kind) or markers:
        # Of texts the canonical one, which takes a function of Python, is empty where the cell is.
        texts = canonical(column, kind) if markers else plain(column, kind)
        none = none | texts.is_in(["", *markers]).fill_null(True)
    return none


def text(column: pl.Expr, kind: pl.DataType, markers: Sequence[str] = (), version: int = KEY_VERSION) -> pl.Expr:
    """String, never null: the key of each cell, "" where it is missing."""
    if version < KEY_VERSION and kind != pl.Binary:
        return _first_text(column, kind)
    keys = canonical(column, kind)
    if markers:
        keys = pl.when(keys.is_in(list(markers))).then(pl.lit("")).otherwise(keys)
    return keys.fill_null("")


def bags(
    column: pl.Expr, kind: pl.DataType, separator: str, markers: Sequence[str] = (), version: int = KEY_VERSION
) -> pl.Expr:
    """List(String), never null: the keys of the values of each cell that are not missing.

    Cells are lists, or text that is split at the separator.
    """
    inner: pl.DataType = pl.String()
    if isinstance(kind, (pl.List, pl.Array)):
        assert isinstance(kind.inner, pl.DataType)
        cells, inner = column if isinstance(kind, pl.List) else column.arr.to_list(), kind.inner
    else:
        cells = plain(column, kind).str.split(separator)
    keys = text(pl.element(), inner, markers, version)
    if version < KEY_VERSION and inner != pl.Binary:
        keys = pl.element().cast(pl.String).fill_null("")
    return cells.list.eval(keys.filter(keys != "")).fill_null([])


def number(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """Float64: the number in each cell, null where there is none."""
    if is_textual(kind):
        column = plain(column, kind).str.strip_chars()
    return column.cast(pl.Float64, strict=False)


def label(column: pl.Expr, kind: pl.DataType, signed: bool = False) -> pl.Expr:
    """UInt8: 0 or 1 by the cell's value (1, 1.00, 1e0, true), null where it is neither.

    signed: whether -1 means 0, as in LIBSVM's files.
    """
    if not (is_textual(kind) or kind.is_numeric() or kind == pl.Boolean):
        return column.is_null().replace_strict({}, default=None, return_dtype=pl.UInt8)
    value = number(column, kind)
    one, zero = value == 1, value == 0
    if signed:
        zero = zero | (value == -1)
    if is_textual(kind):
        words = plain(column, kind).str.strip_chars().str.to_lowercase()
        one, zero = (one.fill_null(False) | (words == "true")), (zero.fill_null(False) | (words == "false"))
    return pl.when(one).then(pl.lit(1, pl.UInt8)).when(zero).then(pl.lit(0, pl.UInt8))


def _whole(texts: pl.Series) -> pl.Series:
    """A whole number with a fraction of zeros, as writers make of integers where one is missing, is that number."""
    # Few cells end so, and none of the rest meets a regular expression.
    ends = texts.str.ends_with("0").fill_null(False).arg_true()
    some = texts.gather(ends)
    whole = some.str.contains(r"^-?(?:0|[1-9][0-9]*)\.0+$")
    if not whole.any():
        return texts
    short = some.filter(whole).str.replace(r"\.0+$", "")
    return texts.clone().scatter(ends.filter(whole), short.set(short == "-0", "0"))


def _float(column: pl.Expr) -> pl.Expr:
    """Whole numbers exactly, others with the fewest digits that give the same float of this width, neither with an
    exponent (but for whole ones beyond 128 bits)."""
    digits = column.cast(pl.String)
    parts = digits.str.extract_groups(r"^(?<sign>-?)(?<head>\d)(?:\.(?<tail>\d+))?e-(?<down>\d+)$")
    down = parts.struct.field("down").cast(pl.Int64)
    small = pl.concat_str(
        parts.struct.field("sign"),
        pl.lit("0."),
        pl.lit(_ZEROS).str.head(down - 1),
        parts.struct.field("head"),
        parts.struct.field("tail").fill_null(""),
    )
    whole = column == column.floor()
    return (
        pl.when(column.is_nan())
        .then(None)
        .when(whole & (column.abs() < _EXACT))
        .then(column.cast(pl.Int64, strict=False).cast(pl.String))
        .when(whole)
        .then(pl.coalesce(column.cast(pl.Int128, strict=False).cast(pl.String), digits))
        .when(down.is_not_null())
        .then(small)
        .otherwise(digits)
    )


def _trimmed(texts: pl.Expr) -> pl.Expr:
    """Without the zeros at the end of a fraction, and without the point where nothing is left of it."""
    return texts.str.replace(r"(\.[0-9]*?)0+$", "$1").str.strip_suffix(".")


def _decode(cells: pl.Series) -> pl.Series:
    try:
        return cells.cast(pl.String)
    except pl.exceptions.PolarsError:
        return pl.Series(cells.name, [_utf8(cell) for cell in cells], pl.String)


def _utf8(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None


def _first_text(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """The keys of version 1, which vocabularies made then hold."""
    texts = column.cast(pl.String)
    if kind.is_float():
        whole = (column == column.floor()) & (column.abs() < _EXACT)
        texts = pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(texts)
    return texts.fill_null("")
