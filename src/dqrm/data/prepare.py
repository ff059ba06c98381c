"""Raw logs -> dataset folder, streaming: read and stage, split, count ids, write. Nothing partial looks complete."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from dqrm import __version__, checksums
from dqrm.data import encode, folder, formats, ingest, numbering, splits
from dqrm.data.columns import Plan, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.extension import Extended, complete_config
from dqrm.data.listing import reads, require_same_files
from dqrm.data.sources import Source, total_size
from dqrm.data.staging import Staging
from dqrm.data.tables import TableSource, as_list, gather
from dqrm.errors import UserError
from dqrm.files import claim, flush, why_not_written, write_json

# Lies in a folder that is being written, locked while its process lives: what has it may be deleted.
MARKER = ".dqrm-preparing"
Progress = Callable[[str, int, int | None], None]
# Columns with one number for each row beside the model's.
_PER_ROW = ("weight", "group")
# Recorded where they are not the default: datasets without them stay what they were.
_OPTIONAL = {"weight": None, "group": None, "count_decay": 1.0, "evict_after": None, "rows": None,
             "column_rows": (), "hashes": 1}  # fmt: skip
# Of no effect on the result, or recorded in another way.
_UNRECORDED = ("chunk_rows", "extend")


def prepare(
    sources: Any,
    output: str | Path,
    config: PrepareConfig | None = None,
    progress: Progress | None = None,
    extend: str | Path | None = None,
) -> Dataset:
    """Write the dataset folder `output` from logs.

    Everything is written to `<output>.partial`, which is locked meanwhile, removed on failure and renamed at the end.

    Args:
        sources: files, folders, globs of them, pipes (`-`: standard input), or tables in memory (polars or pandas
            DataFrames, Arrow tables and datasets), alone or in a list.
        output: the folder to create.
        config: columns, split and vocabularies; None: the defaults, or where `extend` is given those of that dataset.
        progress: called as progress(stage, done, total); total is None if unknown.
        extend: the dataset folder of the days before, as `PrepareConfig.extend`.

    Returns:
        The dataset, opened.

    Raises:
        UserError: an invalid file, column or line, an output that exists, or one that is being written; a dataset to
            extend that is damaged or has other columns or options.
    """
    output, config = Path(output), complete_config(config, extend)
    tell: Progress = progress or (lambda what, done, total: None)
    _check_output(output)
    given = as_list(sources)
    found = gather(given)
    files = formats.arrange(found, config)
    plan = make_plan(ingest.with_fields(files, config))
    extended = Extended(plan.config) if config.extend is not None else None
    if extended is not None:
        plan = dataclasses.replace(plan, key_version=extended.key_version)
    ingest.check(files, plan)
    # A link to a folder means the folder: a folder cannot be renamed onto a link.
    target = output.resolve()
    partial = target.with_name(target.name + ".partial")
    for file in found:
        if partial in file.path.resolve().parents:
            raise UserError(
                f"{file.path} is in {partial}, which is emptied for the work; move it, or name another output"
            )
    with _replacing(target, partial):
        _check_output(output)  # a run that ended meanwhile may have filled it
        named = [item for item in given if isinstance(item, (str, Path))]
        if (text := reads(named, partial)) is not None:
            raise UserError(f"{output} would be in the log itself, '{text}'; name an output outside of it")
        _fill(partial, files, plan, extended, tell)
        require_same_files(named, [file for file in found if not isinstance(file, TableSource)])
    return Dataset(output)


@contextmanager
def _replacing(target: Path, partial: Path) -> Iterator[None]:
    """The folder `partial`, locked and empty: it becomes `target` at the end, or is removed if anything goes wrong."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial)
    except OSError as error:
        raise UserError(f"cannot write to {partial}: {why_not_written(error)}") from None
    moved = False
    try:
        yield
        os.replace(partial, target)
        moved = True
        (target / MARKER).unlink()
        flush(target.parent)
    except BaseException as error:
        # Asked before there is room again.
        why = why_not_written(error, target.parent) if isinstance(error, OSError) else ""
        if not moved:  # then what bears its name now is another run's
            _remove(partial)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {partial}: {why}; nothing of it was kept") from error
        raise
    finally:
        lock.close()


def _claim(partial: Path) -> IO[bytes]:
    """Make the folder, or empty what a dead run left, and lock it until the result is closed.

    Raises:
        UserError: it is somebody else's, or another run is writing it.
    """
    marker = partial / MARKER
    try:
        partial.mkdir()
    except FileExistsError:
        ours = partial.is_dir() and not partial.is_symlink() and (marker.is_file() or not any(partial.iterdir()))
        if not ours:
            raise UserError(
                f"{partial} is not empty and was not created by dqrm prepare; move it, or name another output"
            ) from None
    lock = marker.open("ab")
    try:
        _lock(lock, partial)
        _empty(partial)
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(file: IO[bytes], partial: Path) -> None:
    busy = f"another dqrm prepare is writing to {partial}; wait for it, or name another output"
    gone = f"another dqrm prepare has just written to {partial}; look at its output, or name another one"
    if not claim(file, partial / MARKER, busy, gone):
        file.close()  # Windows renames no folder with an open file in it


def _empty(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


def _remove(partial: Path) -> None:
    """The marker goes last, so that no other run takes the folder while it is being emptied."""
    with suppress(OSError):
        _empty(partial)
        (partial / MARKER).unlink()
        partial.rmdir()


def _fill(path: Path, files: list[Source], plan: Plan, extended: Extended | None, tell: Progress) -> None:
    config, work = plan.config, path / "staging"
    staged = Staging(work, plan)
    try:
        total, read = total_size(files), _Steps(tell, "reading")
        dropped = ingest.ingest(files, plan, staged, lambda count: read(count, total))
        if not sum(staged.rows):
            raise UserError(f"no row in {', '.join(file.name for file in files[:3])}, expected at least one")
        assigned = splits.assign(config, files, staged)
        made = numbering.number(staged, assigned, plan, path, work, extended, tell)
        wrote = _Steps(tell, "writing")
        writers = encode.write_splits(
            staged, assigned, made.translated, path, lambda count: wrote(count, sum(staged.rows))
        )
    finally:
        staged.close()
    if plan.weight is not None and writers[splits.TRAIN].weight == 0:
        raise UserError(f"the weights in column {plan.weight} of all training rows are 0: nothing to train on")
    shutil.rmtree(work)
    info = _info(plan, files, made, writers, dropped, extended)
    written = [f"{name}/{file}" for name in folder.SPLITS for file in folder.arrays(info, name)]
    info[checksums.FILES] = checksums.list_files(path, [*written, *made.files], tell)
    write_json(path / folder.INFO, checksums.seal(info))


def _info(
    plan: Plan,
    files: list[Source],
    made: numbering.Numbering,
    writers: list[encode.Writer],
    dropped: int,
    extended: Extended | None,
) -> dict[str, Any]:
    by_split = dict(zip(folder.SPLITS, writers))
    info: dict[str, Any] = {
        "format_version": folder.GROWING_VERSION if extended or plan.hashing else folder.FORMAT_VERSION,
        "schema": _schema(plan, made.columns),
        "split": splits.describe(plan.config),
        "rows": {name: writer.rows for name, writer in by_split.items()},
        "clicks": {name: writer.clicks for name, writer in by_split.items()},
        "values": {
            name: {made.columns[number]["name"]: count for number, count in writer.values.items()}
            for name, writer in by_split.items()
        },
        "dense_largest": np.max([w.largest for w in writers if w.largest is not None], axis=0).tolist(),
        "negatives_dropped": dropped,
        "lines_skipped": sum(file.skipped for file in files),
        "sources": [file.describe() for file in files],
        "options": _options(plan.config),
    }
    if plan.weight is not None:
        info["weights"] = {name: writer.weight for name, writer in by_split.items()}
    if extended is not None:
        info["lineage"] = extended.lineage(made.tables)
    # Names of files may change without the data changing.
    hashed = {**info, "sources": [{k: v for k, v in file.describe().items() if k != "name"} for file in files]}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {
        "format_version": info.pop("format_version"),
        "dqrm_version": __version__,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "vocabulary_digest": made.digest(plan),
        **info,
    }


def _schema(plan: Plan, columns: list[dict[str, Any]]) -> dict[str, Any]:
    config = plan.config
    return {
        "layout": config.layout,
        "label": plan.needed[0],
        "dense": list(plan.dense),
        "dense_transform": config.dense_transform,
        "columns": columns,
        "vocabulary": config.vocabulary,
        "min_count": config.min_count,
        "max_rows_per_table": config.max_rows_per_table,
        "multi_separator": config.multi_separator if config.multi else None,
        **_given(config),
    }


def _options(config: PrepareConfig) -> dict[str, Any]:
    recorded = {name: value for name, value in dataclasses.asdict(config).items() if name not in _UNRECORDED}
    return {name: value for name, value in recorded.items() if name not in _OPTIONAL or value != _OPTIONAL[name]}


def _given(config: PrepareConfig) -> dict[str, str]:
    """The columns of weights and groups, where there are any: other datasets stay what they were."""
    return {name: value for name in _PER_ROW if (value := getattr(config, name)) is not None}


class _Steps:
    """Running sum of steps for a progress callback."""

    def __init__(self, tell: Progress, what: str) -> None:
        self._tell, self._what, self._done = tell, what, 0

    def __call__(self, count: int, total: int | None) -> None:
        self._done += count
        self._tell(self._what, self._done, total)


def _check_output(output: Path) -> None:
    try:
        target = output.resolve()
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{output} exists and is not empty, expected the name of a new folder")
        if target.exists() and not target.is_dir():
            raise UserError(f"{output} exists and is a file, expected the name of a new folder")
        # Another folder takes its place at the end, which would leave the shell in one that is deleted.
        if target == Path.cwd():
            raise UserError(f"{output} is the current folder, expected the name of a new one such as ./data")
        above = next(parent for parent in target.parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"cannot write to {output}: {above} is a file, expected a folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to themselves
        raise UserError(f"cannot write to {output}: {getattr(error, 'strerror', None) or error}") from None
