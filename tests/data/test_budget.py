"""`--memory`: sizes as users write them, the same bytes whatever the budget, and ids that do not fit."""

import dataclasses
import re

import pytest

from cli_helpers import command
from data_helpers import KAGGLE, content, criteo_lines, table, write
from dqrm.data import budget
from dqrm.data.budget import Budget, OverBudget, parse
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.staging import Staging


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("800mb", 8 * 10**8), ("1.5GiB", 3 * 2**29), (" 2 G ", 2 * 10**9), ("1TiB", 2**40)],
)
def test_sizes_as_users_write_them(text, size):
    assert parse(text) == size
    assert PrepareConfig(categorical=("a",), memory=text).memory == text


@pytest.mark.parametrize("text", ["", "2", "2000000000", "lots", "-1GB", "2GBit", "1,5GB", "GB", "nan GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=rf"^memory is '{re.escape(text)}', expected a number and its unit, as in 2GB"):
        parse(text)


@pytest.mark.parametrize("text", ["0GB", "100MB", "0.5GB", "699MB"])
def test_what_is_too_small_to_work_with_is_refused(text):
    with pytest.raises(ValueError, match=rf"^memory is '{text}', expected at least \d+MB"):
        PrepareConfig(categorical=("a",), memory=text)


def chunks_of(path, config, monkeypatch, size):
    """Prepare with chunks of `size` bytes; returns how many rows each had, and the dataset's bytes."""
    monkeypatch.setattr(Budget, "chunk_bytes", property(lambda self: size))
    rows, original = [], Staging.add

    def add(self, frames, note):
        rows.extend(frame.height for frame in frames)
        original(self, frames, note)

    monkeypatch.setattr(Staging, "add", add)
    log = write(path / "train.txt", criteo_lines(1400)) if not (path / "train.txt").exists() else path / "train.txt"
    made = path / f"data{size}"
    dataset = prepare(log, made, config)
    monkeypatch.undo()
    return rows, content(dataset)


def test_a_budget_changes_chunks_and_no_byte(tmp_path, monkeypatch):
    whole, before = chunks_of(tmp_path, KAGGLE, monkeypatch, None)
    small, after = chunks_of(tmp_path, dataclasses.replace(KAGGLE, memory="1GB"), monkeypatch, 20_000)
    assert whole == [1400]
    assert sum(small) == 1400
    assert max(small) < 200
    assert after == before


def test_the_budget_decides_the_size_of_chunks():
    sizes = [Budget(text).chunk_bytes for text in (None, "750MB", "1GB", "2GB")]
    assert sizes[0] is None
    assert sizes[1:] == sorted(set(sizes[1:]))


def test_ids_that_do_not_fit_are_refused_and_the_same_command_with_more_resumes(tmp_path, monkeypatch):
    rows = [{"label": n % 2, "user": n % 77, "movie": n * n % 501} for n in range(900)]
    log = table(tmp_path / "log.csv", rows)
    config = PrepareConfig(categorical=("user", "movie"), chunk_rows=100, memory="1GB")
    whole = prepare(log, tmp_path / "whole", dataclasses.replace(config, memory=None))
    used = iter([10**8] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(budget, "resident", lambda: next(used, 10**9))
        with pytest.raises(
            OverBudget, match=r"^column \w+ has too many ids for memory 1GB: 1\.00 GB are in use, and to"
        ):
            prepare(log, tmp_path / "data", config)
    assert (tmp_path / "data.partial" / "work").is_dir()
    assert not (tmp_path / "data").exists()
    told = []
    made = prepare(log, tmp_path / "data", dataclasses.replace(config, memory="2GB"), log=told.append)
    assert told == [f"resuming {(tmp_path / 'data.partial').resolve()}: 900 rows have been read"]
    assert content(made) == content(whole)


def test_the_flag(tmp_path, capsys):
    log = write(tmp_path / "train.txt", criteo_lines(50))
    code, _, errors = command(
        capsys, "prepare", log, "--layout", "criteo-kaggle", "-o", tmp_path / "data", "--memory", "5 apples"
    )
    assert code == 2
    assert "memory is '5 apples', expected a number and its unit, as in 2GB, 800MB or 1.5GiB" in " ".join(
        errors.split()
    )
    assert (
        command(capsys, "prepare", log, "--layout", "criteo-kaggle", "-o", tmp_path / "data", "--memory", "2GB")[0] == 0
    )
