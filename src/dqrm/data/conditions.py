"""Sets of values of a column: values by name, or a range such as >=2026-01-07. Imports no polars."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_DATE = r"[0-9]{4}-[0-9]{2}(?:-[0-9]{2}(?:[ T][0-9]{2}(?::[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?)?)?)?"
# In polars' regular expressions and in Python's.
NUMBERS, DATES, ZONE = f"^{_NUMBER}$", f"^{_DATE}", r" ?(?:Z|[A-Z]{2,5}|[+-][0-9]{2}:?[0-9]{2})?$"
_OPERATORS = re.compile(r"(==|>=|<=|>|<)\s*(.*)", re.DOTALL)
# Where a range that is written as one value is two bounds.
_BETWEEN = re.compile(r",\s*(?=[<>])")


@dataclass(frozen=True)
class Values:
    """exact: values by name. bounds: (operator, bound) that all have to hold. compared: as what."""

    exact: tuple[str, ...]
    bounds: tuple[tuple[str, str], ...]
    compared: Literal["numbers", "dates", "text"] | None

    @property
    def range(self) -> str:
        """The bounds as they are written."""
        return ",".join(operator + bound for operator, bound in self.bounds)


def parse(field: str, values: Sequence[str]) -> Values:
    """Parse the values of a field: a range is one or two bounds, each a value of its own or both in one
    (>=a,<b); ==>5 is the value '>5' itself.

    Raises:
        ValueError: no bound after an operator, two on one side, or bounds of two kinds.
    """
    exact: list[str] = []
    bounds: list[tuple[str, str]] = []
    for value in values:
        if value[:1] in (">", "<") and _BETWEEN.search(value):
            bounds += parse(field, _BETWEEN.split(value)).bounds
            continue
        match = _OPERATORS.fullmatch(value)
        operator, bound = (match[1], match[2].strip()) if match else ("==", value)
        if operator == "==":
            exact.append(bound)
        elif not bound:
            raise ValueError(f"{field} has '{value}', expected a bound after the operator, as in '>=2026-01-07'")
        else:
            bounds.append((operator, bound))
    sides = [operator[0] for operator, _ in bounds]
    if len(set(sides)) < len(sides):
        written = ",".join(operator + bound for operator, bound in bounds)
        raise ValueError(f"{field} has '{written}', expected one range: at most one lower and one upper bound")
    kinds = {_kind(bound) for _, bound in bounds}
    if len(kinds) > 1:
        raise ValueError(f"{field} has bounds of two kinds, {' and '.join(sorted(kinds))}, expected one kind")
    return Values(tuple(exact), tuple(bounds), kinds.pop() if kinds else None)


def _kind(bound: str) -> Literal["numbers", "dates", "text"]:
    if re.fullmatch(_NUMBER, bound):
        return "numbers"
    return "dates" if re.fullmatch(_DATE, bound) else "text"
