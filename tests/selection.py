"""Which cases of a test are quick: of a product of parameters, few in which every pair of values occurs.

Most faults show with one value, nearly all of the rest with a pair of them. The others are the full product, which is
marked `product` and run by `make test-products`.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

import pytest

SMALL = 12  # so many cases of one test are all quick


def values(case: pytest.Function) -> tuple[Hashable, ...]:
    """What each `parametrize` gave the case, and what each fixture with parameters did."""
    given = dict(case.callspec.params)
    found = []
    for mark in case.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        # Together: a list of several parameters is chosen by hand.
        found.append(tuple(_key(given.pop(name)) for name in names))
    return (*found, *map(_key, given.values()))


def _key(value: object) -> Hashable:
    plain = value is None or isinstance(value, bool | int | float | str)
    return (type(value), repr(value) if plain else id(value))


def pairwise(cases: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Numbers of cases that together have every pair of values that any case has, at the same two places."""
    pairs = [set(combinations(enumerate(case), 2)) or {case} for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(pairs[number] & missing), -number))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def slow(*values: object) -> list[object]:
    """These values of a parameter, marked `slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def some_quick(*chosen: tuple[object, ...], of: Iterable[tuple[object, ...]]) -> list[object]:
    """A product `of` parameters of which the cases `chosen` by hand are quick and the others `slow`."""
    others = [case for case in of if case not in chosen]
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


def quick(cases: Sequence[pytest.Function]) -> list[pytest.Function]:
    """Those of the cases of one test that are quick."""
    if len(cases) <= SMALL:
        return list(cases)
    return [cases[number] for number in pairwise([values(case) for case in cases])]
