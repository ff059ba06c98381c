"""Models of hashed ids: rows hashed by hand give, in every runtime, the probabilities of `score` and `predict`."""

import csv
import dataclasses
import importlib.util

import numpy as np
import polars as pl
import pytest
import torch

import dqrm
from cli_helpers import command
from conftest import tiny
from data_helpers import table
from dqrm.data.batches import Batch
from dqrm.data.folder import SPLITS
from dqrm.export.formats import score_file
from extension_helpers import CONFIG, keys_of, log
from hash_helpers import rows_of

COLUMNS = (("user", 40), ("user*site", 90), ("tags", 7))
# ExecuTorch is an extra of its own.
SUFFIXES = [".dqrm", ".onnx", ".pt2", *[".pte"] * (importlib.util.find_spec("executorch") is not None)]


def by_hand(lines, hashes):
    """The batch of raw rows, key by key."""
    found = [
        [[row for key in keys_of(line, name) for row in rows_of(key, size, seed, hashes)] for line in lines]
        for seed, (name, size) in enumerate(COLUMNS)
    ]
    single = 2 if hashes == 1 else 0
    ids = torch.tensor(list(zip(*found[:single])), dtype=torch.int32).reshape(len(lines), single)
    bags = []
    for column in found[single:]:
        lengths = np.array([len(cell) for cell in column])
        values = torch.tensor([row for cell in column for row in cell], dtype=torch.int32)
        bags.append((values, torch.from_numpy(np.cumsum(lengths) - lengths)))
    dense = torch.tensor([[np.log1p(max(0, float(line["price"])))] for line in lines], dtype=torch.float32)
    return Batch(dense, ids, tuple(bags), torch.zeros(len(lines)))


@pytest.fixture(scope="module", params=[1, 2])
def made(request, tmp_path_factory):
    """(folder, hash functions): data of two days, a run on the first one, and all its exports."""
    folder, hashes = tmp_path_factory.mktemp(f"hashes{request.param}"), request.param
    config = dataclasses.replace(
        CONFIG, vocabulary="hash", rows=40, column_rows=("user*site=90", "tags=7"), hashes=hashes
    )
    for day in range(2):
        dqrm.prepare(table(folder / f"{day}.csv", log(day, 200)), folder / f"d{day}", config)
    dqrm.train(folder / "d0", folder / "run", tiny(epochs=1))
    for suffix in SUFFIXES:
        assert dqrm.export_run(folder / "run", folder / f"run{suffix}")["largest_difference"] < 1e-5
    return folder, hashes


def test_every_runtime_has_the_same_inputs(made, tmp_path):
    folder, hashes = made
    frame = pl.read_csv(folder / "1.csv", infer_schema=False)
    with (folder / "1.csv").open() as file:
        batch = by_hand(list(csv.DictReader(file)), hashes)
    probabilities = dqrm.load(folder / "run.dqrm").score(frame)
    for suffix in SUFFIXES:
        found = torch.sigmoid(torch.as_tensor(score_file(folder / f"run{suffix}")(batch))).numpy()
        np.testing.assert_allclose(found, probabilities, atol=1e-6, err_msg=suffix)
    few = dqrm.load(folder / "run.dqrm").score(frame[:3].to_dicts())
    np.testing.assert_allclose(few, probabilities[:3], atol=1e-6)
    for model in ("run", "run.dqrm", "run.onnx"):
        data = None if model == "run.dqrm" else str(folder / "d1")
        dqrm.predict(folder / model, [folder / "1.csv"], tmp_path / "p.parquet", dqrm.PredictConfig(data=data))
        predicted = pl.read_parquet(tmp_path / "p.parquet")["probability"].to_numpy()
        np.testing.assert_allclose(predicted, probabilities, atol=1e-6, err_msg=model)


def test_a_second_day_is_evaluated_trained_on_and_told(made, tmp_path, capsys):
    """Ids of another day need no preparation; every id of it has as many rows as there are functions."""
    folder, hashes = made
    day = dqrm.Dataset(folder / "d1")
    found = [dqrm.evaluate(folder / model, day)["log_loss"] for model in ("run", "run.dqrm", "run.onnx")]
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)
    summary = dqrm.train(day, tmp_path / "run", tiny(epochs=1), start_from=folder / "run")
    assert summary["steps"]
    status, told, _ = command(capsys, "info", day.path)
    assert status == 0
    assert f"Ids are hashed to rows, each to {hashes} of its table" in told
    assert day.info["options"].get("hashes", 1) == hashes
    assert day.num_single == (2 if hashes == 1 else 0)
    if hashes == 2:
        assert [column["hashes"] for column in day.info["schema"]["columns"]] == [2, 2, 2]
        for split in SPLITS:
            assert day.info["values"][split]["user"] == 2 * day.rows[split]
