"""More columns than a process may have open files, and disks that are full: prepare, read, score."""

import os
import resource
from contextlib import contextmanager

import polars as pl
import pytest
import torch

from data_helpers import KAGGLE, criteo_lines, write
from dqrm import Dataset, PrepareConfig, UserError
from dqrm.data.batches import _MOST_MAPS
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.files import why_not_written
from dqrm.serving.writer import predict


@contextmanager
def open_files(most):
    """At most so many more than there are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("multi", [False, True])
def test_columns_need_no_files_of_their_own(tmp_path, multi):
    names = tuple(f"c{n}" for n in range(2 * _MOST_MAPS))
    rows = [{"label": row % 2, **dict.fromkeys(names, f"{row % 5}|{row % 3}")} for row in range(30)]
    pl.DataFrame(rows).write_csv(tmp_path / "log.csv")
    config = PrepareConfig(categorical=names, multi=names if multi else (), chunk_rows=8, split="time")
    with open_files(60):
        dataset = prepare(tmp_path / "log.csv", tmp_path / "data", config)
        dataset.validate()
        splits = [Dataset(dataset.path).split(name) for name in ("train", "validation", "test")]
        read = [next(iter(split.batches(64))) for split in splits]
        columns = dataset.info["schema"]["columns"]
        vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
        ((_, batch),) = RawLog(tmp_path / "log.csv", RawEncoder(config, columns, vocabularies)).blocks()
    trained = len(read[0])
    if multi:
        for (values, offsets), (raw_values, raw_offsets) in zip(read[0].bags, batch.bags):
            assert offsets.tolist() == raw_offsets[:trained].tolist()
            assert values.tolist() == raw_values[: len(values)].tolist()
            assert len(set(values.tolist())) > 1
    else:
        assert torch.equal(read[0].ids, batch.ids[:trained])
        assert read[0].ids.unique().numel() > 1


# Staging, then vocabularies, then the arrays are what does not fit.
@pytest.mark.parametrize("kilobytes", [20, 300, 500])
def test_prepare_on_a_full_disk(tmp_path, small_disk, kilobytes):
    log = write(tmp_path / "log.txt", criteo_lines(2000))
    disk = small_disk(kilobytes)
    with pytest.raises(UserError, match=r"cannot write to .*out\.partial: the disk is full"):
        prepare(log, disk / "out", KAGGLE)
    assert os.listdir(disk) == []


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_predictions_on_a_full_disk(tmp_path, small_disk, suffix):
    log = write(tmp_path / "log.txt", criteo_lines(2000))
    dataset = prepare(log, tmp_path / "data", KAGGLE)
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    opened = RawLog(log, RawEncoder(KAGGLE, columns, vocabularies, keep=tuple(f"C{n}" for n in range(1, 27))))
    disk = small_disk(12)
    with pytest.raises(UserError, match=r"cannot write to .*: the disk is full"):
        predict(lambda batch: torch.randn(len(batch)), opened, disk / f"p{suffix}")
    assert os.listdir(disk) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (OSError("No space left on device (os error 28)"), "the disk is full"),
        (pl.exceptions.ComputeError("failed: No space left on device (os error 28): x"), "the disk is full"),
        (OSError(122, "Disk quota exceeded"), "the disk quota"),
        (OSError(13, "Permission denied"), "Permission denied"),
        (OSError(), "OSError"),
    ],
)
def test_why_something_was_not_written(error, said):
    assert why_not_written(error).startswith(said)
