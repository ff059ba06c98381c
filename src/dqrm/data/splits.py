"""Which split each row belongs to. 0: train, 1: validation, 2: test, as in `folder.SPLITS`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqrm.data.config import PrepareConfig
from dqrm.data.sources import Source
from dqrm.data.staging import Staging
from dqrm.errors import UserError
from dqrm.options import did_you_mean

TRAIN, VALIDATION, TEST = range(3)
Splits = NDArray[np.uint8]


def assign(config: PrepareConfig, sources: Sequence[Source], staged: Staging) -> Splits:
    """The split of every row, uint8 [rows].

    Raises:
        UserError: the rule cannot be applied to these files, or leaves nothing for training.
    """
    rule, rows = config.split_rule, sum(staged.rows)
    if rule == "column":
        splits = _by_column(config, staged, rows)
    elif rule == "file":
        splits = _by_file(config, sources, rows)
    elif rule == "time" and config.layout == "criteo-kaggle":
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
    elif rule == "file" and (config.validation_values or config.test_values):
        chosen = _values(config)
    elif rule == "file":
        chosen = {"test": "first half of the last file", "validation": "second half of the last file"}
    elif rule == "time" and config.layout == "criteo-kaggle":
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
                f"the split by file needs two files or more, got only {sources[0].name}; give all or split otherwise"
            )
        return _runs(rows, *_halves(sources[-1].rows))
    splits, at = np.zeros(rows, np.uint8), 0
    for source in sources:
        for split, patterns in ((VALIDATION, config.validation_values), (TEST, config.test_values)):
            if any(fnmatchcase(source.name, pattern) for pattern in patterns):
                splits[at : at + source.rows] = split
        at += source.rows
    for pattern in (*config.validation_values, *config.test_values):
        names = [source.name for source in sources]
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"split by file: no file is named '{pattern}'{did_you_mean(pattern, names)}")
    return splits


def _by_column(config: PrepareConfig, staged: Staging, rows: int) -> Splits:
    chosen = dict.fromkeys(config.validation_values, VALIDATION) | dict.fromkeys(config.test_values, TEST)
    splits, at = np.zeros(rows, np.uint8), 0
    seen: set[str] = set()
    some: list[str] = []
    for keys, codes, _ in staged.codes(len(staged.columns) - 1):
        of_key = np.array([chosen.get(key, TRAIN) for key in keys], np.uint8)
        splits[at : at + len(codes)] = of_key[codes]
        at += len(codes)
        seen |= chosen.keys() & set(keys)
        some = some or keys.head(20).to_list()
    for value in chosen:
        if value not in seen:
            known = did_you_mean(value, some)
            raise UserError(f"split by column {config.split_column}: no row holds '{value}'{known}")
    return splits


def _values(config: PrepareConfig) -> dict[str, Any]:
    return {"validation_values": list(config.validation_values), "test_values": list(config.test_values)}
