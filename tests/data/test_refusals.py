"""Preparing a dataset from what cannot be prepared: named with file and line, and nothing is left behind."""

import dataclasses
import gzip
import json
import math
import os
import re
import subprocess
import sys
from datetime import date, timedelta

import polars as pl
import pytest
import zstandard

from data_helpers import KAGGLE, check_against_reference, criteo_lines, spoil, table, write
from dqrm.data import lines
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import MARKER, prepare
from dqrm.errors import UserError

MALFORMED = [
    ("short", lambda row: row.rsplit("\t", 1)[0], "39 columns, expected 40"),
    ("long", lambda row: row + "\t1", "41 columns, expected 40"),
    ("empty", lambda row: "", "an empty line"),
    ("no label", lambda row: spoil(row, 0, ""), "column label holds nothing, expected 0 or 1"),
    ("label 2", lambda row: spoil(row, 0, "2"), "column label holds '2', expected 0 or 1"),
    ("text", lambda row: spoil(row, 3, "abc"), "column I3 holds 'abc', expected a whole number"),
    ("fraction", lambda row: spoil(row, 13, "1.5"), "column I13 holds '1.5', expected a whole number"),
    ("not hex", lambda row: spoil(row, 14, "0000000g"), "column C1 holds '0000000g', expected up to 8 hexadecimal"),
    ("long hex", lambda row: spoil(row, 39, "000000001"), "column C26 holds '000000001'"),
    ("signed hex", lambda row: spoil(row, 20, "+1"), r"column C7 holds '+1'"),
    ("utf-8", lambda row: spoil(row, 20, "\udcff"), "byte 0xff at position"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_malformed_lines_stop_or_are_skipped(tmp_path, monkeypatch, change, reason):
    compress = len(reason) % 2 == 0  # of the two kinds of files each has some
    monkeypatch.setattr(lines, "_BLOCK", 4000)
    rows = criteo_lines(100)
    bad = [*rows[:62], change(rows[62]), *rows[63:]]
    data = "".join(row + "\n" for row in bad).encode(errors="surrogateescape")
    path = tmp_path / "log.txt"
    path.write_bytes(gzip.compress(data) if compress else data)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 63: {reason}")):
        prepare([path], tmp_path / "out", KAGGLE)
    assert sorted(os.listdir(tmp_path)) == ["log.txt"]
    dataset = prepare([path], tmp_path / "out", dataclasses.replace(KAGGLE, on_error="skip"))
    assert dataset.info["lines_skipped"] == dataset.info["sources"][0]["skipped"] == 1
    check_against_reference(dataset, rows[:62] + rows[63:])


def test_the_first_of_several_malformed_lines_is_named(tmp_path):
    rows = criteo_lines(30)
    rows[20], rows[10] = "short", spoil(rows[10], 5, "x")
    with pytest.raises(UserError, match="line 11: column I5"):
        prepare([write(tmp_path / "log.txt", rows)], tmp_path / "out", KAGGLE)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_and_damaged_files(tmp_path, kind):
    rows = criteo_lines(4000)
    data = "".join(row + "\n" for row in rows).encode()
    packed = gzip.compress(data) if kind == "gz" else zstandard.compress(data)
    path = tmp_path / f"log.txt.{kind}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(UserError, match=r"log.txt.*, after line \d+: its (gzip|zstd) data is truncated"):
        prepare([path], tmp_path / "out", KAGGLE)
    assert os.listdir(tmp_path) == [path.name]
    dataset = prepare([path], tmp_path / "out", dataclasses.replace(KAGGLE, on_error="skip"))
    (source,) = dataset.info["sources"]
    assert "is truncated" in source["damaged"]
    read = sum(dataset.rows.values())
    assert 1000 < read < 4000
    check_against_reference(dataset, rows[:read])
    path.write_bytes(packed[:20] + b"\xff" * 2000)
    with pytest.raises(UserError, match=r"data (is damaged|is truncated)"):
        prepare([path], tmp_path / "damaged", KAGGLE)


def test_table_mistakes_name_the_line(tmp_path):
    def attempt(text, **fields):
        path = tmp_path / "log.csv"
        path.write_text(text)
        config = PrepareConfig(**{"categorical": ("c",), "dense": ("d",), **fields})
        with pytest.raises(UserError) as caught:
            prepare([path], tmp_path / "out", config)
        assert os.listdir(tmp_path) == ["log.csv"]
        return str(caught.value)

    assert "line 3: column label holds 'x', expected 0 or 1" in attempt("label,c,d\n1,a,1\nx,a,1\n")
    assert "line 3: column d holds 'inf', expected a finite number" in attempt("label,c,d\n1,a,1\n1,a,inf\n")
    assert "line 4: column d holds '1,5'" in attempt('label,c,d\n1,"a\nb",1\n1,a,"1,5"\n')
    assert "line 3: 2 columns, expected 3" in attempt("label,c,d\n1,a,1\n1,a\n")
    assert "no column 'cc' in" in attempt("label,c,d\n1,a,1\n", categorical=("cc",))
    assert "did you mean 'c'?" in attempt("label,c,d\n1,a,1\n", categorical=("cc",))
    assert "no column 'x' in" in attempt("label,c,d\n1,a,1\n", cross=("c*x",))
    assert "2 columns named 'c'" in attempt("label,c,c,d\n1,a,a,1\n")
    assert "no column was named" in attempt("label,c,d\n1,a,1\n", categorical=(), dense=())
    assert "no row in log.csv" in attempt("label,c,d\n")
    assert "is empty" in attempt("")
    assert "leaves none of the 2 rows for training" in attempt(
        "label,c,d\n1,a,1\n1,a,1\n", split="column", split_column="c", test_values=("a",)
    )


def test_parquet_mistakes(tmp_path):
    path = tmp_path / "log.parquet"

    def attempt(columns, **fields):
        pl.DataFrame(columns).write_parquet(path)
        with pytest.raises(UserError) as caught:
            prepare([path], tmp_path / "out", PrepareConfig(**fields))
        assert os.listdir(tmp_path) == ["log.parquet"]
        return str(caught.value)

    lists = {"label": [0, 1], "c": [["a"], ["b"]]}
    assert "column c of" in attempt(lists, categorical=("c",))
    assert "of type List" in attempt(lists, dense=("c",)) or "holds lists" in attempt(lists, dense=("c",))
    assert "row 2: column label holds 3" in attempt({"label": [0, 3], "c": ["a", "b"]}, categorical=("c",))
    assert "row 1: column d holds inf" in attempt({"label": [0, 1], "d": [math.inf, 1]}, dense=("d",))
    assert "expected lists or text" in attempt({"label": [0], "c": [1]}, categorical=("c",), multi=("c",))
    assert "use layout table" in attempt({"label": [0]}, layout="criteo-kaggle")
    assert "name it in multi too" in attempt(lists, categorical=("c",))
    by_column = {"split": "column", "split_column": "c", "test_values": ("a",)}
    for more in ({"categorical": ("x",)}, {"categorical": ("x", "c")}):
        said = attempt({**lists, "x": ["a", "b"]}, **by_column, **more)
        assert "split_column c of" in said
        assert "holds lists, expected one number or text per row" in said
    for odd in (timedelta(seconds=1), b"\xff", {"a": 1}, [timedelta(seconds=1)]):
        multi = ("c",) if isinstance(odd, list) else ()
        said = attempt({"label": [0], "c": [odd]}, categorical=("c",), multi=multi)
        assert "column c of" in said
        assert "expected numbers or text" in said
    path.write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        prepare([path], tmp_path / "out", PrepareConfig(categorical=("c",)))


def test_outputs_and_sources_that_cannot_be(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare([path], tmp_path / "full", KAGGLE)
    with pytest.raises(UserError, match="exists and is a file"):
        prepare([path], path, KAGGLE)
    with pytest.raises(UserError, match="cannot write"):
        prepare([path], path / "below", KAGGLE)
    for sources, reason in [
        ([], "no source file was given"),
        ([tmp_path / "nope.txt"], "cannot read .*nope.txt: No such file"),
        ([tmp_path / "nope*"], "no file matches"),
        ([tmp_path / "empty"], "holds no file"),
        ([path, path], "is given twice"),
    ]:
        with pytest.raises(UserError, match=reason):
            prepare(sources, tmp_path / "out", KAGGLE)
    (tmp_path / "log.xyz").write_text("label,c\n1,a\n")
    with pytest.raises(UserError, match="cannot infer the delimiter"):
        prepare([tmp_path / "log.xyz"], tmp_path / "out", PrepareConfig(categorical=("c",)))
    # An empty folder, and what an earlier run left, are no obstacle.
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "dataset.json").write_text("{}")
    (tmp_path / "out.partial" / MARKER).touch()
    assert sum(prepare([path], tmp_path / "out", KAGGLE).rows.values()) == 20
    assert not (tmp_path / "out.partial").exists()


def test_brackets_in_names_are_no_pattern(tmp_path):
    config = PrepareConfig(categorical=("c",))
    for name, rows in (("a[1].parquet", 20), ("a1.parquet", 30)):
        days = [date(2020, 1, 1 + n) for n in range(rows)]
        pl.DataFrame({"label": [1] * rows, "c": days}).write_parquet(tmp_path / name)
    dataset = prepare(tmp_path / "a[1].parquet", tmp_path / "[out]" / "[br]", config)
    assert sum(dataset.rows.values()) == 20
    assert os.listdir(dataset.path.parent) == ["[br]"]


def test_a_folder_of_somebody_else_is_kept(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(UserError, match=r"out\.partial .* was not created by dqrm prepare; move it"):
        prepare([path], tmp_path / "out", KAGGLE)
    assert (tmp_path / "out.partial" / "mine").read_text() == "x"
    (tmp_path / "link.partial").symlink_to(tmp_path / "out.partial")
    with pytest.raises(UserError, match="was not created by dqrm prepare"):
        prepare([path], tmp_path / "link", KAGGLE)


def test_two_runs_into_one_output(tmp_path):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    refused = []

    def meanwhile(what, done, total):
        if not refused:
            with pytest.raises(UserError, match="another dqrm prepare is writing to") as caught:
                prepare([path], tmp_path / "out", KAGGLE)
            refused.append(caught.value)

    dataset = prepare([path], tmp_path / "out", KAGGLE, meanwhile)
    dataset.validate()
    assert refused
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "out"]
    assert MARKER not in os.listdir(dataset.path)


def test_odd_outputs(tmp_path, monkeypatch):
    path = write(tmp_path / "log.txt", criteo_lines(20))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the current folder"):
        prepare([path], ".", KAGGLE)
    with pytest.raises(UserError, match=r"log\.txt is a file, expected a folder"):
        prepare([path], path / "below", KAGGLE)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot write to"):
        prepare([path], tmp_path / "loop", KAGGLE)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert sum(prepare([path], tmp_path / "link", KAGGLE).rows.values()) == 20
    assert (tmp_path / "real" / "dataset.json").is_file()


@pytest.mark.parametrize("limit", [200, 3_000])
def test_a_full_disk_is_named(tmp_path, limit):
    write(tmp_path / "log.txt", criteo_lines(200))
    code = (
        "import resource; from dqrm.data.prepare import prepare; from dqrm.data.config import PrepareConfig;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "prepare('log.txt', 'out', PrepareConfig(layout='criteo-kaggle', chunk_rows=10))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert "UserError: cannot write to" in last
    assert not last.endswith("None")
    assert os.listdir(tmp_path) == ["log.txt"]


def test_progress_reaches_the_end(tmp_path):
    told = {}
    path = write(tmp_path / "log.txt", criteo_lines(50))
    prepare([path], tmp_path / "out", KAGGLE, lambda what, done, total: told.update({what: (done, total)}))
    assert told == {"reading": (path.stat().st_size,) * 2, "counting ids": (26, 26), "writing": (50, 50)}


def test_awkward_names(tmp_path):
    rows = [{"label": n % 2, "a/b": f"{n}", "r0": n, "C1": "x", "d0": n} for n in range(20)]
    config = PrepareConfig(categorical=("a/b", "C1", "r0"), dense=("d0",))
    dataset = prepare([table(tmp_path / "a.csv", rows)], tmp_path / "out" / "deep", config)
    assert dataset.vocabulary_path("a/b").is_file()
    assert dataset.table_rows[1] == 2


def test_describe_is_json(tmp_path):
    dataset = prepare(write(tmp_path / "log.txt", criteo_lines(50)), str(tmp_path / "out"), KAGGLE)
    shown = json.loads(json.dumps(Dataset(tmp_path / "out").describe()))
    assert shown["rows"] == dataset.rows
    assert shown["table_rows"] == sum(dataset.table_rows)
    assert shown["fingerprint"] == dataset.fingerprint
