"""Raw logs -> dataset folder, streaming: read and stage, split, count ids, write. Nothing partial looks complete."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dqrm.data import encode, folder, ingest, splits
from dqrm.data.columns import Plan, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.sources import Source, resolve
from dqrm.data.staging import Staging
from dqrm.errors import UserError
from dqrm.files import flush, write_json

Progress = Callable[[str, int, int | None], None]
DEFAULTS = PrepareConfig()


def prepare(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    config: PrepareConfig = DEFAULTS,
    progress: Progress | None = None,
) -> Dataset:
    """Writes the dataset folder `output` from logs.

    sources: files, or globs of them. progress: called with what is being done, how much of it is done, and of how much.
    All is written to `<output>.partial` first, which is removed on failure and renamed at the end.

    Raises:
        UserError: a file, column or line that is not as it should be, or an output that exists.
    """
    output = Path(output)
    tell: Progress = progress or (lambda what, done, total: None)
    _check_output(output)
    files, plan = resolve([sources] if isinstance(sources, (str, Path)) else sources), make_plan(config)
    ingest.check(files, plan)
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {partial}: {error.strerror}") from None
    try:
        _fill(partial, files, plan, tell)
        os.replace(partial, output)
        flush(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {partial}: {error.strerror}") from error
        raise
    return Dataset(output)


def _fill(path: Path, files: list[Source], plan: Plan, tell: Progress) -> None:
    config, work = plan.config, path / "staging"
    staged = Staging(work, plan)
    try:
        total, read = sum(file.path.stat().st_size for file in files), _Steps(tell, "reading")
        dropped = ingest.ingest(files, plan, staged, lambda count: read(count, total))
        if not sum(staged.rows):
            raise UserError(f"no row in {', '.join(file.name for file in files[:3])}, expected at least one")
        assigned = splits.assign(config, files, staged)
        (path / "vocabulary").mkdir()
        columns: list[dict[str, Any]] = []
        translated = []
        for number, key in enumerate(plan.keys):
            tell("counting ids", number, len(plan.keys))
            vocabulary = encode.build_vocabulary(
                staged, number, assigned, config.vocabulary == "train", config.min_count
            )
            file = folder.vocabulary_file(number, key.name)
            vocabulary.write(path / file)
            translated.append(work / f"{number}.i32")
            encode.translate(staged, number, vocabulary, translated[-1])
            columns.append(
                {
                    "name": key.name,
                    "rows": vocabulary.rows,
                    "multi": key.multi,
                    "parts": list(key.parts),
                    "key": key.kind,
                    "hash": key.hash_name() if config.max_rows_per_table is not None else None,
                    "vocabulary": file,
                }
            )
        tell("counting ids", len(plan.keys), len(plan.keys))
        wrote = _Steps(tell, "writing")
        writers = encode.write_splits(staged, assigned, translated, path, lambda count: wrote(count, sum(staged.rows)))
    finally:
        staged.close()
    shutil.rmtree(work)
    info = _info(plan, files, columns, writers, dropped)
    write_json(path / folder.INFO, info)
    flush(path)


def _info(
    plan: Plan, files: list[Source], columns: list[dict[str, Any]], writers: list[encode.Writer], dropped: int
) -> dict[str, Any]:
    config = plan.config
    by_split = dict(zip(folder.SPLITS, writers))
    info: dict[str, Any] = {
        "format_version": folder.FORMAT_VERSION,
        "schema": {
            "layout": config.layout,
            "label": plan.needed[0],
            "dense": list(plan.dense),
            "dense_transform": config.dense_transform,
            "columns": columns,
            "vocabulary": config.vocabulary,
            "min_count": config.min_count,
            "max_rows_per_table": config.max_rows_per_table,
            "multi_separator": config.multi_separator if config.multi else None,
        },
        "split": splits.describe(config),
        "rows": {name: writer.rows for name, writer in by_split.items()},
        "clicks": {name: writer.clicks for name, writer in by_split.items()},
        "values": {
            name: {columns[number]["name"]: count for number, count in writer.values.items()}
            for name, writer in by_split.items()
        },
        "negatives_dropped": dropped,
        "lines_skipped": sum(file.skipped for file in files),
        "sources": [file.describe() for file in files],
        # The number of rows at a time changes nothing in the result.
        "options": {key: value for key, value in dataclasses.asdict(config).items() if key != "chunk_rows"},
    }
    # Names of files may change without the data changing.
    hashed = {**info, "sources": [{k: v for k, v in file.describe().items() if k != "name"} for file in files]}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {
        "format_version": info.pop("format_version"),
        "dqrm_version": _version(),
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        **info,
    }


class _Steps:
    """Sums steps up for a progress callback."""

    def __init__(self, tell: Progress, what: str) -> None:
        self._tell, self._what, self._done = tell, what, 0

    def __call__(self, count: int, total: int) -> None:
        self._done += count
        self._tell(self._what, self._done, total)


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} exists and is not empty, expected the name of a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} exists and is a file, expected the name of a new folder")


def _version() -> str:
    try:
        return importlib.metadata.version("dqrm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
