"""The split of each row. 0: train, 1: validation, 2: test, as in `folder.SPLITS`."""

import operator as operators
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.data import conditions
from dqrm.data.conditions import DATES, NUMBERS, ZONE, Values
from dqrm.data.config import PrepareConfig
from dqrm.data.sources import Source
from dqrm.data.staging import Staging
from dqrm.errors import UserError
from dqrm.options import did_you_mean

TRAIN, VALIDATION, TEST = range(3)
Splits = NDArray[np.uint8]
_COMPARE = {"<": operators.lt, "<=": operators.le, ">": operators.gt, ">=": operators.ge}


def assign(config: PrepareConfig, sources: Sequence[Source], parts: Sequence[Staging]) -> Splits:
    """The split of every row of all parts, uint8 [rows].

    Raises:
        UserError: the rule cannot be applied to these files, or leaves nothing for training.
    """
    rule, rows = config.split_rule, sum(sum(part.rows) for part in parts)
    if rule == "column":
        splits = _by_column(config, parts, rows)
    elif rule == "file":
        splits = _by_file(config, sources, rows)
    elif rule == "time" and config.kind.seven_days:
        splits = _runs(rows, *kaggle_rows(rows))
    else:
        validation, test = (round(rows * share) for share in (config.validation_fraction, config.test_fraction))
        splits = _runs(rows, (VALIDATION, validation), (TEST, test))
        if rule == "random":
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, 1]))).shuffle(splits)
    if rows and not (splits == TRAIN).any():
        raise UserError(f"the split by {rule} leaves none of the {rows} rows for training")
    return splits


def describe(config: PrepareConfig) -> dict[str, Any]:
    """The rule and its parameters, for dataset.json."""
    rule = config.split_rule
    if rule == "column":
        chosen: dict[str, Any] = {"column": config.split_column, **_values(config)}
        parsed = [conditions.parse(field, getattr(config, field)) for field in ("validation_values", "test_values")]
        if compared := sorted({values.compared for values in parsed if values.compared}):
            chosen["compared_as"] = " and ".join(compared)
    elif rule == "file" and (config.validation_values or config.test_values):
        chosen = _values(config)
    elif rule == "file":
        chosen = {"test": "first half of the last file", "validation": "second half of the last file"}
    elif rule == "time" and config.kind.seven_days:
        chosen = {"parts": 7, "test": "first half of part 7", "validation": "second half of part 7"}
    else:
        chosen = {"validation_fraction": config.validation_fraction, "test_fraction": config.test_fraction}
        if rule == "random":
            chosen["seed"] = config.seed
    return {"rule": rule, **chosen}


def kaggle_rows(rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows at the end of Criteo's Kaggle log, as ((TEST, rows), (VALIDATION, rows)).

    Its 7 days have no marks: 7 parts as equal as can be (the earlier ones longer), of the last one the first half
    test, the rest validation.
    """
    return _halves(rows // 7)


def _halves(rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (TEST, rows - rows // 2), (VALIDATION, rows // 2)


def _runs(rows: int, *ends: tuple[int, int]) -> Splits:
    """All train but the given (split, rows) at the end."""
    splits = np.zeros(rows, np.uint8)
    at = max(0, rows - sum(count for _, count in ends))
    for split, count in ends:
        splits[at : at + count] = split
        at += count
    return splits


def _by_file(config: PrepareConfig, sources: Sequence[Source], rows: int) -> Splits:
    if not (config.validation_values or config.test_values):
        if len(sources) < 2:
            raise UserError(
                f"the split by file needs two files or more, got only {sources[0].where}; give all or split otherwise"
            )
        return _runs(rows, *_halves(sources[-1].rows))
    splits, at = np.zeros(rows, np.uint8), 0
    unused = dict.fromkeys([*config.validation_values, *config.test_values])
    for source in sources:
        validation, test = (
            [pattern for pattern in patterns if source.matches(pattern)]
            for patterns in (config.validation_values, config.test_values)
        )
        if validation and test:
            raise UserError(
                f"split by file: {source.name} matches '{validation[0]}' in validation_values and '{test[0]}' in "
                "test_values, expected one of them"
            )
        splits[at : at + source.rows] = TEST if test else VALIDATION if validation else TRAIN
        at += source.rows
        unused = {pattern: None for pattern in unused if pattern not in (*validation, *test)}
    for pattern in unused:
        hint = did_you_mean(pattern, [source.name for source in sources[:20]])
        if pattern[:1] in (">", "<"):
            hint = "; a range is for --split column --split-column NAME"
        raise UserError(f"split by file: no file is named '{pattern}'{hint}")
    return splits


def _by_column(config: PrepareConfig, parts: Sequence[Staging], rows: int) -> Splits:
    sides = {
        split: _Meant(config.split_column or "", field, conditions.parse(field, getattr(config, field)))
        for split, field in ((VALIDATION, "validation_values"), (TEST, "test_values"))
    }
    splits, at = np.zeros(rows, np.uint8), 0
    some: list[str] = []
    for keys, codes, _ in chain.from_iterable(part.codes(len(part.columns) - 1) for part in parts):
        matches = {split: meant(keys) for split, meant in sides.items()}
        both = matches[VALIDATION] & matches[TEST]
        if both.any():
            raise UserError(
                f"split by column {config.split_column}: '{keys[int(both.argmax())]}' is in both validation_values and "
                "test_values, expected one of them"
            )
        of_key = np.where(matches[TEST], TEST, np.where(matches[VALIDATION], VALIDATION, TRAIN)).astype(np.uint8)
        splits[at : at + len(codes)] = of_key[codes]
        at += len(codes)
        some = some or keys.head(20).to_list()
    for meant in sides.values():
        for value in meant.unseen:
            known = did_you_mean(value, some)
            raise UserError(f"split by column {config.split_column}: no row holds '{value}'{known}")
    return splits


class _Meant:
    """Which keys a field of the configuration selects, over all chunks."""

    def __init__(self, column: str, field: str, values: Values) -> None:
        self._where, self._values = f"split by column {column}, {field}", values
        self.unseen = [*values.exact, *([values.range] if values.bounds else [])]
        self._zones: set[str] = set()

    def __call__(self, keys: pl.Series) -> NDArray[np.bool_]:
        """bool [keys]."""
        meant = keys.is_in(list(self._values.exact))
        if self.unseen:
            known = set(keys.filter(meant))
            self.unseen = [value for value in self.unseen if value not in known]
        if self._values.bounds:
            within = self._within(keys.cast(pl.String))
            if within.any():
                self.unseen = [value for value in self.unseen if value != self._values.range]
            meant = meant | within
        return meant.to_numpy()

    def _within(self, keys: pl.Series) -> pl.Series:
        compared, known = self._values.compared, keys != ""  # what is missing is in no range
        numbers, dates = keys.str.contains(NUMBERS), keys.str.contains(DATES + ZONE)
        wrong = known & {"numbers": ~numbers, "dates": ~dates, "text": numbers | dates}[compared or "text"]
        if wrong.any():
            held = keys.filter(wrong)[0]
            if compared == "text":
                kind = "a number" if re.match(NUMBERS, held) else "a date, as 2026-01-07"
                raise UserError(
                    f"{self._where}: the bound of '{self._values.range}' is text, but a row holds '{held}', expected "
                    f"{kind} after the operator"
                )
            expected = {"numbers": "a number", "dates": "a date such as 2026-01-07"}
            raise UserError(
                f"{self._where}: '{self._values.range}' compares {compared}, but a row holds '{held}', expected "
                f"{expected[compared or 'numbers']}"
            )
        if compared == "dates":
            self._require_one_zone(keys.filter(known))
        for operator, bound in self._values.bounds:
            known = known & _compare(keys, operator, bound, compared or "text")
        return known

    def _require_one_zone(self, keys: pl.Series) -> None:
        self._zones |= set(keys.str.replace(DATES, "").unique())
        if len(self._zones) > 1:
            zones = " and ".join(f"'{zone}'" for zone in sorted(self._zones)[:2])
            raise UserError(f"{self._where}: the column has times in several time zones, {zones}, expected one")


def _compare(keys: pl.Series, operator: str, bound: str, compared: str) -> pl.Series:
    holds = _COMPARE[operator]
    if compared == "numbers":
        number = float(bound)
        holding = holds(keys.cast(pl.Float64, strict=False), number)
        if number.is_integer() and abs(number) < 2.0**63:
            # Exactly, where a float would not be.
            whole = int(bound) if bound.lstrip("+-").isdigit() else int(number)
            exactly = holds(keys.cast(pl.Int64, strict=False), whole)
            holding = exactly.zip_with(exactly.is_not_null(), holding)
        return holding.fill_null(False)
    if compared == "dates":
        # A day stands for all of it: 2026-01-07 12:00 is <=2026-01-07.
        bound = bound.replace("T", " ")
        keys = keys.str.replace("T", " ", literal=True).str.slice(0, len(bound))
    return holds(keys, bound).fill_null(False)


def _values(config: PrepareConfig) -> dict[str, Any]:
    return {"validation_values": list(config.validation_values), "test_values": list(config.test_values)}
