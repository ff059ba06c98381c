"""Hugging Face datasets, from a folder of `save_to_disk` or from the local cache: `hf:FOLDER`, `hf:NAME[:CONFIG]`.
Needs the package datasets; nothing is downloaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from polars.selectors import by_name

from dqrm.data.tables import Table, TableSource
from dqrm.errors import UserError

PREFIX = "hf:"
# Splits in this order, others after them, so that a split by time has the test at the end.
_ORDER = ("train", "validation", "valid", "dev", "test")


def sources(text: str) -> list[TableSource]:
    """The splits of a dataset, each as a source that is called after its split.

    text: `hf:` and the folder of a saved dataset, or a name with its configuration after a colon.

    Raises:
        UserError: datasets is missing; there is no such dataset, or it is not in the cache.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{text} needs the package datasets: pip install 'dqrm[datasets]'") from None
    name = text.removeprefix(PREFIX)
    if not name:
        raise UserError(f"got '{text}', expected a folder or a name after it, as in hf:owner/name")
    loaded = _from_disk(datasets, name) if Path(name).exists() else _from_cache(datasets, name)
    splits = dict(loaded) if isinstance(loaded, Mapping) else {Path(name).name: loaded}
    ranks = {split: at for at, split in enumerate(_ORDER)}
    ordered = sorted(splits, key=lambda split: ranks.get(split, len(ranks)))
    return [
        TableSource(Path(split), True, f"{text}, split {split}", split, table=_table(splits[split]), in_memory=False)
        for split in ordered
    ]


def _from_disk(datasets: Any, folder: str) -> Any:
    try:
        return datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(f"{folder} is no dataset of save_to_disk ({' '.join(str(error).split())[:200]})") from None


def _from_cache(datasets: Any, name: str) -> Any:
    name, _, config = name.partition(":")
    try:
        with _offline(datasets):
            return datasets.load_dataset(name, config or None)
    except Exception as error:
        raise UserError(
            f"the dataset '{name}' cannot be read from the local cache ({' '.join(str(error).split())[:200]}); load it "
            "once with datasets.load_dataset, or give the folder of save_to_disk"
        ) from None


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Without a network, whatever the environment says."""
    from huggingface_hub import constants

    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def _table(dataset: Any) -> Table:
    def take(wanted: Sequence[str]) -> tuple[pl.Schema, Callable[[int], Iterator[pl.DataFrame]]]:
        part = dataset.select_columns(list(wanted)).with_format("arrow")

        def read(size: int) -> Iterator[pl.DataFrame]:
            for at in range(0, len(part), size):
                yield pl.DataFrame(part[at : at + size]).select(by_name(*wanted))

        return pl.DataFrame(part.features.arrow_schema.empty_table()).select(by_name(*wanted)).schema, read

    return Table(tuple(dataset.column_names), take)
