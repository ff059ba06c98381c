"""Reading a dataset folder: what it refuses, and the order of batches."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from dqrm.data import batches, folder
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Column, Dataset
from dqrm.data.prepare import prepare
from dqrm.errors import UserError

ROWS = 1003


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """All rows in train; column n is the row's number, and each row has as many tags as its number modulo 4."""
    path = tmp_path_factory.mktemp("data")
    tags = ["|".join(f"t{k}" for k in range(n % 4)) for n in range(ROWS)]
    text = "label,n,c,tags\n" + "".join(f"{n % 2},{n},c{n},{tags[n]}\n" for n in range(ROWS))
    (path / "log.csv").write_text(text)
    config = PrepareConfig(
        dense=("n",),
        categorical=("c", "tags"),
        multi=("tags",),
        dense_transform="none",
        split="time",
        validation_fraction=0,
        test_fraction=0,
    )
    return prepare([path / "log.csv"], path / "out", config)


def order(batches):
    return [int(n) for batch in batches for n in batch.dense[:, 0]]


def test_what_it_says(dataset):
    assert dataset.columns == (Column("c", ROWS + 1), Column("tags", 4, multi=True))
    assert dataset.table_rows == (ROWS + 1, 4)
    assert (dataset.num_single, dataset.dense) == (1, ("n",))
    assert dataset.rows == {"train": ROWS, "validation": 0, "test": 0}
    dataset.validate()


@pytest.mark.parametrize("shuffle", ["none", "block", "global"])
@pytest.mark.parametrize("size", [1, 5, 128, 1003, 4000])
def test_each_row_once_with_its_own_values(dataset, monkeypatch, shuffle, size):
    monkeypatch.setattr(batches, "_GATHER_ROWS", 256)
    split = dataset.split("train")
    found = list(split.batches(size, shuffle=shuffle, seed=3, block_rows=16))
    assert len(found) == split.num_batches(size)
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    assert sorted(order(found)) == list(range(ROWS))
    for batch in found:
        rows = batch.dense[:, 0].long()
        assert batch.dense.dtype == torch.float32
        assert batch.labels.dtype == torch.float32
        assert batch.ids.dtype == torch.int32
        assert torch.equal(batch.labels, (rows % 2).float())
        assert torch.equal(batch.ids[:, 0].long(), rows + 1)
        ((values, offsets),) = batch.bags
        assert (values.dtype, offsets.dtype) == (torch.int32, torch.int64)
        lengths = torch.diff(torch.cat([offsets, torch.tensor([len(values)])]))
        assert torch.equal(lengths, rows % 4)
        assert values.tolist() == [k + 1 for n in rows for k in range(n % 4)]


@pytest.mark.parametrize("shuffle", ["none", "block", "global"])
def test_starting_later_gives_the_tail(dataset, monkeypatch, shuffle):
    monkeypatch.setattr(batches, "_GATHER_ROWS", 100)
    split = dataset.split("train")
    whole = order(split.batches(10, shuffle=shuffle, seed=1, epoch=2, block_rows=3))
    for start in (0, 1, 9, 10, 37, 100, 101, 500):
        tail = order(split.batches(10, shuffle=shuffle, seed=1, epoch=2, block_rows=3, start_batch=start))
        assert tail == whole[start * 10 :]


def test_the_order_of_blocks_is_the_documented_one(dataset):
    """Written out: 32 blocks at a time are mixed, each time by a generator of its own, and a run may begin anywhere."""

    def generator(*seeds):
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))

    blocks, expected = generator(1, 2).permutation(-(-ROWS // 3)), []
    for number, at in enumerate(range(0, len(blocks), 32)):
        rows = [row for block in blocks[at : at + 32] for row in range(3 * block, min(3 * block + 3, ROWS))]
        generator(1, 2, 1 + number).shuffle(rows)
        expected += rows
    split = dataset.split("train")
    for start in (0, 1, 95, 96, 97, 98, 1002):
        found = order(split.batches(1, shuffle="block", seed=1, epoch=2, block_rows=3, start_batch=start))
        assert found == expected[start:]


@pytest.mark.parametrize("shuffle", ["block", "global"])
def test_the_order_depends_on_seed_and_epoch_alone(dataset, shuffle):
    split = dataset.split("train")

    def rows(size, **fields):
        return order(split.batches(size, shuffle=shuffle, block_rows=8, **fields))

    assert rows(7, seed=1, epoch=1) == rows(64, seed=1, epoch=1)
    assert len({tuple(rows(64, seed=seed, epoch=epoch)) for seed in (0, 1, 2) for epoch in (0, 1)}) == 6
    assert rows(64) != list(range(ROWS))


def test_drop_last(dataset):
    split = dataset.split("train")
    assert split.num_batches(100, drop_last=True) == 10
    for shuffle in ("none", "block", "global"):
        assert [len(batch) for batch in split.batches(100, shuffle=shuffle, drop_last=True)] == [100] * 10


def test_empty_split_and_empty_start(dataset):
    assert list(dataset.split("test").batches(4, shuffle="global")) == []
    assert dataset.split("test").labels().shape == (0,)
    assert list(dataset.split("train").batches(100, start_batch=11)) == []


def test_batches_can_move(dataset):
    batch = next(dataset.split("train").batches(5)).to("cpu", non_blocking=True)
    assert len(batch) == 5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 1, "seed": -1}, "seed: got -1"),
        ({"batch_size": 1, "start_batch": -1}, "start_batch: got -1"),
        ({"batch_size": 1, "shuffle": "some"}, "shuffle: got 'some'"),
    ],
)
def test_impossible_batches_are_refused_at_once(dataset, fields, reason):
    with pytest.raises(UserError, match=reason):
        dataset.split("train").batches(**fields)


def test_unknown_names(dataset):
    with pytest.raises(UserError, match=r"no split 'tran' in .*did you mean 'train'"):
        dataset.split("tran")
    with pytest.raises(UserError, match="no categorical column 'cc'"):
        dataset.vocabulary_path("cc")


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset.path, tmp_path / "copy")


def test_folders_that_are_none(tmp_path, copy):
    with pytest.raises(UserError, match="is not a folder"):
        Dataset(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        Dataset(tmp_path / "empty")
    (copy / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Dataset(copy)


def test_another_format_version(copy):
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**info, "format_version": 7}))
    with pytest.raises(UserError, match="format version 7, this dqrm reads versions 1 and 2; prepare the data again"):
        Dataset(copy)


@pytest.mark.parametrize("key", ["schema", "rows", "clicks", "values", "fingerprint", "split"])
def test_a_description_that_lacks_something(copy, key):
    info = json.loads((copy / "dataset.json").read_text())
    for spoilt in ({k: v for k, v in info.items() if k != key}, {**info, key: None}):
        if spoilt.get(key, 0) is None and key in ("fingerprint", "split"):
            continue
        (copy / "dataset.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match=r"is damaged: its dataset\.json .*; prepare the data again"):
            Dataset(copy)


def test_missing_and_wrongly_sized_files(copy):
    ids = copy / "train" / "ids.i32"
    data = ids.read_bytes()
    ids.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"train/ids.i32 has {len(data) - 1} bytes, expected {len(data)}"):
        Dataset(copy)
    ids.unlink()
    with pytest.raises(UserError, match=r"train/ids\.i32 is missing"):
        Dataset(copy)


@pytest.mark.parametrize(
    ("file", "dtype", "value", "reason"),
    [
        (folder.IDS, "<i4", ROWS + 1, f"column c holds the id {ROWS + 1}, but its table has {ROWS + 1} rows"),
        (folder.IDS, "<i4", -1, "column c holds the id -1"),
        ("01.values.i32", "<i4", 4, "column tags holds the id 4, but its table has 4 rows"),
        ("01.offsets.i64", "<i8", -1, "damaged offsets of column tags"),
        (folder.DENSE, "<f4", np.nan, "column n holds a number that is not finite"),
        (folder.LABEL, "u1", 2, "the label 2 is neither 0 nor 1"),
    ],
)
def test_validate_finds(copy, file, dtype, value, reason):
    array = np.fromfile(copy / "train" / file, dtype)
    array[500] = value
    array.tofile(copy / "train" / file)
    dataset = Dataset(copy)
    dataset.validate("test")
    with pytest.raises(UserError, match=f"split train: {reason}"):
        dataset.validate("train")


def test_a_split_is_not_loaded_whole(tmp_path):
    """400 MB are read, and at no time are 60 MB of them copied."""
    rows, width = 4_000_000, 25
    info = {
        "format_version": 1,
        "fingerprint": "0" * 64,
        "schema": {"dense": [f"d{n}" for n in range(width)], "columns": []},
        "rows": {"train": rows, "validation": 0, "test": 0},
        "clicks": {"train": 0, "validation": 0, "test": 0},
        "split": {},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    for name in folder.SPLITS:
        (tmp_path / name).mkdir()
        for file, (dtype, shape) in folder.arrays(info, name).items():
            with (tmp_path / name / file).open("wb") as sparse:
                sparse.truncate(dtype.itemsize * int(np.prod(shape)))
    # Mapped pages are the system's to drop; what is copied is ours.
    code = f"""
from dqrm.data.dataset import Dataset
dataset = Dataset({str(tmp_path)!r})
def private():
    return sum(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if line.startswith('Private_Dirty'))
before = private()
for shuffle in ("none", "block", "global"):
    for number, batch in enumerate(dataset.split("train").batches(2048, shuffle=shuffle)):
        if number % 500 == 499:
            print((private() - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert all(int(megabytes) < 60 for megabytes in found), found
