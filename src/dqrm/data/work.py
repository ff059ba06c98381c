"""A preparation step by step. Each step leaves a file when it is done, and resumes where a kill stopped it.

    stage(k)    the rows of part k of the log as chunks, and the counts of their keys     work/<k>/counted.json
    merge()     the split of every row, the vocabularies, where each part's rows go       work/merged.json
    encode(k)   the rows of part k in the arrays of the splits                            work/<k>/encoded.json
    finish()    checksums                                                                 dataset.json

In one go there is one part. The arrays are the same bytes however many there are.
"""

import dataclasses
import gc
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dqrm import __version__, checksums
from dqrm.data import contents, counting, encode, folder, ingest, numbering, splits
from dqrm.data.columns import Plan
from dqrm.data.encode import Writer
from dqrm.data.extension import Extended
from dqrm.data.sources import Source, total_size
from dqrm.data.splits import Splits
from dqrm.data.staging import Staging
from dqrm.data.tables import TableSource
from dqrm.errors import UserError
from dqrm.files import flush, read_json, write_json
from dqrm.identity import FileIdentity

Progress = Callable[[str, int, int | None], None]


def shares(sizes: Sequence[int], parts: int) -> list[range]:
    """Which of the files, of these sizes in bytes, belong to each part: some that follow each other, one at least, and
    about as many bytes as to the others."""
    sums, ends = list(accumulate(sizes)), [0]
    for part in range(1, parts):
        goal = sums[-1] * part / parts
        at = bisect_left(sums, goal)
        near = at if at and goal - sums[at - 1] < sums[min(at, len(sums) - 1)] - goal else at + 1
        ends.append(min(max(near, ends[-1] + 1), len(sizes) - parts + part))
    return [range(begin, end) for begin, end in pairwise([*ends, len(sizes)])]


class Work:
    """The work in the folder `path`, which becomes the dataset.

    count: of parts.
    """

    def __init__(
        self, path: Path, files: list[Source], plan: Plan, extended: Extended | None, tell: Progress, count: int = 1
    ) -> None:
        self.path, self._files, self._plan, self._extended, self._tell = path, files, plan, extended, tell
        self.count, self._work = count, path / "work"
        for file in files:
            file.used = tuple(name for name in plan.used if name in file.partitions)

    @property
    def share(self) -> list[range]:
        """The files of each part."""
        return shares([file.size or 0 for file in self._files], self.count)

    @property
    def files(self) -> list[Source]:
        """The log."""
        return self._files

    def part(self, number: int) -> Path:
        """The folder of a part; they are numbered from 1."""
        return self._work / str(number)

    def counted(self, number: int) -> bool:
        """Whether a part is staged."""
        return (self.part(number) / "counted.json").exists()

    @property
    def merged(self) -> bool:
        """Whether the parts are merged."""
        return (self._work / "merged.json").exists()

    def encoded(self, number: int) -> bool:
        """Whether a part is in the arrays."""
        return (self.part(number) / "encoded.json").exists()

    @property
    def finished(self) -> bool:
        """Whether the dataset is complete but for its name."""
        return (self.path / folder.INFO).exists()

    def staged_rows(self, number: int) -> int:
        """Rows of a part that are in chunks."""
        return sum(Staging(self.part(number), self._plan).rows) if self.part(number).exists() else 0

    def stage(self, number: int) -> None:
        """Read a part of the log into chunks."""
        if self.counted(number):
            return
        share, read = self.share[number - 1], _Steps(self._tell, "reading")
        staged = Staging(self.part(number), self._plan)
        total = total_size([self._files[at] for at in share])
        ingest.ingest(self._files, self._plan, staged, lambda count: read(count, total), share)
        # Where most parts have rows of all splits, the counts of all rows are of no use.
        if self.count > 1 and (self._plan.config.split_rule != "random" or self._plan.config.vocabulary == "all"):
            counting.precount(staged)
        records = {str(at): self._files[at].record() for at in share}
        write_json(self.part(number) / "counted.json", {"sources": records})

    def merge(self) -> None:
        """Split the rows of all parts, number their ids, and say where in the arrays each part's rows go."""
        if self.merged:
            return
        self._restore()
        parts = self._parts()
        if not sum(sum(part.rows) for part in parts):
            raise UserError(f"no row in {', '.join(file.name for file in self._files[:3])}, expected at least one")
        file = self._work / "splits.u8"
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_bytes(splits.assign(self._plan.config, self._files, parts).data)
            flush(partial)
            os.replace(partial, file)
        assigned = self._splits()
        numbering.number(parts, assigned, self._plan, self.path, self._work, self._extended, self._tell)
        more = [folder.WEIGHT] * (self._plan.weight is not None) + [folder.GROUP] * (self._plan.group is not None)
        for name in folder.SPLITS:
            encode.create(self.path / name, self._multi, more)
        write_json(self._work / "merged.json", {"starts": _starts(parts, assigned, self._multi)})

    def encode(self, number: int) -> None:
        """Write the rows of a part into the arrays."""
        if self.encoded(number):
            return
        parts, wrote = self._parts(), _Steps(self._tell, "writing")
        total = sum(parts[number - 1].rows)
        first = sum(sum(part.rows) for part in parts[: number - 1])
        writers = self._writers_of(number)
        encode.write_splits(
            parts[number - 1],
            self._splits(first, total),
            lambda column: numbering.lookup(self._plan, self._work, column),
            writers,
            lambda count: wrote(count, total),
        )
        write_json(self.part(number) / "encoded.json", {"writers": [writer.record() for writer in writers]})

    def finish(self) -> None:
        """Describe the dataset, with checksums, and remove what was needed to make it."""
        if not self.finished:
            self._restore()
            made = numbering.load(self._plan, self._work)
            writers = [self._writers_of(number) for number in range(1, self.count + 1)]
            for number, each in enumerate(writers, 1):
                records = read_json(self.part(number) / "encoded.json")["writers"]
                for writer, record in zip(each, records):
                    writer.restore(record)
            info = contents.describe(self.path, self._plan, self._files, made, writers, self._extended)
            written = [f"{name}/{file}" for name in folder.SPLITS for file in folder.arrays(info, name)]
            info[checksums.FILES] = checksums.list_files(self.path, [*written, *made.files], self._tell)
            write_json(self.path / folder.INFO, checksums.seal(info))
        if self._work.exists():
            gc.collect()  # what is still mapped cannot be deleted from NFS or on Windows
            shutil.rmtree(self._work)

    @property
    def _multi(self) -> list[int]:
        return [n for n, key in enumerate(self._plan.keys) if key.multi]

    def _parts(self) -> list[Staging]:
        return [Staging(self.part(number), self._plan) for number in range(1, self.count + 1)]

    def _splits(self, first: int = 0, count: int = -1) -> Splits:
        return np.fromfile(self._work / "splits.u8", np.uint8, count, offset=first)

    def _writers_of(self, number: int) -> list[Writer]:
        starts = read_json(self._work / "merged.json")["starts"][number - 1]
        return [
            Writer(self.path / name, start["rows"], {int(n): count for n, count in start["values"].items()})
            for name, start in zip(folder.SPLITS, starts)
        ]

    def _restore(self) -> None:
        """What was found in the files."""
        for number in range(1, self.count + 1):
            for at, record in read_json(self.part(number) / "counted.json")["sources"].items():
                self._files[int(at)].restore(record)


def _starts(parts: Sequence[Staging], assigned: Splits, multi: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Of each part and split, where its share begins: the rows before it, and the ids in multi-valued columns."""
    count = len(folder.SPLITS)
    rows, values = np.zeros(count, np.int64), {column: np.zeros(count, np.int64) for column in multi}
    starts, row = [], 0
    for part in parts:
        starts.append(
            [
                {"rows": int(rows[split]), "values": {str(n): int(before[split]) for n, before in values.items()}}
                for split in range(count)
            ]
        )
        if part is parts[-1]:  # nothing begins behind it
            break
        for chunk, height in enumerate(part.rows):
            here = assigned[row : row + height]
            rows += np.bincount(here, minlength=count)
            for column in multi:
                (lengths,) = part.read(chunk, f"lengths{column}")
                values[column] += np.bincount(here, lengths.to_numpy(), count).astype(np.int64)
            row += height
    return starts


def describe_job(files: Sequence[Source], plan: Plan, extended: Extended | None, count: int) -> dict[str, Any] | None:
    """What is to be done, for `difference`; None where a source can be read only once: that cannot be resumed."""
    if any(file.stream or isinstance(file, TableSource) for file in files):
        return None
    given = {name: value for name, value in dataclasses.asdict(plan.config).items() if name not in contents.UNRECORDED}
    named = [[part for part in file.parts or (file,) if part.state is not None] for file in files]
    return {
        "dqrm_version": __version__,
        "parts": count,
        "options": json.loads(json.dumps(given)),
        "extend": extended.dataset.fingerprint if extended else None,
        "files": [[part.name, *(part.state or ())] for parts in named for part in parts],
    }


def difference(before: Any, now: dict[str, Any], elsewhere: bool) -> str | None:
    """How what was to be done differs from what is, as the rest of a sentence; None: it is the same.

    elsewhere: perhaps on another machine, where files have other inodes.
    """
    if not isinstance(before, dict) or before.keys() != now.keys():
        return "by another version of dqrm"
    if before["dqrm_version"] != now["dqrm_version"]:
        return f"by dqrm {before['dqrm_version']}, and this is {now['dqrm_version']}"
    if before["parts"] != now["parts"]:
        return f"in {before['parts']} parts, not in {now['parts']}"
    for name, value in now["options"].items():
        if before["options"].get(name) != value:
            return f"with {name} {_told(before['options'].get(name))}, not {_told(value)}"
    if before["extend"] != now["extend"]:
        return "to extend another dataset, or none" if now["extend"] else "to extend a dataset"
    names = [[file[0] for file in each["files"]] for each in (before, now)]
    if names[0] != names[1]:
        changed = sorted(set(names[0]) ^ set(names[1])) or names[1]
        return f"from other files ({changed[0]})"
    for (name, *old), (_, *new) in zip(before["files"], now["files"]):
        was, is_ = FileIdentity(0, *old[1:]), FileIdentity(0, *new[1:])
        same = (was.size, was.mtime_ns) == (is_.size, is_.mtime_ns) if elsewhere else was.unchanged(is_)
        if not same:
            return f"before {name} changed"
    return None


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class _Steps:
    """Running sum of steps for a progress callback."""

    def __init__(self, tell: Progress, what: str) -> None:
        self._tell, self._what, self._done = tell, what, 0

    def __call__(self, count: int, total: int | None) -> None:
        self._done += count
        self._tell(self._what, self._done, total)
