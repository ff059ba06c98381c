"""Pipes are read once, from their first byte; what is neither file nor pipe is refused by name."""

import contextlib
import gzip
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import polars as pl
import pytest
import zstandard

import dqrm
from conftest import tiny
from data_helpers import KAGGLE, content, criteo_lines, write
from dqrm import PrepareConfig, UserError
from dqrm.cli import main
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary

TABLE = PrepareConfig(categorical=("c",), dense=("d",), delimiter=",")
ROWS = "label,c,d\n" + "".join(f"{n % 2},v{n % 5},{n}\n" for n in range(200))


def fifo(path, data):
    """A named pipe that someone writes `data` to, once."""
    os.mkfifo(path)

    def feed():
        with contextlib.suppress(BrokenPipeError):
            path.write_bytes(data)

    threading.Thread(target=feed, daemon=True).start()
    return path


def descriptor(data):
    """/dev/fd/N of a pipe that holds `data`, as <(...) gives it."""
    reading, writing = os.pipe()

    def feed():
        with os.fdopen(writing, "wb") as file, contextlib.suppress(BrokenPipeError):
            file.write(data)

    threading.Thread(target=feed, daemon=True).start()
    return Path(f"/dev/fd/{reading}")


@pytest.mark.parametrize("make", ["named", "descriptor"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("layout", ["table", "criteo"])
def test_a_pipe_gives_what_the_file_gives(tmp_path, make, pack, layout):
    text = ROWS if layout == "table" else "".join(row + "\n" for row in criteo_lines(200))
    config = TABLE if layout == "table" else KAGGLE
    (tmp_path / "log.csv").write_text(text)
    wanted = prepare(tmp_path / "log.csv", tmp_path / "wanted", config)
    data = pack(text.encode())
    path = fifo(tmp_path / "pipe", data) if make == "named" else descriptor(data)
    told = []
    found = prepare(path, tmp_path / "found", config, lambda *step: told.append(step))
    assert content(found) == content(wanted)
    (source,) = found.info["sources"]
    assert source["bytes"] == len(data)
    assert source["rows"] == 200
    assert ("reading", len(data), None) in told
    assert str(tmp_path) not in source["name"]


def test_several_pipes_written_one_after_the_other(tmp_path):
    text = "".join(row + "\n" for row in criteo_lines(3000)).encode()
    for name in "ab":
        os.mkfifo(tmp_path / name)

    def feed():
        for name in "ab":
            (tmp_path / name).write_bytes(text)

    threading.Thread(target=feed, daemon=True).start()
    assert sum(prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", KAGGLE).rows.values()) == 6000


def raw_log(dataset, sources, **more):
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    return RawLog(sources, RawEncoder(more.pop("options", KAGGLE), columns, vocabularies, **more))


@pytest.mark.parametrize("labelled", [True, False])
def test_scoring_reads_a_pipe_once(tmp_path, labelled):
    rows = criteo_lines(300)
    dataset = prepare(write(tmp_path / "log.txt", rows), tmp_path / "data", KAGGLE)
    given = rows if labelled else [row.split("\t", 1)[1] for row in rows]
    log = raw_log(dataset, descriptor("".join(row + "\n" for row in given).encode()), keep=("I1",))
    assert log.size is None
    assert sum(len(batch) for _, batch in log.blocks()) == 300
    with pytest.raises(UserError, match="is a pipe and was read already"):
        list(log.blocks())


def test_standard_input_as_a_user_pipes_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.csv").write_text(ROWS)
    dataset = prepare(tmp_path / "log.csv", tmp_path / "data", TABLE)
    dqrm.train(dataset, tmp_path / "run", tiny(max_steps=2))
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
    command = [sys.executable, "-m", "dqrm", "predict", "m.dqrm", "-", "-o", "p.csv", "--keep", "c"]
    ended = subprocess.run(command, input=ROWS.encode(), cwd=tmp_path, check=False, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    scored = pl.read_csv(tmp_path / "p.csv")
    assert scored["c"].to_list() == [f"v{n % 5}" for n in range(200)]
    (tmp_path / "empty.csv").write_text("label,c,d\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dqrm", "predict", "m.dqrm", "empty.csv", "-o", "q.csv"])
    with pytest.raises(SystemExit):
        main()
    assert "no row of empty.csv was scored" in capsys.readouterr().err


def test_what_a_pipe_cannot_give(tmp_path):
    pl.DataFrame({"label": [0, 1], "c": ["a", "b"], "d": [1, 2]}).write_parquet(tmp_path / "log.parquet")
    parquet = (tmp_path / "log.parquet").read_bytes()
    named = tmp_path / "log.csv"
    for source, config, said in [
        (descriptor(parquet), TABLE, "is Parquet in a pipe"),
        (descriptor(b""), TABLE, "is empty"),
        (descriptor(b""), KAGGLE, "is empty"),
        (descriptor(b"a,b\n1,2\n"), TABLE, "no column 'label' in /dev/fd"),
        (descriptor(ROWS.encode()), PrepareConfig(categorical=("c",)), "--delimiter ','"),
        (fifo(tmp_path / "named.parquet", parquet), PrepareConfig(categorical=("c",)), "is a pipe, expected a file"),
        (fifo(named, gzip.compress(ROWS.encode())[:100]), TABLE, "gzip data is truncated"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(source, tmp_path / "out", config)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    twice = descriptor(ROWS.encode())
    with pytest.raises(UserError, match="is given twice"):
        prepare([twice, str(twice).replace("/dev/fd", "/proc/self/fd")], tmp_path / "out", TABLE)


def test_what_is_neither_file_nor_pipe(tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "log.csv.bz2").write_bytes(b"BZh91AY&SY" + b"x" * 50)
    for source, said in [
        ("/dev/null", "/dev/null is a device"),
        (tmp_path / "socket", "is a socket"),
        (tmp_path / "dangling", "is a link to nowhere, and there is no such file"),
        (tmp_path / "log.csv.bz2", "is bzip2"),
        ("a\0b", "not a file name"),
        ("nosuch://bucket/day_0", "cannot read nosuch://bucket/day_0|needs the package fsspec"),
        ("", "not a file name"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(source, tmp_path / "out", TABLE)
    server.close()


def test_a_socket_as_descriptor_is_a_pipe(tmp_path):
    ours, theirs = socket.socketpair()
    theirs.sendall(ROWS.encode())
    theirs.close()
    dataset = prepare(f"/dev/fd/{ours.fileno()}", tmp_path / "out", TABLE)
    assert sum(dataset.rows.values()) == 200
    ours.close()
