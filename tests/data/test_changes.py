"""A source that changes while it is read is refused: grown, shrunk, replaced, gone; so is a folder."""

import os

import polars as pl
import pytest

from data_helpers import KAGGLE, criteo_lines, write
from dqrm import PrepareConfig, UserError
from dqrm.data import ingest, listing
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary

TABLE = PrepareConfig(categorical=("c",))


def grow(path):
    with path.open("ab") as file:
        file.write(path.read_bytes()[-200:])


def shrink(path):
    os.truncate(path, path.stat().st_size - 7)


def rewrite(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 1))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES = {
    grow: "it had .* bytes and has",
    shrink: "it had .* bytes and has",
    rewrite: "it was written to",
    replaced: "another file took its place",
    os.unlink: "No such file",
}


def log_file(folder, kind):
    if kind == "parquet":
        table = pl.DataFrame({"label": [0, 1] * 500, "c": [f"v{n % 7}" for n in range(1000)]})
        table.write_parquet(folder / "log.parquet")
        return folder / "log.parquet", TABLE
    return write(folder / "log.txt", criteo_lines(1000)), KAGGLE


@pytest.mark.parametrize("kind", ["text", "parquet"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["found", "read"])
def test_prepare_refuses_a_file_that_changes(tmp_path, monkeypatch, kind, change, when):
    path, config = log_file(tmp_path, kind)
    if when == "found":  # after it was looked at, before its rows are read
        original = ingest.ingest

        def begin(*arguments):
            change(path)
            return original(*arguments)

        monkeypatch.setattr(ingest, "ingest", begin)
    else:  # while they are
        original = ingest.hash_file if kind == "parquet" else ingest.read_bytes
        name = original.__name__
        calls = []

        def meanwhile(source):
            calls.append(source)
            if kind == "parquet":
                original(source)
                return change(path)
            if len(calls) == 1:
                return original(source)
            pieces = original(source)
            first = next(pieces)
            change(path)

            def rest():
                yield first
                yield from pieces

            return rest()

        monkeypatch.setattr(ingest, name, meanwhile)
    with pytest.raises(UserError, match=r"log\..*changed while it was read|cannot read .*log\."):
        prepare(path, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_message_says_what_changed(tmp_path, change):
    path, _ = log_file(tmp_path, "text")
    (source,) = listing.resolve([path])
    source.require_unchanged()
    change(path)
    with pytest.raises(UserError, match=f"log.txt changed while it was read: {CHANGES[change]}"):
        source.require_unchanged()


@pytest.mark.parametrize("kind", ["text", "parquet"])
@pytest.mark.parametrize("change", [grow, replaced], ids=lambda change: change.__name__)
def test_scoring_refuses_a_file_that_changes(tmp_path, kind, change):
    path, config = log_file(tmp_path, kind)
    dataset = prepare(path, tmp_path / "data", config)
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    log = RawLog(path, RawEncoder(config, columns, vocabularies))
    change(path)
    with pytest.raises(UserError, match=r"changed while it was read|cannot be read as Parquet"):
        list(log.blocks())


def test_a_folder_that_gets_a_file_meanwhile(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    path, config = log_file(folder, "parquet")

    def meanwhile(what, done, total):
        if what == "writing" and not (folder / "new.parquet").exists():
            (folder / "new.parquet").write_bytes(path.read_bytes())

    with pytest.raises(UserError, match=r"new\.parquet is new"):
        prepare(folder, tmp_path / "out", config, meanwhile)
    assert sorted(os.listdir(tmp_path)) == ["log"]
