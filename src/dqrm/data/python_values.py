"""Python values -> polars columns, so that a cell gives the same id wherever it comes from.

Values of one type give a column of that type. Mixed types give a text column of the values' keys: 7 and "7" are one id.
"""

import datetime
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from dqrm.data.cells import text as key_text
from dqrm.errors import UserError

# In this order: a bool is an int, and a datetime is a date.
_KINDS = (bool, int, np.float32, float, str, bytes, decimal.Decimal, datetime.datetime, datetime.date, datetime.time)
_LISTS = (list, tuple, set, frozenset, np.ndarray, pl.Series)
# Below it every whole number is a float of its own.
_EXACT = 2**53
# More do not fit polars' decimals.
_DECIMAL_DIGITS = 38


def to_series(name: str, values: Sequence[Any]) -> pl.Series:
    """A column of the given values; None, NaN, pandas' NA and NaT are missing.

    Raises:
        UserError: a value that is not a number, text, date or time, or a list of them; lists beside other values.
    """
    given = [_plain(value) for value in values]
    known = [value for value in given if value is not None]
    lists = [isinstance(value, _LISTS) for value in known]
    if any(lists):
        if not all(lists):
            other = known[lists.index(False)]
            raise UserError(f"column {name} holds lists and {_shown(other)}, expected lists in all rows or in none")
        return _of_lists(name, given)
    kinds = [_kind(name, value) for value in known]
    distinct = set(kinds)
    if distinct == {int, float} and all(abs(value) <= _EXACT for value in known if isinstance(value, int)):
        distinct = {float}
        given = [None if value is None else float(value) for value in given]
    if len(distinct) <= 1:
        return _of_one_kind(name, given, next(iter(distinct), None))
    texts: list[str | None] = [None] * len(given)
    where = [at for at, value in enumerate(given) if value is not None]
    for kind in distinct:
        some = [at for at, other in zip(where, kinds) if other is kind]
        column = _of_one_kind(name, [given[at] for at in some], kind)
        as_keys = pl.DataFrame({"key": column}).select(key_text(pl.col("key"), column.dtype)).to_series()
        for at, text in zip(some, as_keys):
            texts[at] = text
    return pl.Series(name, texts, pl.String)


def _of_one_kind(name: str, values: Sequence[Any], kind: type | None) -> pl.Series:
    if kind is None:
        return pl.Series(name, [None] * len(values), pl.Null)
    if kind is np.float32:
        return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float32)
    if kind is np.datetime64:
        return pl.Series(name, np.array([np.datetime64("NaT") if value is None else value for value in values]))
    if kind is int and any(value is not None and not -(2**63) <= value < 2**63 for value in values):
        return pl.Series(name, [None if value is None else str(value) for value in values], pl.String)
    if kind is decimal.Decimal and _digits(values) > _DECIMAL_DIGITS:
        return pl.Series(name, [None if value is None else _decimal_text(value) for value in values], pl.String)
    try:
        return pl.Series(name, values)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"column {name} cannot be read ({' '.join(str(error).split())})") from None


def _digits(values: Sequence[decimal.Decimal | None]) -> int:
    """The digits of a column that holds all of the decimals exactly, before and behind the point."""
    before = behind = 0
    for value in values:
        if value is not None:
            _, digits, exponent = value.as_tuple()
            assert isinstance(exponent, int)
            before, behind = max(before, len(digits) + exponent), max(behind, -exponent)
    return before + behind


def _decimal_text(value: decimal.Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _of_lists(name: str, values: Sequence[Any]) -> pl.Series:
    inner = to_series(name, [entry for value in values if value is not None for entry in value])
    entries, at, nested = inner.to_list(), 0, []
    for value in values:
        nested.append(None if value is None else entries[at : at + len(value)])
        at += 0 if value is None else len(value)
    return pl.Series(name, nested, dtype=pl.List(inner.dtype))


def _plain(value: Any) -> Any:
    """None for the markers of missing values; a Python object for numpy's scalars, where nothing is lost."""
    if value is None or (type(value).__name__ in ("NAType", "NaTType") and type(value).__module__.startswith("pandas")):
        return None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.float16):
        value = np.float32(value)  # as columns of them are read
    if isinstance(value, np.generic) and not isinstance(value, (np.float32, np.datetime64)):
        value = value.item()
    if isinstance(value, decimal.Decimal) and not value.is_finite():
        value = float("nan" if value.is_nan() else value)  # polars knows no such decimals
    return None if isinstance(value, (float, np.float32)) and np.isnan(value) else value


def _kind(name: str, value: Any) -> type:
    if isinstance(value, np.datetime64):
        return np.datetime64
    for kind in _KINDS:
        if isinstance(value, kind):
            return kind
    raise UserError(
        f"column {name} holds {_shown(value)} of type {type(value).__name__}, expected a number, text, or a list of "
        "them"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
