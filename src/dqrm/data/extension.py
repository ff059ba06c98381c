"""A dataset of one day that extends that of the day before: the options it takes over, and the rows it starts from."""

import dataclasses
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dqrm.data import folder, growth
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.growth import Grown, Policy
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import NotVerified, UserError
from dqrm.options import build, coerce

# What decides columns, keys and tables, and the base rate that models are corrected to.
_SAME = (
    "layout", "label", "dense", "categorical", "multi", "cross", "null_values", "dense_transform", "max_rows_per_table",
    "vocabulary", "subsample_negatives",
)  # fmt: skip
# Taken over as a whole or not at all: one without the others is another rule.
_SPLIT = ("split", "validation_fraction", "test_fraction", "split_column", "validation_values", "test_values")


def prepare_config(given: Mapping[str, Any], where: str) -> PrepareConfig:
    """The configuration of the given fields; those not given are the extended dataset's, if there is one.

    Raises:
        UserError: as `build`; no dataset folder, or one that does not record its options.
    """
    path = coerce("extend", given.get("extend"), str | None)
    if path is None:
        return build(PrepareConfig, given, where)
    inherited = _options(Dataset(path))
    if any(name in given for name in _SPLIT):
        inherited = {name: value for name, value in inherited.items() if name not in _SPLIT}
    return build(PrepareConfig, {**inherited, **given}, where)


def complete_config(config: PrepareConfig | None, extend: str | Path | None) -> PrepareConfig:
    """The configuration that `dqrm.prepare` is called with: None takes all options of the dataset to be extended.

    Raises:
        UserError: as `prepare_config`; both name a dataset to extend, and not the same.
    """
    if extend is None:
        return config or PrepareConfig()
    if config is None:
        return prepare_config({"extend": str(extend)}, "prepare")
    if config.extend not in (None, str(extend)):
        raise UserError(f"extend is '{extend}', but the configuration's is '{config.extend}'; expected one of them")
    return dataclasses.replace(config, extend=str(extend))


class Extended:
    """The dataset that is extended.

    Attributes:
        dataset: it. day: the number of the new day; the first dataset's is 0.

    Raises:
        UserError: it is damaged, or its columns or options are not those of the new dataset.
    """

    def __init__(self, config: PrepareConfig) -> None:
        assert config.extend is not None
        self.dataset = Dataset(config.extend)
        self._require_same(config)
        self.dataset.verify("vocabulary")
        self.day = self.dataset.day + 1
        self._policy = Policy(config.min_count, config.count_decay, config.evict_after)

    @cached_property
    def key_version(self) -> int:
        """The rules by which values become keys, which stay."""
        columns = self.dataset.info["schema"]["columns"]
        return min((column.get("key_version", 1) for column in columns), default=1)

    def grow(self, number: int, run: pl.DataFrame) -> Grown:
        """The vocabulary of column `number` with the keys of the new day."""
        known = self.dataset.vocabulary(number)
        if known.counts is None:
            raise UserError(f"{self.dataset.path} has no counts in its vocabularies; prepare it again")
        return growth.next_day(known, self._rare(number, known), run, self.day, self._policy)

    def lineage(self, tables: list[dict[str, int]]) -> dict[str, Any]:
        """For dataset.json: the day, the datasets before, oldest first, and what changed in each table."""
        parent = self.dataset
        own = {
            "day": parent.day,
            "fingerprint": parent.fingerprint,
            "vocabulary_digest": parent.vocabulary_digest,
            "table_rows": list(parent.table_rows),
        }
        return {"day": self.day, "ancestors": [*parent.ancestors, own], "tables": tables}

    def _rare(self, number: int, known: Vocabulary) -> pl.DataFrame:
        name = folder.rare_file(self.dataset.info["schema"]["columns"][number]["vocabulary"])
        if name in self.dataset.info.get("files", {}):
            return growth.read_rare(self.dataset.path / name, known.keys.dtype)
        return growth.rare_frame(known.keys[:0], known.table_rows[:0], None)

    def _require_same(self, config: PrepareConfig) -> None:
        path = self.dataset.path
        before = build(PrepareConfig, _options(self.dataset), str(path))
        for name in _SAME:
            got, wanted = getattr(config, name), getattr(before, name)
            if got != wanted:
                raise UserError(
                    f"{name} is {_told(got)}, but {path}, which is to be extended, was prepared with {_told(wanted)}; "
                    "prepare the log with the same columns and options, or without extend"
                )
        if before.min_count > 1 and self.dataset.vocabulary_digest is None:
            warnings.warn(
                NotVerified(
                    f"{path} was prepared by an older dqrm, which did not keep the counts of ids that were seen less "
                    f"often than min_count ({before.min_count}): these are counted from this day on"
                ),
                stacklevel=2,
            )


def _options(dataset: Dataset) -> dict[str, Any]:
    options = dataset.info.get("options")
    if not options:
        raise UserError(f"{dataset.path} does not record how its log was read; prepare it again")
    return dict(options)


def _told(value: Any) -> str:
    return f"'{','.join(map(str, value))}'" if isinstance(value, tuple) else f"'{value}'"
