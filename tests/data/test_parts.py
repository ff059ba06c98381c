"""A log prepared in parts: the same bytes as in one go, whatever is killed, and refusals that say what to do."""

import dataclasses
import os
import random
import shutil
import tempfile
from functools import partial

import polars as pl
import pytest

from data_helpers import content, criteo_lines, prepare_in_parts, table, write
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.journal import Journal
from dqrm.data.parts import merge_parts, prepare_part
from dqrm.data.prepare import MARKER, prepare
from dqrm.data.work import shares
from dqrm.errors import UserError
from run_helpers import kill_often

TERABYTE = PrepareConfig(layout="criteo-terabyte", chunk_rows=50)
TABLE = PrepareConfig(
    categorical=("user", "tags"), multi=("tags",), dense=("age",), weight="w", group="user", split="time", chunk_rows=9
)


def days(folder, count=5):
    return [write(folder / f"day_{day}", criteo_lines(60 + 9 * day, seed=day)) for day in range(count)]


def tables(folder, count=4):
    draw = random.Random(0)
    files = []
    for day in range(count):
        rows = [
            {"label": draw.randint(0, 1), "user": draw.choice(["", f"u{draw.randint(0, 30 + day)}"]), "age": n,
             "w": draw.random(), "tags": "|".join(f"t{draw.randint(0, 9)}" for _ in range(draw.randint(0, 3)))}
            for n in range(30 + 7 * day)
        ]  # fmt: skip
        files.append(table(folder / f"{day}.csv", rows))
    return files


def in_parts(files, output, config, count, again=False, **more):
    for number in random.Random(count).sample(range(1, count + 1), count):
        told, none = prepare_part(files, output, f"{number}/{count}", config, **more)
        assert none is None
        assert again or told.startswith(f"part {number}/{count} is read: ")
    assert merge_parts(files, output, config, **more)[1] is None
    for number in range(count, 0, -1):
        told, made = prepare_part(files, output, f"{number}/{count}", config, **more)
        assert (made is None) == (number > 1), told
    return made


def same(dataset, whole):
    assert content(dataset) == content(whole)
    assert (dataset.path / "dataset.json").read_bytes() == (whole.path / "dataset.json").read_bytes()
    assert sorted(os.listdir(dataset.path)) == sorted(os.listdir(whole.path))
    assert not dataset.path.with_name(dataset.path.name + ".partial").exists()


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tables, {}),
        (tables, {"max_rows_per_table": 7, "split": "file", "test_values": ("1.csv",), "on_error": "skip"}),
        (days, {"vocabulary": "hash", "rows": 40}),
        (tables, {"subsample_negatives": 0.6, "split": "random", "on_error": "skip"}),
        (days, {"subsample_negatives": 0.875}),
        *(
            pytest.param(days, fields, marks=pytest.mark.slow)
            for fields in (
                {},
                {"split": "random", "cross": ("C1*C2",), "min_count": 4},
                {"vocabulary": "all", "split": "column", "split_column": "C1", "test_values": ("00000003",)},
            )
        ),
    ],
)
def test_parts_are_the_same_bytes_as_one_go(tmp_path, make, fields):
    files = make(tmp_path)
    config = dataclasses.replace(TERABYTE if make is days else TABLE, **fields)
    whole = prepare(files, tmp_path / "whole", config)
    for count in (1, 3):
        same(in_parts(files, tmp_path / f"in{count}", config, count), whole)


def test_a_day_that_extends_another_in_parts(tmp_path):
    files = tables(tmp_path)
    config = dataclasses.replace(TABLE, min_count=2)
    first = prepare(files[:2], tmp_path / "first", config)
    whole = prepare(files[2:], tmp_path / "whole", config, extend=first.path)
    same(in_parts(files[2:], tmp_path / "out", config, 2, extend=first.path), whole)


def test_positions_in_a_log_of_more_entries_than_fit_in_32_bits(tmp_path, monkeypatch):
    files = tables(tmp_path)
    whole = prepare(files, tmp_path / "whole", TABLE)
    for module in ("counting", "vocabulary"):
        monkeypatch.setattr(f"dqrm.data.{module}.position_type", lambda total: pl.Int64)
    same(in_parts(files, tmp_path / "out", TABLE, 3), whole)


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_whatever_is_killed_is_called_again(tmp_path, monkeypatch, stop):
    class Killed(BaseException):
        pass

    files = tables(tmp_path)
    whole = prepare(files, tmp_path / "whole", TABLE)
    original, told = Journal.add, [0]

    def add(self, line):
        told[0] += 1
        if told[0] % (stop + 3) == stop:
            raise Killed
        original(self, line)

    def again(call, *given):
        for _ in range(50):
            try:
                return call(*given)
            except Killed:
                assert not (tmp_path / "out").exists()
        raise AssertionError("it never ends")

    monkeypatch.setattr(Journal, "add", add)
    for number in (1, 2):
        again(prepare_part, files, tmp_path / "out", f"{number}/2", TABLE)
    again(merge_parts, files, tmp_path / "out", TABLE)
    for number in (1, 2):
        _, made = again(prepare_part, files, tmp_path / "out", f"{number}/2", TABLE)
    assert told[0] > stop
    same(made, whole)


def test_what_is_done_is_not_done_again(tmp_path):
    files = days(tmp_path)
    output = tmp_path / "out"
    prepare_part(files, output, "1/2", TERABYTE)
    assert "part 1/2 is read already" in prepare_part(files, output, "1/2", TERABYTE)[0]
    prepare_part(files, output, "2/2", TERABYTE)
    merge_parts(files, output, TERABYTE)
    assert "were already merged; next is --part again, for parts 1/2, 2/2" in merge_parts(files, output, TERABYTE)[0]
    assert "part 1/2 is written; part 2/2 is not yet" in prepare_part(files, output, "1/2", TERABYTE)[0]
    assert "part 1/2 is written; part 2/2 is not yet" in prepare_part(files, output, "1/2", TERABYTE)[0]
    assert prepare_part(files, output, "2/2", TERABYTE)[1] is not None
    # A job that is run once more succeeds; another job does not.
    for text, made in (prepare_part(files, output, "2/2", TERABYTE), merge_parts(files, output, TERABYTE)):
        assert (text, made.fingerprint) == (f"{output} is complete already", Dataset(output).fingerprint)
    more = dataclasses.replace(TERABYTE, min_count=2)
    assert "exists and is not empty" in refused(prepare_part, files, output, "2/2", more)
    assert "exists and is not empty" in refused(merge_parts, files[:-1], output, TERABYTE)
    assert sorted(os.listdir(tmp_path)) == sorted([output.name, *(file.name for file in files)])


def refused(call, *given) -> str:
    with pytest.raises(UserError) as error:
        call(*given)
    return str(error.value)


def test_refusals(tmp_path):
    files, output = days(tmp_path), tmp_path / "out"
    for part, said in [
        ("0/3", "part is '0/3', expected 1/3 to 3/3"),
        ("4/3", "expected 1/3 to 3/3"),
        ("1/0", "expected 1/1"),
        ("1", "expected which part of how many, as in 3/8"),
        ("1/6", "the log has 5 files, and a part is one file or more; expected at most 5 parts"),
    ]:
        assert said in refused(prepare_part, files, output, part, TERABYTE)
    assert "no part of" in refused(merge_parts, files, output, TERABYTE)
    frame = pl.DataFrame({"label": [0, 1], "c": ["a", "b"]})
    assert "cannot be prepared in parts" in refused(
        prepare_part, frame, output, "1/1", PrepareConfig(categorical=("c",))
    )
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]
    prepare_part(files, output, "2/3", TERABYTE)
    said = refused(merge_parts, files, output, TERABYTE)
    assert "parts 1/3, 3/3 are not read yet" in said
    assert "run --part 1/3 and --part 3/3 to the end before --merge" in said
    other = dataclasses.replace(TERABYTE, min_count=2)
    for call in (
        lambda: prepare_part(files, output, "1/3", other),
        lambda: merge_parts(files, output, other),
    ):
        assert "part 2 in" in (said := refused(call))
        assert "was started with min_count 1, not 2; give all parts the same files and options" in said
    assert "was started in 3 parts, not in 2" in refused(prepare_part, files, output, "1/2", TERABYTE)
    assert "holds a preparation in parts" in refused(prepare, files, output, TERABYTE)
    assert "was started from other files (day_4)" in refused(prepare_part, files[:4], output, "1/3", TERABYTE)
    write(files[0], criteo_lines(9))
    assert "was started before day_0 changed" in refused(prepare_part, files, output, "1/3", TERABYTE)
    files[0].unlink()
    assert "cannot read" in refused(prepare_part, files, output, "1/3", TERABYTE)


def test_one_go_and_parts_do_not_mix(tmp_path):
    files, output = days(tmp_path), tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARKER).write_text("{}")
    assert "in one go is doing or left" in refused(prepare_part, files, output, "1/2", TERABYTE)
    (tmp_path / "out.partial" / MARKER).unlink()
    (tmp_path / "out.partial" / "mine").touch()
    assert "was not created by dqrm prepare" in refused(prepare_part, files, output, "1/2", TERABYTE)
    assert os.listdir(tmp_path / "out.partial") == ["mine"]


def test_two_processes_on_one_part(tmp_path):
    files, output, said = days(tmp_path), tmp_path / "out", []

    def meanwhile(what, done, total):
        if not said:
            said.append(refused(prepare_part, files, output, "1/2", TERABYTE))

    prepare_part(files, output, "1/2", TERABYTE, meanwhile)
    assert said == [f"another process is working on part 1/2 of {output}"]


def test_shares_follow_each_other_and_are_of_like_size():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.choice([0, 1, 5, 1000]) for _ in range(draw.randint(1, 30))]
        count = draw.randint(1, len(sizes))
        made = shares(sizes, count)
        assert [at for share in made for at in share] == list(range(len(sizes)))
        assert len(made) == count
        assert all(len(share) for share in made)
    assert [len(share) for share in shares([10] * 24, 4)] == [6] * 4
    assert [len(share) for share in shares([1, 1, 1, 97], 2)] == [3, 1]


def test_a_full_disk_keeps_what_is_done(tmp_path, small_disk):
    files, disk = days(tmp_path, 2), small_disk(600)
    prepare_part(files, disk / "out", "1/2", TERABYTE)
    (disk / "big").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    said = refused(prepare_part, files, disk / "out", "2/2", TERABYTE)
    assert "the disk is full (No space left on device); what was done before is kept, and the same command" in said
    assert sorted(os.listdir(disk)) == ["big", "out.partial"]
    (disk / "big").unlink()
    same(in_parts(files, disk / "out", TERABYTE, 2, again=True), prepare(files, tmp_path / "whole", TERABYTE))


@pytest.mark.slow
def test_sigkill_of_parts_at_forty_random_moments(tmp_path):
    files = [write(tmp_path / f"day_{day}", criteo_lines(200, seed=day)) for day in range(4)]
    whole = prepare(files, tmp_path / "whole", TERABYTE)
    kill_often(40, partial(prepare_in_parts, files, TERABYTE), tmp_path, lambda out: same(Dataset(out), whole))


def step_of(files, done, number, output):
    """Step `number` of a preparation in two parts (each read, both merged, each written), after those that `done` has;
    what a process can be started with."""
    partial_of = output.with_name(f"{output.name}.partial")
    if done and not output.exists() and not partial_of.exists():
        copy = shutil.copytree(done, tempfile.mkdtemp(dir=output.parent), dirs_exist_ok=True)
        os.rename(copy, partial_of)  # at once: it may be killed
    if number == 2:
        merge_parts(files, output, TERABYTE)
    else:
        prepare_part(files, output, "1/2" if number in (0, 3) else "2/2", TERABYTE)


@pytest.mark.product
@pytest.mark.parametrize("number", range(5), ids=["read 1/2", "read 2/2", "merge", "write 1/2", "write 2/2"])
def test_sigkill_of_a_step_at_twenty_random_moments(tmp_path, number):
    files = [write(tmp_path / f"day_{day}", criteo_lines(200, seed=day)) for day in range(4)]
    whole, done = prepare(files, tmp_path / "whole", TERABYTE), None
    for before in range(number):
        step_of(files, None, before, tmp_path / "done")
        done = tmp_path / "done.partial"

    def ended(output):
        for after in range(number + 1, 5):
            step_of(files, None, after, output)
        same(Dataset(output), whole)

    kill_often(20, partial(step_of, files, done, number), tmp_path, ended)
