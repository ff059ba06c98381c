"""A preparation in parts, by processes that share a folder and need not know of each other.

Each part is staged by one process (`prepare_part`), then one process merges them (`merge_parts`), then each part is
encoded by one process: the same call as before. The last one completes the dataset. Whatever is killed is called again.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dqrm.data import contents, folder, ingest
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.listing import require_same_files
from dqrm.data.prepare import MARKER, Task, lock_partial, make_partial, require_new
from dqrm.data.work import Progress, Work, describe_job, difference
from dqrm.errors import UserError
from dqrm.files import claim, flush, read_json, why_not_written, write_json

_JOB = "job.json"
_Found = tuple[Task, tuple[str, Dataset | None] | None]


def prepare_part(
    sources: Any,
    output: str | Path,
    part: str,
    config: PrepareConfig | None = None,
    progress: Progress | None = None,
    extend: str | Path | None = None,
) -> tuple[str, Dataset | None]:
    """Do what is next for one part of a log: before the parts are merged stage it, after that encode it.

    Args:
        sources, output, config, progress, extend: as `dqrm.prepare`, the same for all parts; sources are files.
        part: which one, of how many: '3/8'. Each has about as many bytes of the log, in whole files.

    Returns:
        What has been done, in words, and the dataset, if this part was the last one that it lacked.

    Raises:
        UserError: as `dqrm.prepare`; no such part, one of another job, or another process is working on it.
    """
    number, count = _parse(part)
    task, made = _task(sources, output, config, extend)
    if made:
        return made
    work, job = _job(task, progress, count)
    if count > len(task.files):
        raise UserError(
            f"part is {part}, but the log has {len(task.files)} file{'s' * (len(task.files) > 1)}, and a part is one "
            f"file or more; expected at most {len(task.files)} parts, or a log in more files"
        )
    with _writing(task):
        _make_partial(task.partial)
        task.require_free()
        if work.finished:
            return _complete(task, work)
        _require_same(task, work, job)
        work.part(number).mkdir(parents=True, exist_ok=True)
        with _alone(work.part(number) / "lock", f"another process is working on part {part} of {output}"):
            if not (work.part(number) / _JOB).exists():
                write_json(work.part(number) / _JOB, job)
            if not work.counted(number):
                share = work.share[number - 1]
                ingest.check([task.files[at] for at in share], task.plan)
                work.stage(number)
                return (
                    f"part {part} is read: {work.staged_rows(number):,} rows; next is --merge, once all parts are",
                    None,
                )
            if not work.merged:
                return f"part {part} is read already; next is --merge, once all parts are", None
            work.encode(number)
        left = [each for each in range(1, count + 1) if not work.encoded(each)]
        if left:
            return f"part {part} is written; {_parts(left, count)} not yet", None
        return _complete(task, work)


def merge_parts(
    sources: Any,
    output: str | Path,
    config: PrepareConfig | None = None,
    progress: Progress | None = None,
    extend: str | Path | None = None,
) -> tuple[str, Dataset | None]:
    """Merge the parts that `prepare_part` has staged: split the rows, number the ids.

    Args, Returns:
        As `prepare_part`. Once all parts are encoded, this completes the dataset, where that has not happened yet.

    Raises:
        UserError: as `dqrm.prepare`; a part is missing (all missing ones are named), or is of another job.
    """
    task, made = _task(sources, output, config, extend)
    if made:
        return made
    partial = task.partial
    if partial.is_dir() and Work(partial, task.files, task.plan, task.extended, lambda *told: None).finished:
        return _complete(task, task.work(progress, 1))
    found = [read_json(path) for path in sorted(partial.glob(f"work/*/{_JOB}"))]
    if not found:
        raise UserError(f"no part of {output} has been read yet; run dqrm prepare with --part 1/4 and so on first")
    count = max(each.get("parts", 1) if isinstance(each, dict) else 1 for each in found)
    work, job = _job(task, progress, count)
    _require_same(task, work, job)
    missing = [number for number in range(1, count + 1) if not work.counted(number)]
    if missing:
        again = " and ".join(f"--part {number}/{count}" for number in missing[:3])
        raise UserError(f"{_parts(missing, count)} not read yet for {output}; run {again} to the end before --merge")
    with _writing(task):
        left = [number for number in range(1, count + 1) if not work.encoded(number)]
        if not left:
            return _complete(task, work)
        before = "were already" if work.merged else "are"
        with _alone(partial / MARKER, f"another dqrm prepare is merging the parts of {output}"):
            work.merge()
        return f"the {count} parts {before} merged; next is --part again, for {_parts(left, count, bare=True)}", None


def _task(sources: Any, output: str | Path, config: PrepareConfig | None, extend: str | Path | None) -> _Found:
    """The task, and what to return where its dataset is complete already: a job that is run once more succeeds.

    Raises:
        UserError: as `dqrm.prepare`; the output is something else.
    """
    task = Task.of(sources, output, config, extend)
    if not (task.target / folder.INFO).is_file():
        require_new(task.output)
        return task, None
    dataset = Dataset(task.output)
    info, extended = dataset.info, task.extended.dataset.fingerprint if task.extended else None
    same = (
        [(file["name"], file["bytes"]) for file in info["sources"]] == [(file.name, file.size) for file in task.files]
        and info["options"] == json.loads(json.dumps(contents.options(task.plan.config)))
        and dataset.describe().get("extends") == extended
    )
    if not same:
        require_new(task.output)
    return task, (f"{task.output} is complete already", dataset)


def _parse(part: str) -> tuple[int, int]:
    told = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    if told is None:
        raise UserError(f"part is '{part}', expected which part of how many, as in 3/8")
    number, count = int(told[1]), int(told[2])
    if not 1 <= number <= count:
        raise UserError(f"part is '{part}', expected 1/{count or 1} to {count or 1}/{count or 1}")
    return number, count


def _job(task: Task, progress: Progress | None, count: int) -> tuple[Work, dict[str, Any]]:
    job = describe_job(task.files, task.plan, task.extended, count)
    if job is None:
        raise UserError("a pipe or a table in memory cannot be prepared in parts, which read files more than once")
    return task.work(progress, count), job


def _require_same(task: Task, work: Work, job: dict[str, Any]) -> None:
    """Whether the parts that were started are of the same job."""
    for path in sorted(task.partial.glob(f"work/*/{_JOB}")):
        if changed := difference(read_json(path), job, elsewhere=True):
            raise UserError(
                f"part {path.parent.name} in {task.partial} was started {changed}; give all parts the same files and "
                f"options, or delete {task.partial} to start over"
            )


def _parts(numbers: list[int], count: int, bare: bool = False) -> str:
    named = ", ".join(f"{number}/{count}" for number in numbers)
    verb = "" if bare else " is" if len(numbers) == 1 else " are"
    return f"part{'s' * (len(numbers) > 1)} {named}{verb}"


def _complete(task: Task, work: Work) -> tuple[str, Dataset | None]:
    """Give the dataset its name, unless another process does."""
    try:
        lock = (task.partial / MARKER).open("ab")
        lock_partial(lock, task.partial)
    except (UserError, FileNotFoundError):
        return f"all parts are written; another process completes {task.output}", None
    with lock:
        require_same_files(task.named, task.on_disk)
        work.finish()
        os.replace(task.partial, task.target)
    (task.target / MARKER).unlink()
    flush(task.target.parent)
    return f"{task.output} is complete", Dataset(task.output)


def _make_partial(partial: Path) -> None:
    """Make the folder that becomes the dataset, if it is not there.

    Raises:
        UserError: it is of a preparation in one go, or of somebody else.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    make_partial(partial)
    marker = partial / MARKER
    marker.touch()
    if marker.stat().st_size:
        raise UserError(f"{partial} holds what a dqrm prepare in one go is doing or left; delete it to start in parts")


@contextmanager
def _alone(path: Path, busy: str) -> Iterator[None]:
    with path.open("ab") as lock:
        claim(lock, path, busy)
        yield


@contextmanager
def _writing(task: Task) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {task.partial}: {why_not_written(error, task.target.parent)}; what was done before is "
            "kept, and the same command continues"
        ) from error
