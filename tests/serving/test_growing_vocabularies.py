"""Models of one day on data of another: extended vocabularies, and hashed ids, in every place that takes a dataset."""

import csv
import dataclasses
import functools
import json
import operator

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

import dqrm
from cli_helpers import command
from conftest import tiny
from data_helpers import table
from dqrm import ExportConfig, PredictConfig, UserError
from dqrm.artifact.file import Artifact
from dqrm.data.vocabulary import Vocabulary
from extension_helpers import CONFIG, log

# Of the AUC of a few hundred rows, for pairs of rows that differ in what the model does not see.
TIES = 0.01
HASHED = dataclasses.replace(CONFIG, vocabulary="hash", rows=40)


def days_of(folder, config, count, extend):
    """Datasets of some days, the first of `config`, and what a model trained on each is."""
    made = []
    for day in range(count):
        # The last day is shorter: fewer new ids than freed rows.
        file = table(folder / f"{day}.csv", log(day, 100 if day == count - 1 else 200))
        extended = {"extend": made[-1].path} if extend and made else {}
        made.append(dqrm.prepare([file], folder / f"d{day}", None if extended else config, **extended))
    return made


@pytest.fixture(scope="module", params=["growing", "evicting", "hashed"])
def made(request, tmp_path_factory):
    """(folder, kind, datasets of 4 days, a run on the day 1, its artifact and its ONNX file)."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    config = HASHED if kind == "hashed" else dataclasses.replace(CONFIG, evict_after=2 if kind == "evicting" else None)
    days = days_of(folder, config, 4, kind != "hashed")
    dqrm.train(days[1], folder / "run", tiny(epochs=3))
    for name in ("run.dqrm", "run.onnx"):
        dqrm.export_run(folder / "run", folder / name)
    return folder, kind, days


def by_hand(folder, dataset, trained_on, split):
    """Labels and logits of a split: each raw row's keys are looked up in dicts, the model's own rows."""
    model, _ = dqrm.Run.open(folder / "run").load_model()
    known = []
    for number in range(3):
        then, now = (data.vocabulary(number) for data in (trained_on, dataset))
        rows = dict(zip(then.keys, then.table_rows.tolist()))
        known.append({key: row for key, row, since in zip(now.keys, now.table_rows.tolist(), now.since.tolist())
                      if since <= trained_on.day and rows[key] == row})  # fmt: skip
    with (folder / f"{dataset.day}.csv").open() as file:
        lines = list(csv.DictReader(file))
    begin = {"train": 0, "validation": dataset.rows["train"], "test": len(lines) - dataset.rows["test"]}[split]
    lines = lines[begin : begin + dataset.rows[split]]
    crosses = [f"{line['user']}\x1f{line['site']}" if line["user"] else "" for line in lines]
    ids = [[known[0].get(line["user"], 0), known[1].get(cross, 0)] for line, cross in zip(lines, crosses)]
    bags = [[known[2].get(tag, 0) for tag in line["tags"].split("|") if tag] for line in lines]
    lengths = np.array([len(bag) for bag in bags])
    values = torch.tensor(functools.reduce(operator.iadd, bags, []), dtype=torch.int32)
    dense = torch.tensor([[np.log1p(max(0, float(line["price"])))] for line in lines], dtype=torch.float32)
    with torch.inference_mode():
        logits = model(dense, torch.tensor(ids, dtype=torch.int32),
                       ((values, torch.from_numpy(np.cumsum(lengths) - lengths)),))  # fmt: skip
    return np.array([int(line["click"]) for line in lines]), logits.numpy().astype(np.float64)


def assert_alike(found, wanted):
    """Equal up to the order of sums; which, of two rows that score alike, a runtime ranks first is open."""
    for name, value in wanted.items():
        assert found[name] == (
            value if name == "newer_ids" else pytest.approx(value, abs=TIES if name == "auc" else 1e-6)
        )
    assert found.keys() == wanted.keys()


def test_metrics_of_later_days(made):
    folder, kind, days = made
    loaded = dqrm.load(folder / "run.dqrm")
    for day in (1, 2, 3):
        for split in ("train", "validation", "test"):
            found = [
                dqrm.evaluate(model, days[day], split)
                for model in (folder / "run", folder / "run.dqrm", folder / "run.onnx", loaded)
            ]
            for other in found[1:]:
                assert_alike(other, found[0])
            if kind == "hashed" or day == 1:
                assert "newer_ids" not in found[0]
                continue
            labels, logits = by_hand(folder, days[day], days[1], split)
            probabilities = 1 / (1 + np.exp(-logits))
            assert found[0]["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=TIES)
            assert found[0]["log_loss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
            newer = found[0]["newer_ids"]
            assert 0 < newer["ids"] < newer["all"]


def scored(model, log_file, output, **fields):
    dqrm.predict(model, [log_file], output, PredictConfig(**fields))
    return pl.read_parquet(output)["probability"].to_numpy()


def test_predictions_with_later_vocabularies(made, tmp_path):
    """By the vocabularies of a later day a model has the same rows, without those that were freed since."""
    folder, kind, days = made
    for day in (1, 2, 3):
        file = folder / f"{day}.csv"
        own = scored(folder / "run.dqrm", file, tmp_path / "own.parquet")
        rows = dqrm.load(folder / "run.dqrm").score(pl.read_csv(file, infer_schema=False))
        assert rows.tolist() == own.tolist()
        for model in (folder / "run", folder / "run.dqrm", folder / "run.onnx"):
            later = scored(model, file, tmp_path / "later.parquet", data=str(days[3].path))
            if kind != "evicting":
                np.testing.assert_allclose(later, own, atol=1e-6)
            elif day == 1:  # ids of that day are forgotten by day 3
                assert not np.allclose(later, own, atol=1e-6)
            if kind != "hashed" and day == 3:
                logits = np.concatenate([by_hand(folder, days[3], days[1], split)[1] for split in
                                         ("train", "validation", "test")])  # fmt: skip
                np.testing.assert_allclose(later, 1 / (1 + np.exp(-logits)), atol=1e-6)
    if kind == "evicting":
        loaded = dqrm.load(folder / "run.dqrm", data=days[3].path)
        again = loaded.score(pl.read_csv(folder / "3.csv", infer_schema=False))
        np.testing.assert_allclose(again, later, atol=1e-6)


@pytest.mark.parametrize("mode", ["embed", "beside", "none"])
def test_exports_with_later_vocabularies(made, tmp_path, mode):
    folder, kind, days = made
    options = ExportConfig(data=str(days[3].path), vocabulary=mode)
    found = dqrm.export_run(folder / "run", tmp_path / "new.dqrm", options)
    assert found["largest_difference"] < 1e-5
    opened = Artifact.open(tmp_path / "new.dqrm", verify=True)
    schema = opened.content["schema"]["columns"]
    assert [column["rows"] for column in schema] == list(days[1].table_rows)
    assert opened.container.version == 4
    if kind == "hashed":
        # Nothing is shipped, and nothing is needed.
        assert opened.sizes()["vocabularies"] == 0
        assert not list(tmp_path.glob("*vocabulary*"))
    elif mode == "none":
        with pytest.raises(UserError, match="was exported with --vocabulary none"):
            scored(tmp_path / "new.dqrm", folder / "3.csv", tmp_path / "p.parquet")
        return
    else:
        vocabularies = [Vocabulary.read(opened.vocabulary(number)) for number in range(3)]
        assert [vocabulary.rows for vocabulary in vocabularies] == list(days[1].table_rows)
    new = scored(tmp_path / "new.dqrm", folder / "3.csv", tmp_path / "new.parquet")
    later = scored(folder / "run", folder / "3.csv", tmp_path / "later.parquet", data=str(days[3].path))
    np.testing.assert_allclose(new, later, atol=1e-6)
    assert dqrm.evaluate(tmp_path / "new.dqrm", days[3])["auc"] == dqrm.evaluate(folder / "run", days[3])["auc"]


def test_a_model_of_a_later_day(made, tmp_path):
    """Trained on the last day, whose tables have vacant rows: its artifact knows all ids; earlier days are refused."""
    folder, kind, days = made
    dqrm.train(days[3], tmp_path / "run", tiny(epochs=1))
    dqrm.export_run(tmp_path / "run", tmp_path / "run.dqrm")
    if kind == "evicting":
        assert any(v.rows > len(v.keys) + 1 for v in map(days[3].vocabulary, range(3)))
    assert_alike(dqrm.evaluate(tmp_path / "run.dqrm", days[3]), dqrm.evaluate(tmp_path / "run", days[3]))
    if kind == "hashed":
        assert dqrm.evaluate(tmp_path / "run", days[0])["rows"] == days[0].rows["test"]
        return
    for model in (tmp_path / "run", tmp_path / "run.dqrm", dqrm.load(tmp_path / "run.dqrm")):
        with pytest.raises(UserError, match=r"is not the dataset that .* nor does it have or extend its vocabularies"):
            dqrm.evaluate(model, days[1])
    with pytest.raises(UserError, match="is not the dataset that"):
        scored(tmp_path / "run", folder / "1.csv", tmp_path / "p.parquet", data=str(days[1].path))
    with pytest.raises(UserError, match="is not the dataset that"):
        dqrm.export_run(tmp_path / "run", tmp_path / "x.dqrm", ExportConfig(data=str(days[1].path)))


def test_a_run_is_resumed_on_its_own_data(made):
    folder, _, days = made
    assert dqrm.resume(folder / "run", days[1].path)["steps"]
    with pytest.raises(UserError, match="is not the dataset that"):
        dqrm.resume(folder / "run", days[2].path)


def test_damaged_vocabularies_of_a_later_day_are_found(made, tmp_path):
    import shutil

    folder, kind, days = made
    if kind == "hashed":
        pytest.skip("hashed ids have no vocabularies")
    copy = tmp_path / "copy"
    shutil.copytree(days[3].path, copy)
    path = copy / days[3].vocabulary_path("user").relative_to(days[3].path)
    data = bytearray(path.read_bytes())
    data[20] ^= 4
    path.write_bytes(data)
    for model in (folder / "run", folder / "run.dqrm", dqrm.load(folder / "run.dqrm")):
        with pytest.raises(UserError, match=r"user.parquet is damaged: its SHA-256"):
            dqrm.evaluate(model, copy)


def test_it_is_told(made, capsys):
    folder, kind, days = made
    status, out, _ = command(capsys, "eval", folder / "run", days[3].path)
    assert status == 0
    assert ("newer than the model's vocabularies" in out) == (kind != "hashed")
    status, out, _ = command(capsys, "eval", folder / "run.dqrm", days[3].path, "--json")
    assert ("newer_ids" in json.loads(out)) == (kind != "hashed")
    status, out, _ = command(capsys, "info", folder / "run.dqrm")
    assert status == 0
    assert ("ids are hashed to rows" in out) == (kind == "hashed")
