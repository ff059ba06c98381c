"""Predictions of a raw log: the values, their order, every kind of file, and an output that is whole or untouched."""

import errno
import os
import re

import numpy as np
import polars as pl
import pytest
import torch

from data_helpers import LOG, LOG_CONFIG, criteo_lines, spoil, table, write
from dqrm.data import lines, sources
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.raw import RawEncoder, RawLog
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import UserError
from dqrm.options import build
from dqrm.serving import writer as module
from dqrm.serving.writer import predict


def opened(dataset, sources, **more):
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    return RawLog(
        sources, RawEncoder(build(PrepareConfig, dataset.info["options"], "options"), columns, vocabularies, **more)
    )


def score(batch):
    """A number that depends on every cell of a row, bags included."""
    total = batch.dense.double().sum(1) / 10
    total += (batch.ids * torch.arange(1, batch.ids.shape[1] + 1)).double().sum(1) / 50
    for values, offsets in batch.bags:
        ends = [*offsets.tolist()[1:], len(values)]
        sums = [float((values[a:b] * torch.arange(1, b - a + 1)).sum()) for a, b in zip(offsets.tolist(), ends)]
        total += torch.tensor(sums, dtype=torch.float64) / 30
    return (total - 2).float()


def wanted(dataset, order):
    """The probabilities of the splits' own batches."""
    logits = [score(batch) for name in order for batch in dataset.split(name).batches(1000)]
    return torch.cat(logits).sigmoid().numpy()


def scored_file(path):
    if path.suffix == ".parquet":
        return pl.read_parquet(path.read_bytes())  # a name may hold brackets
    return pl.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",", infer_schema=False).with_columns(
        pl.col("probability").cast(pl.Float32)
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A prepared table with a multi-valued column, and its log."""
    folder = tmp_path_factory.mktemp("small")
    config = PrepareConfig(
        label="click",
        categorical=("user", "ad", "tags"),
        multi=("tags",),
        dense=("price",),
        split="time",
        test_fraction=0.2,
        validation_fraction=0.2,
    )
    path = table(folder / "log.csv", LOG)
    return prepare([path], folder / "data", config), path


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p.tsv", "new/folder/P.CSV", "odd [1].parquet"])
@pytest.mark.parametrize("batch_size", [1, 7, 8192])
def test_probabilities_follow_the_kept_columns_in_the_order_of_the_log(tmp_path, small, name, batch_size):
    dataset, path = small
    told = []
    output = tmp_path / name
    result = predict(score, opened(dataset, path, keep=("day", "user")), output, batch_size, lambda *x: told.append(x))
    if output.suffix == ".CSV":
        output = output.rename(tmp_path / "p.csv")
    frame = scored_file(output)
    assert frame.schema == {"day": pl.String, "user": pl.String, "probability": pl.Float32}
    np.testing.assert_array_max_ulp(
        frame["probability"].to_numpy(), wanted(dataset, ("train", "validation", "test")), 2
    )
    assert frame["user"].to_list() == [row["user"] for row in LOG]
    assert frame["day"].to_list() == [str(row["day"]) for row in LOG]
    assert set(result) == {"rows", "skipped", "damaged", "unseen", "seconds", "rows_per_second", "threads"}
    assert (result["rows"], result["skipped"], result["damaged"]) == (20, 0, [])
    assert result["threads"] == torch.get_num_threads()
    assert result["rows_per_second"] == result["rows"] / result["seconds"] > 0
    size = path.stat().st_size
    assert told[-1] == ("scoring", size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert sorted(os.listdir(tmp_path)) == sorted({output.name, *(["new"] if "new" in name else [])})


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_many_parts_of_several_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(lines, "_BLOCK", 3000)
    monkeypatch.setattr(sources, "_READ", 1000)
    monkeypatch.setattr(module, "_PART_ROWS", 25)
    rows = criteo_lines(300)
    dataset = prepare([write(tmp_path / "log.txt", rows)], tmp_path / "data", PrepareConfig(layout="criteo-kaggle"))
    bare = [row.split("\t", 1)[1] for row in rows]
    bare[150] = spoil(bare[150], 2, "x")
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder / "a_2", bare[:120])
    write(folder / "a_10", bare[120:])
    log = opened(dataset, [str(folder / "a_*")], keep=("I1", "C3"), on_error="skip")
    output = folder / f"p.{suffix}"
    result = predict(score, log, output, batch_size=16)
    frame = scored_file(output)
    good = [n for n in range(300) if n != 150]
    assert (result["rows"], result["skipped"]) == (299, 1)
    np.testing.assert_array_max_ulp(
        frame["probability"].to_numpy(), wanted(dataset, ("train", "test", "validation"))[good], 2
    )
    assert frame["I1"].fill_null("").to_list() == [bare[n].split("\t")[0] for n in good]
    assert frame["C3"].fill_null("").to_list() == [bare[n].split("\t")[15] for n in good]
    assert sorted(os.listdir(folder)) == ["a_10", "a_2", f"p.{suffix}"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
@pytest.mark.parametrize("keep", [(), ("ad", "day")])
def test_an_empty_log_and_nothing_kept(tmp_path, small, suffix, keep):
    dataset, path = small
    empty = tmp_path / "empty.csv"
    empty.write_text("user,ad,price,tags,day\n")
    output = tmp_path / f"p.{suffix}"
    result = predict(score, opened(dataset, empty, keep=keep), output)
    assert (result["rows"], result["rows_per_second"]) == (0, 0)
    assert scored_file(output).columns == [*keep, "probability"]
    assert scored_file(output).height == 0
    predict(score, opened(dataset, path, keep=keep), output)
    assert scored_file(output).height == 20
    assert sorted(os.listdir(tmp_path)) == sorted(["empty.csv", output.name])


def test_parquet_keeps_its_types_and_csv_refuses_lists(tmp_path, small):
    dataset, _ = small
    frame = pl.DataFrame(LOG).with_columns(
        pl.col("tags").str.split("|"), pl.col("day").cast(pl.Int16), pl.date(2024, 1, 1).alias("date")
    )
    frame.write_parquet(tmp_path / "log.parquet")
    keep = ("tags", "date", "day", "click")
    log = opened(dataset, tmp_path / "log.parquet", keep=keep)
    predict(score, log, tmp_path / "p.parquet")
    assert pl.read_parquet(tmp_path / "p.parquet").drop("probability").equals(frame.select(keep))
    with pytest.raises(UserError, match=r"column tags is of type List\(String\), which .csv cannot hold"):
        predict(score, log, tmp_path / "p.csv")
    predict(score, opened(dataset, tmp_path / "log.parquet", keep=keep[1:]), tmp_path / "p.csv")
    assert scored_file(tmp_path / "p.csv")["date"].to_list() == ["2024-01-01"] * 20


def test_outputs_that_cannot_be(tmp_path, small):
    dataset, path = small
    log = opened(dataset, path)
    for name in ("p.txt", "p", "p.csv.gz", "p.json"):
        with pytest.raises(UserError, match=rf"cannot be written as .*{name}, expected a name that ends in .parquet"):
            predict(score, log, tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        predict(score, log, tmp_path / "folder.csv")
    with pytest.raises(UserError, match="is a file of the log"):
        predict(score, log, path)
    (tmp_path / "link.csv").symlink_to(path)
    with pytest.raises(UserError, match="is a file of the log"):
        predict(score, log, tmp_path / "link.csv")
    copy = tmp_path / "out.csv.partial"
    copy.write_bytes(path.read_bytes())
    delimited = dict(dataset.info["options"], delimiter=",")
    columns = dataset.info["schema"]["columns"]
    vocabularies = [Vocabulary.read(dataset.vocabulary_path(column["name"])) for column in columns]
    other = RawLog(copy, RawEncoder(build(PrepareConfig, delimited, "options"), columns, vocabularies))
    with pytest.raises(UserError, match=r"out.csv.partial is a file of the log"):
        predict(score, other, tmp_path / "out.csv")
    copy.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/p.csv: (Not a directory|File exists)"):
        predict(score, log, tmp_path / "file" / "p.csv")
    with pytest.raises(UserError, match="batch_size is 0"):
        predict(score, log, tmp_path / "p.csv", batch_size=0)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.csv", "link.csv"]


def failing(kind):
    """A score function that fails at the third batch."""
    calls = []

    def scored(batch):
        calls.append(1)
        if len(calls) < 3:
            return score(batch)
        if kind in ("nan", "inf"):
            return torch.full((len(batch),), float(kind))
        raise {"interrupt": KeyboardInterrupt, "bug": RuntimeError, "file": FileNotFoundError}[kind]("stopped")

    return scored


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("nan", UserError, "the model predicts nan for row 3 of the log, expected a finite number"),
        ("inf", UserError, "the model predicts inf for row 3"),
        ("interrupt", KeyboardInterrupt, "stopped"),
        ("bug", RuntimeError, "stopped"),
        ("file", FileNotFoundError, "stopped"),
    ],
)
def test_a_failure_leaves_the_old_output_and_nothing_else(
    tmp_path, monkeypatch, small, suffix, exists, kind, error, reason
):
    monkeypatch.setattr(module, "_PART_ROWS", 2)
    monkeypatch.setattr(lines, "_BLOCK", 50)
    monkeypatch.setattr(sources, "_READ", 40)
    output = tmp_path / f"p.{suffix}"
    if exists:
        output.write_text("old")
    with pytest.raises(error, match=reason):
        predict(failing(kind), opened(*small), output, batch_size=1)
    assert os.listdir(tmp_path) == ([output.name] if exists else [])
    assert not exists or output.read_text() == "old"


def test_a_malformed_line_leaves_the_old_output(tmp_path, small):
    dataset, _ = small
    rows = [*LOG[:10], {**LOG[10], "price": "much"}, *LOG[11:]]
    path = table(tmp_path / "log.csv", rows)
    (tmp_path / "p.csv").write_text("old")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 12: column price holds 'much'")):
        predict(score, opened(dataset, path), tmp_path / "p.csv")
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "p.csv"]
    assert (tmp_path / "p.csv").read_text() == "old"


@pytest.mark.parametrize(
    ("suffix", "method"), [("csv", "write_csv"), ("parquet", "write_parquet"), ("parquet", "sink")]
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), pl.exceptions.ComputeError("full")]
)
def test_a_full_disk_leaves_the_old_output(tmp_path, monkeypatch, small, suffix, method, error):
    monkeypatch.setattr(module, "_PART_ROWS", 2)
    monkeypatch.setattr(lines, "_BLOCK", 50)
    monkeypatch.setattr(sources, "_READ", 40)
    calls = []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= (1 if method == "sink" else 3):
            raise error
        return original(*arguments, **options)

    owner, name = (pl.LazyFrame, "sink_parquet") if method == "sink" else (pl.DataFrame, method)
    original = getattr(owner, name)
    log = opened(*small)
    output = tmp_path / f"p.{suffix}"
    output.write_text("old")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError, match=r"cannot write to .*: (the disk is full .*|full); no output was kept"):
        predict(score, log, output, batch_size=2)
    assert os.listdir(tmp_path) == [output.name]
    assert output.read_text() == "old"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_two_runs_into_one_output_do_not_mix(tmp_path, small, suffix):
    output = tmp_path / f"p.{suffix}"
    refused = []

    def scored(batch):
        with pytest.raises(UserError, match="another dqrm predict is writing to"):
            predict(score, opened(*small), output)
        refused.append(1)
        return score(batch)

    predict(scored, opened(*small), output)
    assert refused
    assert scored_file(output).height == 20
    # What a killed run left is no hindrance.
    (tmp_path / f"p.{suffix}.partial").write_text("left")
    (tmp_path / f"p.{suffix}.partial.parts").mkdir()
    (tmp_path / f"p.{suffix}.partial.parts" / "part-000009.parquet").write_text("left")
    predict(score, opened(*small), output)
    assert scored_file(output).height == 20
    assert sorted(os.listdir(tmp_path)) == sorted(
        [output.name, *([] if suffix == "parquet" else [f"{output.name}.partial.parts"])]
    )


def test_scoring_keeps_no_gradients(tmp_path, small):
    weight = torch.nn.Parameter(torch.ones(()))
    modes = []

    def scored(batch):
        modes.append(torch.is_inference_mode_enabled())
        return (score(batch) * weight).unsqueeze(1).bfloat16()

    predict(scored, opened(*small), tmp_path / "p.parquet", batch_size=6)
    assert all(modes)
    assert len(modes) == 4
    near = wanted(small[0], ("train", "validation", "test"))
    assert scored_file(tmp_path / "p.parquet")["probability"].to_numpy() == pytest.approx(near, abs=0.01)


def test_a_link_means_the_file(tmp_path, small):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "p.csv").symlink_to(tmp_path / "real.csv")
    predict(score, opened(*small), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").is_symlink()
    assert scored_file(tmp_path / "real.csv").height == 20


def test_a_short_text_log_of_another_model(tmp_path):
    """Columns that the model lacks are no matter, whatever their order."""
    dataset = prepare([table(tmp_path / "a.csv", LOG)], tmp_path / "data", LOG_CONFIG)
    path = table(tmp_path / "b.tsv", [dict(reversed(row.items())) for row in LOG[:5]], delimiter="\t")
    predict(score, opened(dataset, path), tmp_path / "p.csv")
    first = wanted(dataset, ("train",))[:5]
    assert scored_file(tmp_path / "p.csv")["probability"].to_list() == pytest.approx(first.tolist(), rel=1e-6)
