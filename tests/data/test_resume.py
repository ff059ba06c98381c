"""A preparation that was killed goes on where it was: the same bytes, and nothing that looks finished before."""

import dataclasses
import gzip
import os
import random
import shutil
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from data_helpers import KAGGLE, content, criteo_lines, prepare_again, table, write
from dqrm.data import ingest, lines
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.journal import Journal
from dqrm.data.prepare import MARKER, prepare
from dqrm.errors import UserError
from run_helpers import kill_often

SMALL = dataclasses.replace(KAGGLE, chunk_rows=60)
MIXED = PrepareConfig(
    categorical=("user", "tags"), multi=("tags",), dense=("age",), weight="w", group="user", split="random",
    subsample_negatives=0.5, on_error="skip", chunk_rows=40,
)  # fmt: skip


class Killed(BaseException):
    """In place of SIGKILL: nothing that cleans up after an error may run."""


def kill_at(monkeypatch, stop: int) -> list[int]:
    """Raise from the `stop`-th line that any journal is told, once before and once after it is written."""
    told = [0]
    original = Journal.add

    def add(self, line):
        told[0] += 1
        if told[0] == stop:
            if stop % 2:
                original(self, line)
            raise Killed
        original(self, line)

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.setattr("dqrm.data.prepare._remove", lambda partial: None)
    return told


def logs(folder: Path, kind: str) -> tuple[list[Path], PrepareConfig]:
    """Two files of a log in a format, one of them with malformed rows where they may be skipped."""
    draw = random.Random(3)
    if kind in ("text", "gzip", "hash"):
        files = [write(folder / f"day_{day}", criteo_lines(130, seed=day)) for day in range(2)]
        if kind == "gzip":
            for file in files:
                file.write_bytes(gzip.compress(file.read_bytes()))
        return files, dataclasses.replace(SMALL, vocabulary="hash", rows=50) if kind == "hash" else SMALL
    rows = [
        {"label": draw.randint(0, 1), "user": f"u{draw.randint(0, 40)}", "age": n, "w": draw.random() * 3,
         "tags": "|".join(f"t{draw.randint(0, 9)}" for _ in range(draw.randint(0, 3)))}
        for n in range(400)
    ]  # fmt: skip
    if kind == "csv":
        table(folder / "a.csv", [{**row, "w": "bad" if n % 50 == 7 else row["w"]} for n, row in enumerate(rows[:250])])
        table(folder / "b.csv", rows[250:])
        return [folder / "a.csv", folder / "b.csv"], MIXED
    pl.DataFrame(rows[:250]).write_parquet(folder / "a.parquet", row_group_size=70)
    pl.DataFrame(rows[250:]).write_parquet(folder / "b.parquet")
    return [folder / "a.parquet", folder / "b.parquet"], MIXED


def same(dataset: Dataset, whole: Dataset) -> None:
    assert content(dataset) == content(whole)
    assert dataset.info == whole.info
    files = [{str(path.relative_to(each.path)) for path in each.path.rglob("*")} for each in (dataset, whole)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "kind", ["text", "csv", "parquet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gzip", "hash"))]
)
def test_killed_at_every_line_of_the_journals(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lines, "_BLOCK", 3000)
    files, config = logs(tmp_path, kind)
    whole = prepare(files, tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        told = kill_at(patched, 0)
        prepare(files, tmp_path / "count", config)
    assert told[0] > 10
    for stop in sorted({1, told[0], *random.Random(kind).sample(range(2, told[0]), 1)}):
        with monkeypatch.context() as patched:
            kill_at(patched, stop)
            with pytest.raises(Killed):
                prepare(files, tmp_path / "out", config)
        assert not (tmp_path / "out").exists()
        said = []
        same(prepare(files, tmp_path / "out", config, log=said.append), whole)
        assert said[0].startswith(f"resuming {tmp_path / 'out.partial'}: ")
        (tmp_path / "out").rename(tmp_path / f"done{stop}")
        assert not (tmp_path / "out.partial").exists()


def test_at_most_one_chunk_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 3000)
    files, config = logs(tmp_path, "text")
    typed = []
    original = ingest._typed

    def counted(*given):
        for block in original(*given):
            typed.append(block.frame.height)
            yield block

    monkeypatch.setattr(ingest, "_typed", counted)
    with monkeypatch.context() as patched:
        kill_at(patched, 4)
        with pytest.raises(Killed):
            prepare(files, tmp_path / "out", config)
    prepare(files, tmp_path / "out", config)
    block = max(typed)
    assert 260 <= sum(typed) <= 260 + 2 * config.chunk_rows + 3 * block


def killed(tmp_path, monkeypatch, files, config, stop=5, output="out"):
    with monkeypatch.context() as patched:
        kill_at(patched, stop)
        with pytest.raises(Killed):
            prepare(files, tmp_path / output, config)


def test_another_command_begins_again(tmp_path, monkeypatch):
    files, config = logs(tmp_path, "text")
    other = dataclasses.replace(config, min_count=3)
    wanted = prepare(files, tmp_path / "whole", other)
    killed(tmp_path, monkeypatch, files, config)
    said = []
    same(prepare(files, tmp_path / "out", other, log=said.append), wanted)
    assert said == [
        f"{tmp_path / 'out.partial'} was started with min_count 1, not 3: it is deleted, and the preparation starts "
        "over"
    ]


def grown(files):
    with files[1].open("a") as file:
        file.write(criteo_lines(1)[0] + "\n")
    return files


def rewritten(files):
    before = files[0].stat()
    data = files[0].read_bytes()
    files[0].write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    return files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (grown, "before day_1 changed"),
        (rewritten, "before day_0 changed"),
        pytest.param(lambda files: files[:1], "from other files (day_1)", marks=pytest.mark.slow),
        pytest.param(lambda files: files[::-1], "from other files (day_1)", marks=pytest.mark.slow),
    ],
    ids=["grown", "rewritten", "fewer", "order"],
)
def test_a_log_that_changed_is_read_again(tmp_path, monkeypatch, change, words):
    files, config = logs(tmp_path, "text")
    config = dataclasses.replace(config, split="time")
    killed(tmp_path, monkeypatch, files, config)
    files, said = change(files), []
    same(prepare(files, tmp_path / "out", config, log=said.append), prepare(files, tmp_path / "whole", config))
    assert f"was started {words}" in said[0]


def test_a_file_that_vanishes_from_a_run_that_goes_on(tmp_path, monkeypatch):
    files, config = logs(tmp_path, "text")
    killed(tmp_path, monkeypatch, files, config, stop=2)
    original = ingest.read_bytes

    def vanishing(source):
        if source.path.exists() and source.rows:
            source.path.unlink()
        return original(source)

    with monkeypatch.context() as patched:
        patched.setattr(ingest, "read_bytes", vanishing)
        with pytest.raises(UserError, match=r"cannot read .*day_0: No such file"):
            prepare(files, tmp_path / "out", config)
    assert sorted(os.listdir(tmp_path)) == ["day_1"]
    with pytest.raises(UserError, match=r"cannot read .*day_0: No such file"):
        prepare(files, tmp_path / "out", config)


def test_a_full_disk_in_a_run_that_goes_on(tmp_path, monkeypatch, small_disk):
    files, config = logs(tmp_path, "text")
    disk = small_disk(400)
    killed(disk, monkeypatch, files, config, stop=2)
    (disk / "big").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    with pytest.raises(UserError, match=r"cannot write to .*out\.partial: the disk is full"):
        prepare(files, disk / "out", config)
    assert os.listdir(disk) == ["big"]


def test_what_cannot_be_gone_on_with_begins_again(tmp_path, monkeypatch):
    frame = pl.DataFrame({"label": [0, 1] * 50, "c": [f"v{n % 7}" for n in range(100)]})
    config = PrepareConfig(categorical=("c",), chunk_rows=10)
    with monkeypatch.context() as patched:
        kill_at(patched, 3)
        with pytest.raises(Killed):
            prepare(frame, tmp_path / "out", config)
    assert (tmp_path / "out.partial" / MARKER).read_bytes() == b""
    same(prepare(frame, tmp_path / "out", config), prepare(frame, tmp_path / "whole", config))


def test_what_an_interruption_leaves_is_gone_on_with(tmp_path):
    files, config = logs(tmp_path, "text")

    def interrupt(what, done, total):
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(files, tmp_path / "out", config, interrupt)
    assert sorted(os.listdir(tmp_path)) == ["day_0", "day_1", "out.partial"]
    same(prepare(files, tmp_path / "out", config), prepare(files, tmp_path / "whole", config))


@pytest.mark.parametrize("torn", [b'{"chu', b'{"a": 1}\nnonsense\n{"a": 2}\n', b"\0" * 20])
def test_a_journal_ends_at_its_first_torn_line(tmp_path, torn):
    first = Journal(tmp_path / "j")
    first.add({"n": 1})
    with (tmp_path / "j").open("ab") as file:
        file.write(torn)
    again = Journal(tmp_path / "j")
    assert again.lines == [{"n": 1}, {"a": 1}][: 1 + torn.startswith(b'{"a"')]
    again.add({"n": 2})
    assert Journal(tmp_path / "j").lines == again.lines


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tmp_path):
    files = [write(tmp_path / f"day_{day}", criteo_lines(500, seed=day)) for day in range(2)]
    config = PrepareConfig(layout="criteo-terabyte", chunk_rows=100)
    whole = prepare(files, tmp_path / "whole", config)
    kill_often(20, partial(prepare_again, files, config), tmp_path, lambda out: same(Dataset(out), whole))
