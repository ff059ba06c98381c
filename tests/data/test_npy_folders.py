"""Folders of `.npy` files as TorchRec's Criteo scripts write them: the ids of the raw lines, damage in one sentence."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data_helpers import content, criteo_lines, write
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from format_helpers import hexadecimal, torchrec

NPY = PrepareConfig(layout="criteo-npy", dense_transform="none", split="random")


@pytest.fixture(scope="module")
def rows():
    return hexadecimal(criteo_lines(203))


@pytest.fixture
def folder(tmp_path, rows):
    path = tmp_path / "npy"
    path.mkdir()
    torchrec(path, 0, [line.replace("\t-1", "\t1").replace("\t-2", "\t2") for line in rows])
    return path


def test_torchrec_folders_give_the_ids_of_the_raw_lines_and_their_own_dense_values(tmp_path, rows):
    folder = tmp_path / "npy"
    folder.mkdir()
    cut = [line.replace("\t-1\t", "\t0\t").replace("\t-2\t", "\t0\t") for line in rows]
    cut = [line.replace("\t-1\t", "\t0\t").replace("\t-2\t", "\t0\t") for line in cut]
    for day, lines in enumerate((cut[:150], cut[150:])):
        torchrec(folder, day, lines)
        write(tmp_path / f"day_{day}", lines)
    config = PrepareConfig(layout="criteo-npy", dense_transform="none")
    dataset = prepare(folder, tmp_path / "data", config)
    raw = prepare([tmp_path / "day_0", tmp_path / "day_1"], tmp_path / "raw", PrepareConfig(layout="criteo-terabyte"))
    ours, theirs = content(dataset), content(raw)
    for name, expected in theirs.items():
        if not name.endswith("dense.f32"):
            assert ours[name] == expected, name
    lines = [line.split("\t") for line in cut[:150]]
    logarithms = np.array([[math.log(int(x or 0) + 3) for x in line[1:14]] for line in lines], np.float32)
    assert np.array_equal(dataset.split("train").arrays["dense.f32"], logarithms)
    assert [source["name"] for source in dataset.info["sources"]] == ["day_0", "day_1"]
    assert dataset.info["sources"][0]["bytes"] == sum(file.stat().st_size for file in folder.glob("day_0_*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "day_0_labels.npy").unlink(), r"has no day_0_labels\.npy beside it"),
        (lambda path: (path / "notes.txt").touch(), "is none of the files of layout criteo-npy, expected day"),
        (lambda path: (path / "day_0_sparse_contig_freq.npy").touch(), "are two files of the same rows, expected one"),
        (lambda path: np.save(path / "day_0_dense.npy", np.zeros((203, 12), np.float32)), r"expected \[rows, 13\]"),
        (lambda path: np.save(path / "day_0_labels.npy", np.zeros(9, np.int32)), "expected as many in each"),
        (lambda path: (path / "day_0_dense.npy").write_bytes(b"text"), r"day_0_dense\.npy is no array of NumPy"),
        (
            lambda path: (path / "day_0_dense.npy").write_bytes((path / "day_0_dense.npy").read_bytes()[:-4]),
            r"is truncated or damaged: day_0_dense\.npy has",
        ),
        (lambda path: np.save(path / "day_0_sparse.npy", np.full((203, 26), -1)), "row 1: column C1 holds -1"),
    ],
)  # fmt: skip
def test_npy_folders_that_are_not_whole_are_refused(tmp_path, folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        prepare(folder, tmp_path / "data", NPY)
    assert "\n" not in str(caught.value)


def test_dense_values_are_not_transformed_twice(tmp_path, folder):
    with pytest.raises(UserError, match=r"day_0 holds dense values \(I1\) that TorchRec's scripts have transformed"):
        prepare(folder, tmp_path / "data", replace(NPY, dense_transform="log1p"))
    np.save(folder / "day_0_dense.npy", np.full((203, 13), 5, np.int32))
    dataset = prepare(folder, tmp_path / "data", replace(NPY, dense_transform="log1p"))
    assert np.all(dataset.split("train").arrays["dense.f32"] == np.float32(math.log1p(5)))


def test_a_part_that_changes_while_it_is_read_is_noticed(tmp_path, folder):
    def grow(stage, done, total):
        with (folder / "day_0_sparse.npy").open("ab") as file:
            file.write(b"\0")

    with pytest.raises(UserError, match=r"day_0_sparse\.npy changed while it was read"):
        # Several blocks: the one after the next is not read before the first is through.
        prepare(folder, tmp_path / "data", replace(NPY, chunk_rows=50), progress=grow)
