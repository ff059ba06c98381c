"""A dataset folder: its columns, table sizes and splits."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dqrm import checksums
from dqrm.data import folder
from dqrm.data.batches import Batch, Split
from dqrm.errors import UserError
from dqrm.files import COUNT, FLAG, NUMBER, OBJECT, POSITIVE, TEXT, Kind, problem
from dqrm.options import did_you_mean

if TYPE_CHECKING:
    from dqrm.data.hashing import HashedRows
    from dqrm.data.vocabulary import Vocabulary

__all__ = ["Batch", "Column", "Dataset", "Split"]

_PER_SPLIT = dict.fromkeys(folder.SPLITS, COUNT)
_SHARE = Kind("a number of 0 or more and below 1", lambda value: NUMBER.holds(value) and 0 <= value < 1)
_SHAPE = {
    "format_version": COUNT,
    "fingerprint": TEXT,
    "schema": {
        "dense": [TEXT],
        "columns": [{"name": TEXT, "rows": POSITIVE, "multi": FLAG, "vocabulary": (TEXT, None)}],
    },
    "split": OBJECT,
    "rows": _PER_SPLIT,
    "clicks": _PER_SPLIT,
    "weights?": {"*": NUMBER},
    "vocabulary_digest?": TEXT,
    "lineage?": {
        "day": COUNT,
        "ancestors": [{"day": COUNT, "fingerprint": TEXT, "vocabulary_digest": (TEXT, None), "table_rows": [POSITIVE]}],
    },
    "options?": ({"subsample_negatives?": _SHARE}, None),
    "files?": {"*": {"bytes": COUNT, "sha256": TEXT}},
}
# Entries looked at in one piece by `validate`.
_SCAN = 1 << 20


@dataclass(frozen=True)
class Column:
    """A categorical column and the rows of its table (row 0: unseen or rare). `multi`: several ids per cell."""

    name: str
    rows: int
    multi: bool = False


class Dataset:
    """A dataset folder, opened.

    Attributes:
        path: the folder.
        info: the content of its dataset.json.
        dense: names of the dense columns.
        columns: the categorical columns in the order of the model's tables, single-valued ones first.
        table_rows: rows of each table, in that order.
        num_single: number of single-valued columns.
        weight: the column of weights, or None.
        group: the column of groups, or None.
        rows: rows per split.
        fingerprint: hexadecimal digest of everything that decides the contents.
        vocabulary_digest: the same of columns and vocabularies alone; None in folders of older versions.
        day: number of datasets before it that it extends, one by one. ancestors: these, oldest first: each with day,
            fingerprint, vocabulary_digest and table_rows.
        hashed: whether ids are hashed to table rows, without vocabularies.

    Raises:
        UserError: no such folder, not a dataset folder, another format version, a missing or wrongly sized file.
    """

    @classmethod
    def of(cls, data: "Dataset | str | Path") -> "Dataset":
        """A dataset, or that of a folder."""
        return data if isinstance(data, Dataset) else cls(data)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = _read_info(self.path)
        self._take(self.info)
        # Of the stored ids, and the day as of which they are seen.
        self._stored = self.columns
        self._day: int | None = None
        self._check_files()

    def split(self, name: str) -> Split:
        """One split, memory-mapped.

        Raises:
            UserError: no split of that name.
        """
        if name not in folder.SPLITS:
            raise UserError(f"no split '{name}' in {self.path}{did_you_mean(name, folder.SPLITS)}")
        known = None if self._day is None else self._known
        return Split(self.path, name, self.info, known)

    def as_of(self, day: int, table_rows: Sequence[int]) -> "Dataset":
        """This dataset as a model reads it whose vocabularies are those of `day`, with tables of `table_rows` rows.

        The same folder; ids whose rows are newer, or were given to other ids since, are row 0 in batches and absent
        from vocabularies. `Split.newer_ids` counts them.
        """
        view, columns = copy.copy(self), self.info["schema"]["columns"]
        narrowed = [{**column, "rows": rows} for column, rows in zip(columns, table_rows, strict=True)]
        view.info = {**self.info, "schema": {**self.info["schema"], "columns": narrowed}}
        view._take(view.info)
        view._day = day
        return view

    @property
    def narrowed(self) -> bool:
        """Whether it is seen as of an earlier day."""
        return self._day is not None

    def row_maps(self) -> "list[Vocabulary] | list[HashedRows]":
        """Per categorical column, what maps keys to table rows: the vocabularies, or the hash.

        Raises:
            UserError: as `vocabulary`.
        """
        from dqrm.data.hashing import HashedRows

        hashed = HashedRows.of_columns(self.info["schema"]["columns"])
        return [self.vocabulary(number) for number in range(len(self.columns))] if hashed is None else hashed

    def vocabulary(self, number: int) -> "Vocabulary":
        """The vocabulary of categorical column `number`, in memory.

        Raises:
            UserError: its file is missing or damaged, or of another size than the table.
        """
        vocabulary = self._vocabulary(number)
        return vocabulary if self._day is None else vocabulary.as_of(self._day, self.columns[number].rows)

    def _vocabulary(self, number: int) -> "Vocabulary":
        from dqrm.data.vocabulary import Vocabulary

        column = self._stored[number]
        path = self.vocabulary_path(column.name)
        vocabulary = Vocabulary.read(path)
        if vocabulary.rows != column.rows:
            raise UserError(f"{path} is damaged: it is of a table of {vocabulary.rows} rows, expected {column.rows}")
        return vocabulary

    def _known(self, number: int) -> "np.ndarray[Any, np.dtype[np.bool_]] | None":
        """Which rows of a column's stored table a model of the earlier day has, bool [rows]; None: all."""
        vocabulary = self._vocabulary(number)
        if vocabulary.since is None:
            return None
        known = np.zeros(vocabulary.rows, bool)
        known[0] = True
        known[vocabulary.table_rows[vocabulary.since <= self._day]] = True
        return known

    @property
    def subsample_negatives(self) -> float:
        """Share of the rows with label 0 that were dropped at random, in all splits; 0.0: none."""
        return self._subsample_negatives

    @property
    def mean_weight(self) -> float | None:
        """Mean weight of the training rows; None where rows have no weights."""
        total = (self.info.get("weights") or {}).get("train")
        return None if total is None or not self.rows["train"] else total / self.rows["train"]

    def vocabulary_path(self, column: str) -> Path:
        """The Parquet file of a column's vocabulary, with the columns key, row and count.

        Raises:
            UserError: no categorical column of that name.
        """
        for entry in self.info["schema"]["columns"]:
            if entry["name"] == column:
                if entry["vocabulary"] is None:
                    raise UserError(f"{self.path} has no vocabularies: its ids are hashed ({entry['hash']})")
                return self.path / entry["vocabulary"]
        known = (known.name for known in self.columns)
        raise UserError(f"no categorical column '{column}' in {self.path}{did_you_mean(column, known)}")

    def wide(self, above: float) -> dict[str, float]:
        """The dense columns that hold a value of a larger magnitude, and the largest one, transformed as they are."""
        largest = self.info.get("dense_largest")
        if not isinstance(largest, list) or len(largest) != len(self.dense):  # a folder from before it was noted
            largest = [0.0] * len(self.dense)
            for piece in _pieces(self.split("train").arrays[folder.DENSE]):
                largest = np.maximum(largest, np.abs(piece).max(axis=0)).tolist()
        return {name: value for name, value in zip(self.dense, largest) if value > above}

    def describe(self) -> dict[str, Any]:
        """What `dqrm info` prints, ready for JSON."""
        hidden = ("schema", "lineage", checksums.FILES, checksums.SEAL)
        shown = {key: value for key, value in self.info.items() if key not in hidden}
        return {
            "path": str(self.path),
            "kind": "dataset",
            "checksums": checksums.FILES in self.info,
            **shown,
            "click_rate": {
                name: self.info["clicks"][name] / rows if rows else None for name, rows in self.rows.items()
            },
            "dense_columns": len(self.dense),
            "tables": len(self.columns),
            "table_rows": sum(self.table_rows),
            **self._changes(),
            "schema": self.info["schema"],
        }

    def _changes(self) -> dict[str, Any]:
        """What became of table rows on the last day, over all tables, for a dataset that extends another."""
        if "lineage" not in self.info:
            return {}
        tables, names = self.info["lineage"]["tables"], ("new", "reused", "freed", "vacant", "rare")
        summed = {name: sum(table[name] for table in tables) for name in names}
        return {"day": self.day, "extends": self.ancestors[-1]["fingerprint"], "changes": summed}

    def validate(self, *splits: str) -> None:
        """Check every value of the given splits (default: all), in pieces.

        Raises:
            UserError: an id outside its table, a dense value that is not finite, a label other than 0 and 1, a weight
                that is negative or not finite, or a group below -1.
        """
        for name in splits or folder.SPLITS:
            arrays = self.split(name).arrays
            where = f"{self.path}, split {name}"
            for piece in _pieces(arrays[folder.LABEL]):
                if piece.max() > 1:
                    raise UserError(f"{where}: the label {piece.max()} is neither 0 nor 1; prepare the data again")
            for piece in _pieces(arrays[folder.DENSE]):
                finite = np.isfinite(piece).all(axis=0)
                if not finite.all():
                    bad = self.dense[int(np.argmin(finite))]
                    raise UserError(f"{where}: column {bad} holds a number that is not finite; prepare the data again")
            for piece in _pieces(arrays.get(folder.WEIGHT, np.empty(0, np.float32))):
                if not (piece >= 0).all() or not np.isfinite(piece).all():
                    raise UserError(f"{where}: a weight is negative or not finite; prepare the data again")
            for piece in _pieces(arrays.get(folder.GROUP, np.empty(0, np.int32))):
                if piece.min() < -1:
                    raise UserError(f"{where}: the group {piece.min()} is below -1; prepare the data again")
            for piece in _pieces(arrays[folder.IDS]):
                for column, low, high in zip(self._stored, piece.min(axis=0), piece.max(axis=0)):
                    _check_range(where, column, int(low), int(high))
            for number, column in enumerate(self._stored):
                if column.multi:
                    for piece in _pieces(arrays[folder.values_file(number)]):
                        _check_range(where, column, int(piece.min()), int(piece.max()))
                    offsets = arrays[folder.offsets_file(number)]
                    values = len(arrays[folder.values_file(number)])
                    rising = all((np.diff(piece) >= 0).all() for piece in _pieces(offsets, overlap=1))
                    if offsets[0] != 0 or offsets[-1] != values or not rising:
                        raise UserError(f"{where}: damaged offsets of column {column.name}; prepare the data again")

    def verify(self, *names: str, tell: Callable[[str, int, int | None], None] | None = None) -> bool:
        """Compare files with their checksums: all, or those of the named splits and of `vocabulary`.

        Files that did not change since this process compared them are not read again. A folder that was written
        without checksums passes, with a warning (`dqrm.errors.NotVerified`).

        Args:
            tell: progress, as tell(stage, bytes done, bytes in all).

        Returns:
            False if the folder was written without checksums.

        Raises:
            UserError: a file that is missing or damaged; names it.
        """
        wanted = names or (*folder.SPLITS, "vocabulary")
        for name in wanted:
            if name not in (*folder.SPLITS, "vocabulary"):
                raise UserError(f"no split '{name}' in {self.path}{did_you_mean(name, folder.SPLITS)}")
        files = [
            f"{name}/{file}" for name in folder.SPLITS if name in wanted for file in folder.arrays(self.info, name)
        ]
        if "vocabulary" in wanted:
            named = [column["vocabulary"] for column in self.info["schema"]["columns"] if column["vocabulary"]]
            rare = [folder.rare_file(name) for name in named]
            files += [*named, *(name for name in rare if name in self.info.get(checksums.FILES, {}))]
        then = "prepare the data again, or use it as it is with --no-verify"
        return checksums.verify(self.path, self.info, files, folder.INFO, then, tell)

    def _take(self, info: dict[str, Any]) -> None:
        schema = info["schema"]
        self.dense: tuple[str, ...] = tuple(schema["dense"])
        self.columns = tuple(Column(column["name"], column["rows"], column["multi"]) for column in schema["columns"])
        self.table_rows = tuple(column.rows for column in self.columns)
        self.num_single = sum(not column.multi for column in self.columns)
        self.weight: str | None = schema.get("weight")
        self.group: str | None = schema.get("group")
        self.rows: dict[str, int] = {name: info["rows"][name] for name in folder.SPLITS}
        self.fingerprint: str = info["fingerprint"]
        self.vocabulary_digest: str | None = info.get("vocabulary_digest")
        lineage = info.get("lineage") or {"day": 0, "ancestors": []}
        self.day: int = lineage["day"]
        self.ancestors: list[dict[str, Any]] = lineage["ancestors"]
        self.hashed = schema.get("vocabulary") == "hash"
        self._subsample_negatives = float((info.get("options") or {}).get("subsample_negatives", 0.0))

    def _check_files(self) -> None:
        for name in folder.SPLITS:
            for file, (dtype, shape) in folder.arrays(self.info, name).items():
                path, expected = self.path / name / file, dtype.itemsize * int(np.prod(shape))
                if not path.is_file():
                    raise UserError(f"{self.path} is incomplete: {name}/{file} is missing; prepare the data again")
                if path.stat().st_size != expected:
                    raise UserError(
                        f"{self.path} is damaged: {name}/{file} has {path.stat().st_size} bytes, "
                        f"expected {expected}; prepare the data again"
                    )


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder, expected a dataset folder made by 'dqrm prepare'")
    try:
        info = json.loads((path / folder.INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no {folder.INFO}, expected a dataset folder made by 'dqrm prepare'") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / folder.INFO} cannot be read ({error}); prepare the data again") from None
    version = info.get("format_version") if isinstance(info, dict) else None
    if version not in folder.KNOWN_VERSIONS:
        raise UserError(
            f"{path} has format version {version}, this dqrm reads versions "
            f"{' and '.join(map(str, folder.KNOWN_VERSIONS))}; "
            "prepare the data again"
        )
    wrong = problem(info, _SHAPE)
    if not wrong and any(not column.get("hash") for column in info["schema"]["columns"]):
        wrong = problem(info, {"schema": {"columns": [{"vocabulary": TEXT}]}})
    multi = [] if wrong else [column["name"] for column in info["schema"]["columns"] if column["multi"]]
    if multi:
        wrong = problem(info, {"values": {split: {"*": COUNT} for split in folder.SPLITS}})
        missing = [name for name in multi for split in folder.SPLITS if not wrong and name not in info["values"][split]]
        wrong = f"lacks the number of values of column {missing[0]}" if missing else wrong
    if not wrong and not checksums.sealed(info):
        wrong = "does not match its own checksum"
    if wrong:
        raise UserError(f"{path} is damaged: its {folder.INFO} {wrong}; prepare the data again")
    return info


def _pieces(array: np.ndarray[Any, Any], overlap: int = 0) -> Any:
    """Parts of at most about a million entries, never empty; `overlap` entries are shared with the part before."""
    if array.size == 0:
        return
    step = max(1, _SCAN // max(1, array.size // len(array)))
    for at in range(0, len(array), step):
        yield array[max(0, at - overlap) : at + step]


def _check_range(where: str, column: Column, low: int, high: int) -> None:
    if low < 0 or high >= column.rows:
        wrong = low if low < 0 else high
        raise UserError(
            f"{where}: column {column.name} holds the id {wrong}, but its table has {column.rows} rows "
            f"(ids 0 to {column.rows - 1}); prepare the data again"
        )
