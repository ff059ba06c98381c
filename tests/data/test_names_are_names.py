"""Columns may be called anything, in every verb and every flag."""

import csv
import json

import polars as pl
import pytest

import dqrm
from cli_helpers import command
from conftest import tiny
from data_helpers import table
from dqrm.data.config import PrepareConfig, cross_parts
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.options import coerce

NAMES = ["*", "^u$", "a,b", "two\nlines", " spaces ", "", "é ü", "k0", "label", "[bold]", 'quo"te', "a*b", "none", "c0"]
OURS = ["d0", "s", "r0", "C1", "probability2", "^.*$", "u", "value_d0", "row", "key"]


def rows(names, count=40):
    return [
        {"click,": n % 2, **{name: f"{number}-{n % 5}" for number, name in enumerate(names)}, "**": n / 8, "^d$": n}
        for n in range(count)
    ]


def quoted(*names):
    return ",".join('"' + name.replace('"', '""') + '"' for name in names)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_flag_of_every_verb(suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = rows([*NAMES, *OURS])
    pl.DataFrame(log).write_parquet("log.parquet")
    table(tmp_path / "log.csv", log)
    flags = [
        *("--label", "click,", "--categorical", quoted(*NAMES, *OURS), "--dense", '**,"^d$"', "--multi", '"*","a,b"'),
        *("--cross", '"^u$"*"","a*b"*"two\nlines",k0*"c0"', "--multi-separator", "-"),
        *("--split", "column", "--split-column", "^u$", "--validation-values", "1-3", "--test-values", "1-4"),
    ]
    code, out, err = command(capsys, "prepare", f"log.{suffix}", "-o", "data", "--json", *flags)
    assert code == 0, err
    columns = json.loads(out)["schema"]["columns"]
    assert {column["name"] for column in columns} >= {*NAMES, *OURS}
    assert {column["name"]: column["parts"] for column in columns}['"^u$"*""'] == ["^u$", ""]
    dataset = dqrm.Dataset("data")
    assert dataset.rows == {"train": 24, "validation": 8, "test": 8}
    assert all(column.rows > 2 for column in dataset.columns)
    for verb in (
        ("train", "data", "-o", "run", "--max-steps", "2", "--embedding-dim", "4", "--bottom-mlp", "2-4"),
        ("eval", "run", "data"),
        ("export", "run", "-o", "m.dqrm"),
        ("eval", "m.dqrm", "data"),
        ("info", "data"),
        ("info", "run"),
        ("info", "m.dqrm"),
    ):
        code, _, err = command(capsys, *verb)
        assert code == 0, (verb, err)
    kept = [*NAMES, "^.*$", "u"]
    for output in ("p.parquet", "p.csv"):
        code, out, err = command(
            capsys, "predict", "m.dqrm", f"log.{suffix}", "-o", output, "--keep", quoted(*kept), "--json"
        )
        assert code == 0, err
        assert set(json.loads(out)["unseen"].values()) <= {0.2, 0.4}
        if output.endswith("parquet"):
            read = pl.read_parquet(output).rows(named=True)
        else:
            with open(output, newline="") as file:
                read = list(csv.DictReader(file))
        assert list(read[0]) == [*kept, "probability"]
        assert [[row[name] for name in kept] for row in read] == [[row[name] for name in kept] for row in log]


def test_names_in_yaml_and_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "log.csv", rows(NAMES))
    (tmp_path / "c.yaml").write_text('label: "click,"\ncategorical: ["a,b", "", "*"]\ncross: [\'"a,b"*"*"\']\n')
    code, out, err = command(capsys, "prepare", "log.csv", "-o", "data", "--config", "c.yaml", "--json")
    assert code == 0, err
    config = PrepareConfig(label="click,", categorical=("a,b", "", "*"), cross=('"a,b"*"*"',))
    assert prepare("log.csv", "python", config).fingerprint == json.loads(out)["fingerprint"]
    train = prepare("log.csv", "again", PrepareConfig(label="click,", categorical=("*",), dense=("^d$",)))
    dqrm.train(train, "run", tiny(max_steps=1))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b ,c", ("a", "b", "c")),
        ('"a,b",c', ("a,b", "c")),
        ('" a ","",b', (" a ", "", "b")),
        ('"say ""a,"""', ('say "a,"',)),
        ('5" disc,b"', ('5" disc', 'b"')),
        ('user*"a,b","*"*"c,d"', ('user*"a,b"', '"*"*"c,d"')),
        ("", ()),
    ],
)
def test_lists_of_names_in_text(text, names):
    assert coerce("categorical", text, tuple[str, ...]) == names


@pytest.mark.parametrize("text", ["a,,b", "a,", ","])
def test_a_name_is_not_left_out_by_accident(text):
    with pytest.raises(UserError, match=f"categorical: got '{text}', expected a name between commas"):
        coerce("categorical", text, tuple[str, ...])


def test_parts_of_crosses():
    assert cross_parts("user*director") == ("user", "director")
    assert cross_parts('"a*b"*"*"*c,d*""') == ("a*b", "*", "c,d", "")
    for wrong in ("*", "a*", "a**b", "a", '"a*b"', 'a*"a"'):
        with pytest.raises(ValueError, match="expected two or more different columns"):
            PrepareConfig(categorical=("x",), cross=(wrong,))


@pytest.mark.parametrize("name", ["*", "^.*$", "^u$", "", "a,b", "two\nlines"])
def test_a_name_that_is_not_there_is_missing(name, tmp_path):
    """It is no pattern that others match."""
    pl.DataFrame({"label": [0, 1], "u": ["a", "b"], "v": ["a", "b"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column '.*' in .*a.parquet") as caught:
        prepare(tmp_path / "a.parquet", tmp_path / "out", PrepareConfig(categorical=(name,)))
    assert "\n" not in str(caught.value)


def test_columns_of_paths_beside_odd_names(tmp_path):
    (tmp_path / "log" / "dt=1").mkdir(parents=True)
    frame = pl.DataFrame({"label": [0, 1], "*": ["a", "b"], "^.$": ["c", "c"], "u": ["d", "e"]})
    frame.write_parquet(tmp_path / "log" / "dt=1" / "part.parquet")
    config = PrepareConfig(categorical=("*", "dt", "^.$"), split="time", validation_fraction=0, test_fraction=0)
    dataset = prepare(tmp_path / "log", tmp_path / "out", config)
    assert [(column.name, column.rows) for column in dataset.columns] == [("*", 3), ("dt", 2), ("^.$", 2)]
