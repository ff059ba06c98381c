"""Folders as Spark and Hive write them: which files count, what their paths say, and days as splits."""

import dataclasses
import shlex
import sys
from datetime import date, datetime

import polars as pl
import pytest

from conftest import tiny
from data_helpers import KAGGLE, content, criteo_lines, write
from dqrm import Dataset, PrepareConfig, UserError, export_run, predict, train
from dqrm.cli import main
from dqrm.config import ModelConfig
from dqrm.data.prepare import prepare
from dqrm.serving.config import PredictConfig

CONFIG = PrepareConfig(categorical=("ad",), split="time")
DAYS = [f"2026-01-{day:02d}" for day in range(1, 11)]


def frame(day, rows=10, **more):
    return pl.DataFrame({"label": [n % 2 for n in range(rows)], "ad": [f"{day}-{n % 3}" for n in range(rows)], **more})


@pytest.fixture
def log(tmp_path):
    """Ten days of one file each, with what Spark, Hadoop and a file manager leave beside them."""
    folder = tmp_path / "my log"
    for day in DAYS:
        below = folder / f"dt={day}"
        below.mkdir(parents=True)
        frame(day).write_parquet(below / "part-00000.parquet")
        (below / ".part-00000.parquet.crc").write_bytes(b"crc")
    for name in ("_SUCCESS", "_metadata", ".DS_Store", "x.crc"):
        (folder / name).write_bytes(b"\0")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "part-1.parquet").write_bytes(b"PAR1")
    return folder


def test_a_folder_in_which_a_job_has_not_committed_is_refused(log, tmp_path):
    (log / "_SUCCESS").unlink()
    with pytest.raises(UserError, match=r"my log is not complete: a job of Spark .* was stopped \(it has _temporary"):
        prepare(log, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
    prepare(log / "dt=*", tmp_path / "out", CONFIG)  # files of their own names


def by_day(**values):
    return dataclasses.replace(CONFIG, split="column", split_column="dt", **values)


def test_a_folder_is_its_files_in_natural_order(log, tmp_path):
    dataset = prepare(log, tmp_path / "out", CONFIG)
    assert [source["name"] for source in dataset.info["sources"]] == [f"dt={day}/part-00000.parquet" for day in DAYS]
    assert "partitions" not in dataset.info["sources"][0]
    plain = prepare(sorted(map(str, log.glob("dt=*/*.parquet"))), tmp_path / "plain", CONFIG)
    # A shell's glob names no hidden files, but markers.
    shell = [path for path in sorted(log.glob("*/*"), key=str) if path.name[0] != "." and path.parts[-2][0] != "_"]
    above = log / ".." / log.name / "*"  # .. is not a pattern that asks for hidden names
    ways = [log / "dt=*", log / "*", above, log / "**", log / "dt=*" / "*", [*shell, log / "_SUCCESS"]]
    for number, way in enumerate(ways):
        found = prepare(way, tmp_path / f"way {number}", CONFIG)
        assert content(found) == content(dataset) == content(plain)
        assert found.info["sources"] == dataset.info["sources"]


@pytest.mark.parametrize(
    ("values", "days"),
    [
        ({"test_values": (">=2026-01-09",)}, (8, 0, 2)),
        ({"validation_values": (">=2026-01-07", "<2026-01-09"), "test_values": (">2026-01-08",)}, (6, 2, 2)),
        ({"test_values": ("2026-01-01", "> 2026-01-09")}, (8, 0, 2)),
        ({"validation_values": ("<=2026-01-02",), "test_values": ("2026-01-10",)}, (7, 2, 1)),
    ],
)
def test_days_by_range_on_the_column_of_the_path(log, tmp_path, values, days):
    dataset = prepare(log, tmp_path / "out", by_day(**values))
    assert tuple(dataset.rows.values()) == tuple(10 * count for count in days)
    assert dataset.info["split"]["compared_as"] == "dates"
    assert dataset.info["sources"][0]["partitions"] == {"dt": "2026-01-01"} or not dataset.info["sources"][0].get(
        "partitions"
    )


@pytest.mark.parametrize("pattern", ["dt=2026-01-10/*", "dt=2026-01-10", "*/dt=2026-01-10/*", "*2026-01-10*"])
def test_days_by_pattern_on_the_path(log, tmp_path, pattern):
    config = dataclasses.replace(CONFIG, split="file", validation_values=("dt=2026-01-09/*",), test_values=(pattern,))
    assert tuple(prepare(log, tmp_path / "out", config).rows.values()) == (80, 10, 10)
    both = dataclasses.replace(config, validation_values=(pattern,), test_values=("*10/part*",))
    with pytest.raises(UserError, match="in validation_values and"):
        prepare(log, tmp_path / "both", both)
    with pytest.raises(UserError, match="no file is named 'dt=2027"):
        prepare(log, tmp_path / "none", dataclasses.replace(config, test_values=("dt=2027*",)))
    with pytest.raises(UserError, match="a range is for --split column"):
        prepare(log, tmp_path / "none", dataclasses.replace(config, test_values=(">=2026-01-09",)))


VALUES = {
    "numbers": ([7, 8, 9, 10, 11], (">=9",), 3, "numbers"),
    "numbers as text": (["7", "8", "9", "10", "1.1e1"], (">=9", "<11"), 2, "numbers"),
    "large": ([2**53 + n for n in range(5)], (f">{2**53 + 1}",), 3, "numbers"),
    "negative": ([-2.5, -1.0, 0.0, 1.0, None], ("<-0.5",), 2, "numbers"),
    "dates": ([date(2026, 1, day) for day in range(1, 6)], ("<=2026-01-02",), 2, "dates"),
    "times": ([datetime(2026, 1, day, 12) for day in range(1, 6)], ("<=2026-01-02",), 2, "dates"),
    "iso": ([f"2026-01-0{day}T12:30:00Z" for day in range(1, 6)], (">2026-01-02", "<=2026-01-04T12"), 2, "dates"),
    "text": (["week a", "week b", "week c", "week d", ""], (">=week c",), 2, "text"),
    "both bounds in one": (["a", "c", "d", "da", "e"], (">=d, <e",), 2, "text"),
    "dates in one": ([date(2026, 1, day) for day in range(1, 6)], (">=2026-01-02,<2026-01-04",), 2, "dates"),
    "as it is": ([">=1", "a", "b", "c", "d"], ("==>=1",), 1, None),
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ranges(tmp_path, case, kind):
    cells, values, rows, compared = VALUES[case]
    table = pl.DataFrame({"label": [0, 1, 0, 1, 0], "ad": ["x"] * 5, "day": cells})
    path = tmp_path / f"log.{kind}"
    table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    config = dataclasses.replace(CONFIG, split="column", split_column="day", test_values=values)
    dataset = prepare(path, tmp_path / "out", config)
    assert dataset.rows["test"] == rows
    assert dataset.info["split"].get("compared_as") == compared


@pytest.mark.parametrize(
    ("cells", "values", "said"),
    [
        (["1", "2", "x"], (">=2",), "compares numbers, but a row holds 'x'"),
        ([1, 2, 20260107], (">=2026-01-07",), "compares dates, but a row holds '1'"),
        (["2026-01-07"] * 3, (">=2026-1-7",), "is text, but a row holds '2026-01-07', expected a date"),
        (["2026-01-07"] * 3, (">=7",), "compares numbers, but a row holds '2026-01-07'"),
        (["2026-01-07T00Z", "2026-01-07T00+02:00", "2026-01-07T00Z"], (">=2026-01-07",), "several time zones"),
        ([1, 2, 3], (">=x",), "is text, but a row holds '1', expected a number"),
        ([1, 2, 3], (">=1,<2,<3",), "expected one range"),
        ([1, 2, 3], (">=9",), "no row holds '>=9'"),
        ([1, 2, 3], (">=2", "3"), None),
        ([1, 2, 3], (">=2", ">1"), "expected one range"),
        ([1, 2, 3], (">=2", "<2026-01-07"), "bounds of two kinds"),
        ([1, 2, 3], (">=",), "expected a bound after the operator"),
    ],
)
def test_ranges_that_cannot_be(tmp_path, cells, values, said):
    pl.DataFrame({"label": [0, 1, 0], "ad": ["x"] * 3, "day": cells}).write_parquet(tmp_path / "log.parquet")

    def attempt():
        config = dataclasses.replace(CONFIG, split="column", split_column="day", test_values=values)
        return prepare(tmp_path / "log.parquet", tmp_path / "out", config)

    if said is None:
        assert attempt().rows["test"] == 2
        return
    with pytest.raises((UserError, ValueError), match=said):
        attempt()
    assert not (tmp_path / "out").exists()


def test_a_value_in_both_ranges_is_refused(log, tmp_path):
    with pytest.raises(UserError, match="'2026-01-09' is in both"):
        prepare(log, tmp_path / "out", by_day(validation_values=("<=2026-01-09",), test_values=(">=2026-01-09",)))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_the_path_in_every_role(tmp_path, kind):
    for number in range(6):
        site = ["a%2Fb", "__HIVE_DEFAULT_PARTITION__", "c d"][number % 3]
        below = tmp_path / "log" / f"hour={number}" / f"site={site}"
        below.mkdir(parents=True)
        table = pl.DataFrame({"label": [0, 1] * 5, "ad": list("uvwxy") * 2})
        table.write_csv(below / "p.csv") if kind == "csv" else table.write_parquet(below / "p.parquet")
    config = PrepareConfig(
        categorical=("ad", "site"), dense=("hour",), cross=("ad*site",), dense_transform="none",
        split="column", split_column="hour", test_values=(">=5",), validation_values=("4",),
    )  # fmt: skip
    dataset = prepare(tmp_path / "log", tmp_path / "data", config)
    assert dataset.split("test").arrays["dense.f32"].ravel().tolist() == [5.0] * 10
    assert set(pl.read_parquet(dataset.vocabulary_path("site"))["key"]) == {"a/b", "", "c d"}
    assert dataset.info["sources"][1]["partitions"] == {"hour": "1", "site": None}
    train(dataset, tmp_path / "run", tiny(max_steps=2))
    export_run(tmp_path / "run", tmp_path / "m.dqrm")
    # One folder of it, and the same rows with the columns in the file.
    found = predict(tmp_path / "m.dqrm", tmp_path / "log" / "hour=3", tmp_path / "p.parquet",
                    PredictConfig(keep=("site", "ad")))  # fmt: skip
    assert found["rows"] == 10
    assert set(found["unseen"].values()) == {0.0}
    scored = pl.read_parquet(tmp_path / "p.parquet")
    assert set(scored["site"]) == {"a/b"}
    whole = pl.DataFrame({"ad": list("uvwxy") * 2, "site": ["a/b"] * 10, "hour": [3] * 10})
    whole.write_csv(tmp_path / "whole.csv")
    predict(tmp_path / "m.dqrm", tmp_path / "whole.csv", tmp_path / "q.parquet")
    assert pl.read_parquet(tmp_path / "q.parquet")["probability"].to_list() == scored["probability"].to_list()


def test_a_column_in_path_and_file(tmp_path):
    below = tmp_path / "hour=07"
    below.mkdir()
    config = PrepareConfig(categorical=("ad", "hour"))
    frame("x", hour=[7] * 10).write_parquet(below / "a.parquet")
    assert Dataset(prepare(below, tmp_path / "out", config).path).table_rows[1] == 2
    frame("x", hour=[7] * 9 + [8]).write_parquet(below / "a.parquet")
    with pytest.raises(UserError, match=r"row 10: column hour holds '8', but the path says hour=07"):
        prepare(below, tmp_path / "out2", config)
    # It does not matter where nobody asks for it.
    assert prepare(below, tmp_path / "out3", CONFIG)


def test_criteo_days_in_folders(tmp_path):
    for day in (1, 2, 10):
        (tmp_path / "log" / f"day={day}").mkdir(parents=True)
        write(tmp_path / "log" / f"day={day}" / "part", criteo_lines(20, day))
    config = dataclasses.replace(KAGGLE, split="column", split_column="day", test_values=(">=10",))
    dataset = prepare(tmp_path / "log", tmp_path / "out", config)
    assert dataset.rows == {"train": 40, "validation": 0, "test": 20}
    assert [source["name"] for source in dataset.info["sources"]] == [f"day={day}/part" for day in (1, 2, 10)]


def test_the_fingerprint_has_the_columns_of_the_path(tmp_path):
    prints = []
    for site in "ab":
        (tmp_path / site / f"site={site}").mkdir(parents=True)
        frame("x").write_parquet(tmp_path / site / f"site={site}" / "p.parquet")
        config = PrepareConfig(categorical=("ad", "site"))
        prints.append(prepare(tmp_path / site, tmp_path / f"out{site}", config).fingerprint)
    assert prints[0] != prints[1]


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "day.txt", criteo_lines(20, ord(folder)))
    files = [tmp_path / "a" / "day.txt", tmp_path / "b" / "day.txt"]
    config = dataclasses.replace(KAGGLE, split="file", test_values=("b/day.txt",))
    dataset = prepare(files, tmp_path / "out", config)
    assert [source["name"] for source in dataset.info["sources"]] == ["a/day.txt", "b/day.txt"]
    assert dataset.rows["test"] == 20


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: (path / "_delta_log").mkdir(), "a Delta Lake table"),
        (lambda path: (path / ".hoodie").mkdir(), "is a Hudi table"),
        (lambda path: (path / "loop").symlink_to(path), "is a link to a folder that contains it"),
        (lambda path: (path / "gone.parquet").symlink_to("nowhere"), "is a link to nowhere"),
        (lambda path: (path / "again.parquet").symlink_to(path / "a.parquet"), "is given twice"),
        (lambda path: (path / "again.parquet").hardlink_to(path / "a.parquet"), "is given twice"),
        (lambda path: (path / "notes").write_text("x"), "cannot infer the delimiter"),
        (lambda path: (path / "empty.csv").touch(), "empty.csv is empty"),
        (lambda path: (path / "a.parquet").unlink(), "holds no file"),
    ],
)
def test_folders_that_are_no_log(tmp_path, make, said):
    path = tmp_path / "log"
    path.mkdir()
    frame("x").write_parquet(path / "a.parquet")
    make(path)
    with pytest.raises(UserError, match=said):
        prepare(path, tmp_path / "out", CONFIG)


def test_a_dataset_folder_is_no_log(log, tmp_path):
    dataset = prepare(log, tmp_path / "out", CONFIG)
    with pytest.raises(UserError, match="is a dataset folder"):
        prepare(dataset.path, tmp_path / "again", CONFIG)


@pytest.mark.parametrize("source", ["my log", "my log/*", "my log/**", "*"])
def test_an_output_in_the_log_is_refused_before_the_work(log, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    output = "out" if source == "*" else "my log/out"
    with pytest.raises(UserError, match=r"out would be in the log itself, '.*'; name an output outside of it"):
        prepare(source, output, CONFIG)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("out")]
    prepare("my log", "my log/_out", CONFIG)  # such names are not read


def test_predictions_in_the_log_are_refused_before_the_work(log, tmp_path):
    model = ModelConfig(bottom_mlp=(8,), top_mlp=(8, 1), interaction="cat")
    config = dataclasses.replace(tiny(max_steps=2), model=model)
    train(prepare(log, tmp_path / "data", CONFIG), tmp_path / "run", config)
    export_run(tmp_path / "run", tmp_path / "m.dqrm")
    before = sorted(log.rglob("*"))
    for source in (log, log / "*"):
        with pytest.raises(UserError, match=r"p\.parquet would be in the log itself"):
            predict(tmp_path / "m.dqrm", source, log / "p.parquet")
    assert sorted(log.rglob("*")) == before


def test_names_with_what_a_pattern_means_are_names(tmp_path):
    names = [tmp_path / f"part[{number}].parquet" for number in (0, 1)]
    for number, path in enumerate(names):
        frame(str(number)).write_parquet(path)
    config = dataclasses.replace(CONFIG, split="file", test_values=("part[1].parquet",))
    assert tuple(prepare(names, tmp_path / "out", config).rows.values()) == (10, 0, 10)


def test_hints_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqrm", "prepare", "x", "-o", "y", "--cross", "user*ad", "--cross", "a b*c"])
    with pytest.raises(SystemExit):
        main()
    hint = capsys.readouterr().err.strip().rpartition(": ")[2]
    assert shlex.split(hint) == ["--cross", "user*ad,a b*c"]
    run = tmp_path / "my run"
    run.mkdir()
    with pytest.raises(UserError) as caught:
        predict(run, "log", tmp_path / "p.csv")
    assert str(run) in str(caught.value)
