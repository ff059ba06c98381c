"""Criteo's logs in the arrays of other programs: the same model inputs as the raw lines, and damage in one sentence."""

import gzip
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from data_helpers import content, criteo_lines, write
from dqrm.data.config import CRITEO_CATEGORICAL, PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build
from extension_helpers import ids_of
from format_helpers import dlrm, hexadecimal, records, torchrec
from hash_helpers import rows_of

RAW = PrepareConfig(layout="criteo-kaggle")


def transposed(arrays):
    """In Fortran's order, as DLRM saves what it has transposed."""
    return {name: np.asfortranarray(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def rows():
    return hexadecimal(criteo_lines(203))


@pytest.fixture(scope="module")
def raw(rows, tmp_path_factory):
    """The dataset of the raw lines."""
    folder = tmp_path_factory.mktemp("raw")
    return prepare(write(folder / "train.txt", rows), folder / "data", RAW)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", [dict, transposed])
@pytest.mark.parametrize("chunk_rows", [50, 262_144])
def test_dlrm_arrays_give_the_inputs_of_the_raw_lines(tmp_path, raw, rows, save, order, chunk_rows):
    path = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    save(path, **order(dlrm(rows)))
    dataset = prepare(path, tmp_path / "data", PrepareConfig(layout="dlrm-kaggle", chunk_rows=chunk_rows))
    assert content(dataset) == content(raw)
    assert dataset.table_rows == raw.table_rows
    assert dataset.rows == raw.rows
    (source,) = dataset.info["sources"]
    assert (source["rows"], source["bytes"]) == (203, path.stat().st_size)
    dataset.validate()


def dlrm_loader(arrays):
    """What DLRM's loader of the Kaggle log hands to a model, per split: dense values, ids, labels."""
    *six, seventh = np.array_split(np.arange(len(arrays["y"])), 7)
    test, validation = np.array_split(seventh, 2)
    dense = np.log(arrays["X_int"].astype(np.float32) + np.float32(1))
    for name, chosen in (("train", np.concatenate(six)), ("test", test), ("validation", validation)):
        yield name, dense[chosen], arrays["X_cat"][chosen].astype(np.int64), arrays["y"][chosen]


@pytest.mark.parametrize("from_lines", [False, True])
def test_a_model_gets_what_dlrm_gives_its_own(tmp_path, raw, rows, from_lines):
    """Of DLRM's arrays, and of the lines that they were made of: equal up to the numbers of the ids' rows."""
    arrays, dataset = dlrm(rows), raw
    if not from_lines:
        np.savez(tmp_path / "a.npz", **arrays)
        dataset = prepare(tmp_path / "a.npz", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle"))
    tables = [{} for _ in range(26)]
    unseen = 0
    for name, dense, ids, labels in dlrm_loader(arrays):
        batches = list(dataset.split(name).batches(16))
        # DLRM takes the logarithm in single precision.
        np.testing.assert_allclose(np.concatenate([batch.dense for batch in batches]), dense, rtol=1e-6, atol=1e-7)
        assert np.concatenate([batch.labels for batch in batches]).tolist() == labels.tolist()
        if name == "train":
            for row in ids.tolist():
                for table, number in zip(tables, row):
                    table.setdefault(number, len(table) + 1)
        wanted = [[table.get(number, 0) for table, number in zip(tables, row)] for row in ids.tolist()]
        assert np.concatenate([batch.ids for batch in batches]).tolist() == wanted
        unseen += sum(row.count(0) for row in wanted)
    assert unseen
    assert dataset.table_rows == tuple(len(table) + 1 for table in tables)


@pytest.mark.parametrize("hashes", [1, 2])
def test_ids_of_arrays_are_hashed_as_numbers(tmp_path, rows, hashes):
    arrays = dlrm(rows)
    np.savez(tmp_path / "a.npz", **arrays)
    config = PrepareConfig(layout="dlrm-kaggle", vocabulary="hash", rows=23, hashes=hashes, cross=("C1*C2",))
    dataset = prepare(tmp_path / "a.npz", tmp_path / "data", config)
    wanted = []
    for line in arrays["X_cat"].astype(int).tolist():
        cross = f"{line[0]}\x1f{line[1]}"
        cells = [rows_of(number, 23, seed, hashes, 4) for seed, number in enumerate(line)]
        wanted.append([*cells, rows_of(cross, 23, 26, hashes)])
    assert [row for name in ("train", "test", "validation") for row in ids_of(dataset, name)] == wanted


def test_days_of_dlrm_give_the_inputs_of_the_raw_days(tmp_path, rows):
    days = [rows[:60], rows[60:61], rows[61:130], rows[130:]]
    whole = dlrm(rows)
    at = 0
    for day, lines in enumerate(days):
        write(tmp_path / f"day_{day}", lines)
        part = {name: whole[name][at : at + len(lines)] for name in ("X_cat", "X_int", "y")}
        np.savez_compressed(tmp_path / f"day_{day}_reordered.npz", **part)
        at += len(lines)
    raw = prepare(
        [tmp_path / f"day_{day}" for day in range(4)], tmp_path / "a", PrepareConfig(layout="criteo-terabyte")
    )
    config = PrepareConfig(layout="dlrm-terabyte")
    dataset = prepare(str(tmp_path / "day_*_reordered.npz"), tmp_path / "b", config)
    assert content(dataset) == content(raw)
    assert [source["rows"] for source in dataset.info["sources"]] == [60, 1, 69, 73]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_rows", [50, 262_144])
def test_mlperf_records_give_the_inputs_of_the_raw_lines(tmp_path, raw, rows, packed, chunk_rows):
    data = records(dlrm(rows))
    path = tmp_path / "terabyte_processed_train.bin"
    path.write_bytes(gzip.compress(data) if packed else data)
    dataset = prepare(
        path, tmp_path / "data", PrepareConfig(layout="mlperf-binary", split="time", chunk_rows=chunk_rows)
    )
    in_order = PrepareConfig(layout="criteo-terabyte", split="time")
    assert content(dataset) == content(prepare(write(tmp_path / "x.txt", rows), tmp_path / "raw", in_order))
    assert dataset.info["sources"][0]["bytes"] == path.stat().st_size


def test_a_cap_takes_ids_modulo(tmp_path, rows):
    arrays = dlrm(rows)
    np.savez(tmp_path / "a.npz", **arrays)
    dataset = prepare(tmp_path / "a.npz", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle", max_rows_per_table=7))
    train = arrays["X_cat"][: dataset.rows["train"]].astype(int) % 7
    for column in range(26):
        table = {}
        wanted = [table.setdefault(key, len(table) + 1) for key in train[:, column].tolist()]
        assert dataset.split("train").arrays["ids.i32"][:, column].tolist() == wanted


def test_crosses_and_groups(tmp_path, rows):
    arrays = dlrm(rows)
    np.savez(tmp_path / "a.npz", **arrays)
    config = PrepareConfig(layout="dlrm-kaggle", cross=("C1*C2", "I1*C3"), group="C4")
    dataset = prepare(tmp_path / "a.npz", tmp_path / "data", config)
    train = dataset.rows["train"]
    table = {}
    pairs = [tuple(pair) for pair in arrays["X_cat"][:train, :2].tolist()]
    wanted = [table.setdefault(pair, len(table) + 1) for pair in pairs]
    assert dataset.split("train").arrays["ids.i32"][:, 26].tolist() == wanted
    groups = {}
    wanted = [groups.setdefault(key, len(groups)) for key in arrays["X_cat"][:train, 3].tolist()]
    assert dataset.split("train").arrays["group.i32"].tolist() == wanted


def encoder(dataset, **more):
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    return RawEncoder(build(PrepareConfig, dataset.info["options"], "options"), columns, vocabularies, **more)


@pytest.mark.parametrize("layout", ["dlrm-kaggle", "mlperf-binary", "criteo-npy"])
def test_logs_to_be_scored_are_read_the_same_way(tmp_path, rows, layout):
    arrays = dlrm(rows)
    sources = tmp_path / "log.npz"
    if layout == "criteo-npy":
        sources = tmp_path / "npy"
        sources.mkdir()
        torchrec(sources, 0, [line.replace("\t-1", "\t1").replace("\t-2", "\t2") for line in rows])
    elif layout == "mlperf-binary":
        sources.write_bytes(records(arrays))
    else:
        np.savez(sources, **arrays)
    transform = "none" if layout == "criteo-npy" else "log1p"
    dataset = prepare(sources, tmp_path / "data", PrepareConfig(layout=layout, split="time", dense_transform=transform))
    steps = []
    log = RawLog(sources, encoder(dataset, keep=("C2", "label")))
    ids, kept = [], []
    for frame, batch in log.blocks(steps.append):
        ids += batch.ids.tolist()
        kept += frame["label"].to_list()
    order = ("train", "test", "validation") if layout == "dlrm-kaggle" else ("train", "validation", "test")
    assert ids == [row for name in order for row in dataset.split(name).arrays["ids.i32"].tolist()]
    assert kept == arrays["y"].tolist()
    assert log.rows == 203
    assert sum(steps) == log.size


def test_rows_in_memory_are_scored_by_a_model_of_arrays(tmp_path, rows):
    arrays = dlrm(rows)
    np.savez(tmp_path / "a.npz", **arrays)
    dataset = prepare(tmp_path / "a.npz", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle"))
    from dqrm.data.ingest import check
    from dqrm.data.tables import rows_source

    names = [*(f"I{n}" for n in range(1, 14)), *CRITEO_CATEGORICAL]
    values = np.hstack([arrays["X_int"], arrays["X_cat"]])[:20].astype(int).tolist()
    source = rows_source([dict(zip(names, line)) for line in values])
    known = encoder(dataset)
    check([source], known.plan)
    (block,) = known.blocks(source)
    assert block.batch.ids.tolist() == dataset.split("train").arrays["ids.i32"][:20].tolist()
    fraction = rows_source([dict(zip(names, [*values[0][:-1], 1.5]))])
    check([fraction], known.plan)
    with pytest.raises(UserError, match=r"column C26 holds 1.5, expected a whole number from 0 to 4294967295"):
        list(known.blocks(fraction))


def changed(arrays, **to):
    return {name: array for name, array in {**arrays, **to}.items() if array is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed(a, X_cat=None), "holds X_int, y, counts, expected X_cat, X_int and y"),
        (lambda a: changed(a, X_cat=a["X_cat"][:, :25]), r"X_cat has the shape \[203, 25\], expected \[rows, 26\]"),
        (lambda a: changed(a, X_int=a["X_int"].reshape(-1)), r"X_int has the shape \[2639\], expected \[rows, 13\]"),
        (
            lambda a: changed(a, y=a["y"][:, None, None]),
            r"y has the shape \[203, 1, 1\], expected \[rows\] or \[rows, 1\]",
        ),
        (lambda a: changed(a, y=a["y"][:5]), "y has 5 rows, X_int has 203 rows, X_cat has 203 rows, expected as many"),
        (lambda a: changed(a, X_int=a["X_int"].astype("U3")), "X_int holds <U3, expected integers or floats"),
        (lambda a: changed(a, X_int=a["X_int"].astype(object)), "X_int holds Python objects, expected numbers"),
        (lambda a: changed(a, X_cat=a["X_cat"].astype(complex)), "X_cat holds complex128, expected integers or floats"),
        (lambda a: changed(a, counts=a["counts"][:3]), r"counts has the shape \[3\] and holds int32, expected \[26\]"),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused_in_one_sentence(tmp_path, rows, change, message):
    np.savez(tmp_path / "log.npz", **change(dlrm(rows)))
    with pytest.raises(UserError, match=r"log\.npz.*" + message) as caught:
        prepare(tmp_path / "log.npz", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("X_cat", (4, 2), -1, "row 5: column C3 holds -1.0, expected a whole number from 0 to 4294967295"),
        ("X_cat", (4, 2), 0.5, "row 5: column C3 holds 0.5, expected a whole number from 0 to"),
        ("X_cat", (0, 0), np.nan, "row 1: column C1 holds nan, expected a whole number"),
        ("X_cat", (0, 0), 2.0**32, "row 1: column C1 holds 4.29497e.09, expected an id below its count"),
        ("X_cat", (202, 25), 31, "row 203: column C26 holds 31, expected an id below its count, [0-9]+$"),
        ("y", 7, 2, "row 8: column label holds 2, expected 0 or 1"),
    ],
)
def test_values_out_of_range_are_refused_or_skipped(tmp_path, rows, name, at, value, message):
    arrays = dlrm(rows)
    arrays[name][at] = value
    np.savez_compressed(tmp_path / "log.npz", **arrays)
    config = PrepareConfig(layout="dlrm-kaggle")
    with pytest.raises(UserError, match=r"log\.npz, " + message):
        prepare(tmp_path / "log.npz", tmp_path / "data", config)
    dataset = prepare(tmp_path / "log.npz", tmp_path / "data", replace(config, on_error="skip"))
    assert dataset.info["lines_skipped"] == 1
    assert sum(dataset.rows.values()) == 202


def test_an_id_beyond_32_bits_is_refused_without_counts_too(tmp_path, rows):
    arrays = changed(dlrm(rows), counts=None)
    arrays["X_cat"][3, 3] = 2.0**32
    np.savez(tmp_path / "log.npz", **arrays)
    with pytest.raises(UserError, match=r"log\.npz, row 4: column C4 holds 4294967296.0, expected a whole number"):
        prepare(tmp_path / "log.npz", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", [dict, transposed])
def test_damaged_archives_are_refused(tmp_path, rows, save, order):
    path, config = tmp_path / "log.npz", PrepareConfig(layout="dlrm-kaggle")
    save(path, **order(dlrm(rows)))
    sound = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("X_cat.npy")
        middle = entry.header_offset + entry.compress_size // 2
    path.write_bytes(sound[:middle] + bytes([sound[middle] ^ 0x10]) + sound[middle + 1 :])
    with pytest.raises(UserError, match=r"log\.npz"):
        prepare(path, tmp_path / "data", config)
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(UserError, match=r"log\.npz cannot be read as \.npz"):
        prepare(path, tmp_path / "data", config)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"log\.npz cannot be read as \.npz"):
        prepare(path, tmp_path / "data", config)
    assert [file.name for file in tmp_path.iterdir()] == ["log.npz"]


def test_a_file_of_half_a_record_is_refused(tmp_path, rows):
    path, data = tmp_path / "train.bin", records(dlrm(rows))
    config = PrepareConfig(layout="mlperf-binary", split="random")
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"train\.bin has 32479 bytes, expected records of 160 bytes"):
        prepare(path, tmp_path / "data", config)
    path.write_bytes(gzip.compress(data[:-1]))
    with pytest.raises(UserError, match=r"train\.bin, after row 202: it ends with 159 bytes of a record"):
        prepare(path, tmp_path / "data", config)
    path.write_bytes(gzip.compress(data)[:-20])
    dataset = prepare(path, tmp_path / "data", replace(config, on_error="skip"))
    assert 0 < sum(dataset.rows.values()) < 203
    assert "truncated" in dataset.info["sources"][0]["damaged"]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="it is empty, expected rows"):
        prepare(path, tmp_path / "data2", config)


def test_negative_ids_of_records_are_refused(tmp_path, rows):
    arrays = dlrm(rows)
    arrays["X_cat"][9, 0] = -5
    (tmp_path / "a.bin").write_bytes(records(arrays))
    with pytest.raises(UserError, match=r"a\.bin, row 10: column C1 holds -5, expected a whole number from 0 to"):
        prepare(tmp_path / "a.bin", tmp_path / "data", PrepareConfig(layout="mlperf-binary", split="random"))


def test_columns_of_folders_decide_the_split(tmp_path, rows):
    for day in (1, 2):
        (tmp_path / f"dt={day}").mkdir()
        np.savez(tmp_path / f"dt={day}" / "log.npz", **dlrm(rows[:50]))
    config = PrepareConfig(layout="dlrm-terabyte", split="column", split_column="dt", test_values=("2",))
    assert prepare([tmp_path / "dt=1", tmp_path / "dt=2"], tmp_path / "out", config).rows["test"] == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"null_values": ("0",)}, "null_values is for text, and files of layout dlrm-kaggle hold numbers"),
        ({"categorical": ("C1",)}, "categorical is for layout table; layout dlrm-kaggle has its own columns"),
        ({"label": "y"}, "label is for layout table"),
    ],
)
def test_options_that_say_nothing_to_arrays_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(layout="dlrm-kaggle", **fields)


def test_a_pipe_and_a_wrong_layout_are_refused(tmp_path, rows):
    np.savez(tmp_path / "a.npz", **dlrm(rows))
    with pytest.raises(UserError, match=r"a\.npz is a zip archive, expected text"):
        prepare(tmp_path / "a.npz", tmp_path / "data", RAW)
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe; layout dlrm-kaggle can only be read from files"):
        prepare(tmp_path / "pipe", tmp_path / "data", PrepareConfig(layout="dlrm-kaggle"))
