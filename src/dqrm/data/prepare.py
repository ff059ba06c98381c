"""Raw logs -> dataset folder, streaming: read and stage, split, count ids, write. Nothing partial looks complete."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dqrm.data import formats, ingest
from dqrm.data.budget import OverBudget
from dqrm.data.columns import Plan, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.extension import Extended, complete_config
from dqrm.data.listing import is_url, local, reads, require_same_files
from dqrm.data.sources import Source
from dqrm.data.tables import TableSource, as_list, gather
from dqrm.data.work import Progress, Work, describe_job, difference
from dqrm.errors import UserError
from dqrm.files import claim, flush, why_not_written

# Lies in a folder that is being written, locked while its process lives, and says what is being done: what has it may
# be deleted.
MARKER = ".dqrm-preparing"
Log = Callable[[str], None]


def prepare(
    sources: Any,
    output: str | Path,
    config: PrepareConfig | None = None,
    progress: Progress | None = None,
    extend: str | Path | None = None,
    log: Log | None = None,
) -> Dataset:
    """Write the dataset folder `output` from logs.

    Everything is written to `<output>.partial`, which is locked meanwhile, removed on failure and renamed at the end.
    What a killed or interrupted call left is resumed by the next one that has the same files and options, and deleted
    by any other.

    Args:
        sources: files, folders, globs of them, pipes (`-`: standard input), or tables in memory (polars or pandas
            DataFrames, Arrow tables and datasets), alone or in a list.
        output: the folder to create.
        config: columns, split and vocabularies; None: the defaults, or where `extend` is given those of that dataset.
        progress: called as progress(stage, done, total); total is None if unknown.
        extend: the dataset folder of the days before, as `PrepareConfig.extend`.
        log: called with a line of text, where something is resumed, or deleted to start over.

    Returns:
        The dataset, opened.

    Raises:
        UserError: an invalid file, column or line, an output that exists, or one that is being written; a dataset to
            extend that is damaged or has other columns or options.
        KeyboardInterrupt: Ctrl-C; what is done is kept, unless the sources can be read only once.
    """
    require_new(local_output(output))
    task = Task.of(sources, output, config, extend)
    ingest.check(task.files, task.plan)
    job = describe_job(task.files, task.plan, task.extended, 1)
    work = task.work(progress, 1)
    with _replacing(task.target, task.partial, job, log or (lambda line: None), work):
        task.require_free()
        if not work.finished:
            work.stage(1)
            work.merge()
            work.encode(1)
        work.finish()
        require_same_files(task.named, task.on_disk)
    return Dataset(task.output)


@dataclass
class Task:
    """What is to be prepared.

    given: the sources as they were named, found: what they are, files: what of it the layout reads together. target:
    the folder, partial: the one that becomes it.
    """

    output: Path
    given: list[Any]
    found: list[Source]
    files: list[Source]
    plan: Plan
    extended: Extended | None
    target: Path
    partial: Path

    @classmethod
    def of(cls, sources: Any, output: str | Path, config: PrepareConfig | None, extend: str | Path | None) -> "Task":
        """Find the sources and read their schema.

        Raises:
            UserError: as `prepare`.
        """
        output, config = local_output(output), complete_config(config, extend)
        given = as_list(sources)
        found = gather(given)
        files = formats.arrange(found, config)
        plan = make_plan(ingest.with_fields(files, config))
        extended = Extended(plan.config) if config.extend is not None else None
        if extended is not None:
            plan = dataclasses.replace(plan, key_version=extended.key_version)
        # A link to a folder means the folder: a folder cannot be renamed onto a link.
        target = output.resolve()
        partial = target.with_name(target.name + ".partial")
        for file in found:
            if partial in file.path.resolve().parents:
                raise UserError(
                    f"{file.path} is in {partial}, which is emptied for the work; move it, or name another output"
                )
        return cls(output, given, found, files, plan, extended, target, partial)

    @property
    def named(self) -> list[str | Path]:
        """The sources that have names."""
        return [item for item in self.given if isinstance(item, (str, Path))]

    @property
    def on_disk(self) -> list[Source]:
        """The sources that are files."""
        return [file for file in self.found if not isinstance(file, TableSource)]

    def work(self, progress: Progress | None, count: int) -> Work:
        """The work in `count` parts."""
        tell: Progress = progress or (lambda what, done, total: None)
        return Work(self.partial, self.files, self.plan, self.extended, tell, count)

    def require_free(self) -> None:
        """Look at the output once more, now that nobody else writes it.

        Raises:
            UserError: there is something now, or it would be in the log.
        """
        require_new(self.output)  # a run that ended meanwhile may have filled it
        if (text := reads(self.named, self.partial)) is not None:
            raise UserError(f"{self.output} would be in the log itself, '{text}'; name an output outside of it")


@contextmanager
def _replacing(target: Path, partial: Path, job: dict[str, Any] | None, log: Log, work: Work) -> Iterator[None]:
    """The folder `partial`, locked: empty, or with what has been done of this job. It becomes `target` at the end, or
    is removed if anything goes wrong."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, job, log, work)
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
        stopped = isinstance(error, (KeyboardInterrupt, OverBudget)) and job is not None
        if not moved and not stopped:  # if moved, what bears its name now is another run's
            _remove(partial)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {partial}: {why}; nothing of it was kept") from error
        raise
    finally:
        lock.close()


def _claim(partial: Path, job: dict[str, Any] | None, log: Log, work: Work) -> IO[bytes]:
    """Make the folder, or take over what a dead run left, and lock it until the result is closed. What it left of
    another job is deleted.

    Raises:
        UserError: it is somebody else's, or another run is writing it.
    """
    make_partial(partial)
    lock = (partial / MARKER).open("ab")
    try:
        lock_partial(lock, partial)
        if any(partial.glob("work/*/job.json")):
            raise UserError(
                f"{partial} holds a preparation in parts; continue with --part and --merge, or delete it to start over"
            )
        before = _read(partial / MARKER)
        changed = None if before is None or job is None else difference(before, job, elsewhere=False)
        if before is None or job is None or changed:
            if changed:
                log(f"{partial} was started {changed}: it is deleted, and the preparation starts over")
            _empty(partial)
            _begin(lock, partial, job)
        else:
            log(f"resuming {partial}: {work.staged_rows(1):,} rows have been read")
    except BaseException:
        lock.close()
        raise
    return lock


def _begin(marker: IO[bytes], partial: Path, job: dict[str, Any] | None) -> None:
    """Write down what is started; if there is no room even for that, nothing is left."""
    try:
        marker.truncate(0)
        marker.write(json.dumps(job).encode() if job else b"")
        marker.flush()
    except OSError:
        _remove(partial)
        raise


def make_partial(partial: Path) -> None:
    """Make the folder that becomes a dataset, if it is not there.

    Raises:
        UserError: there is another one of that name.
    """
    try:
        partial.mkdir()
    except FileExistsError:
        marked = (partial / MARKER).is_file()
        ours = partial.is_dir() and not partial.is_symlink() and (marked or not any(partial.iterdir()))
        if not ours:
            raise UserError(
                f"{partial} is not empty and was not created by dqrm prepare; move it, or name another output"
            ) from None


def _read(marker: Path) -> Any:
    """The job that was started; None where it is not known."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lock_partial(file: IO[bytes], partial: Path) -> None:
    """Lock the open marker of a folder.

    Raises:
        UserError: another process has it, or has just completed the folder.
    """
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


def local_output(output: str | Path) -> Path:
    """The path of a folder to be made.

    Raises:
        UserError: it is a URL.
    """
    if is_url(path := local(output)):
        raise UserError(
            f"the output is {output}, expected a folder on this machine: a dataset is memory-mapped; copy the folder "
            "to the store once it is complete"
        )
    return Path(path)


def require_new(output: Path) -> None:
    """Raise UserError unless `output` can be made: nothing, or an empty folder, has its name."""
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
