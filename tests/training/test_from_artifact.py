"""Runs that start from an artifact: `train(..., start_from="model.dqrm")`."""

from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tiny
from daily_helpers import days, extended, started
from dqrm import ExportConfig, ModelConfig, QATConfig, Run, UserError, export_run, resume, train
from dqrm.data.lineage import row_changes
from dqrm.quant.linear import QuantLinear
from dqrm.quant.storage import storage_of
from run_helpers import Killed, killer


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days")
    return extended(days(folder / "logs", 3), folder / "data")


def exported(data, folder, config, **more):
    """A trained run and its artifact."""
    train(data, folder / "run", config)
    export_run(folder / "run", folder / "model.dqrm", ExportConfig(**more))
    return folder / "run", folder / "model.dqrm"


def table_values(run, number, rows):
    """What evaluation sees of these rows of a table, of all tables' bags of one id."""
    model, _ = Run.open(run).load_model()
    tables, count = model.tables, len(rows)
    ids = torch.zeros(count, tables.num_single, dtype=torch.int64)
    zeros = torch.zeros(count, dtype=torch.int64)
    bags = [[zeros, torch.arange(count)] for _ in tables.table_rows[tables.num_single :]]
    if number < tables.num_single:
        ids[:, number] = rows
    else:
        bags[number - tables.num_single][0] = rows
    with torch.no_grad():
        return tables(ids, [tuple(bag) for bag in bags])[:, number]


CASES = {
    "scale of a table": {},
    "scales of rows": {"table_granularity": "row"},
    "scales of blocks": {"table_granularity": "block:4"},
    "zero points": {"table_granularity": "row", "table_qscheme": "affine"},
    "two widths": {"table_bits": 4, "small_table_bits": 8, "small_table_rows": 30},
    "FP32": {"bits": 32},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_layers_have_the_values_of_their_codes(datasets, tmp_path, case, dtype):
    """Against what the exported run evaluates with; rows of new ids are those of a run without a start."""
    monday, tuesday, _ = datasets
    config = replace(tiny(optimizer="adagrad", epochs=1), quantization=QATConfig(**CASES[case]))
    run, artifact = exported(monday, tmp_path, config)
    here = replace(config, training=replace(config.training, seed=5, table_dtype=dtype))
    first = started(tuesday, tmp_path / "2", here, start_from=artifact)
    fresh = started(tuesday, tmp_path / "3", here)
    weight, drawn = (each.weights["tables.weight"] for each in (first, fresh))
    start, kept = 0, 0
    for number, change in enumerate(row_changes(tuesday, Run.open(run).info["data"], run)):
        rows = torch.from_numpy(change.kept).long()
        expected = storage_of(weight).read(storage_of(weight).encode(table_values(run, number, rows)))
        assert torch.equal(storage_of(weight).gather(weight, rows + start), expected)
        others = torch.cat([torch.from_numpy(each).long() for each in (change.new, change.reused, change.vacant)])
        assert len(others)
        assert torch.equal(weight[others + start], drawn[others + start])
        start, kept = start + tuesday.table_rows[number], kept + len(rows)
    assert kept > 10
    assert float((weight.float() - drawn.float()).abs().max()) > 1e-3
    model, _ = Run.open(run).load_model()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            with torch.no_grad():
                shown = layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))
            torch.testing.assert_close(first.weights[f"{name}.weight"], shown.T, rtol=1e-5, atol=1e-6)
            assert torch.equal(first.weights[f"{name}.bias"], layer.bias)
    assert not any(state["sum"].any() for group in first.state for state in group)


DCN = ModelConfig(model="dcn", embedding_dim=4, deep_mlp=(8, 6), cross_layers=2, dropout=0.1)


@pytest.mark.parametrize("model", [tiny().model, DCN], ids=["dlrm", "dcn"])
def test_without_a_learning_rate_it_evaluates_as_the_artifact(generated, tmp_path, model):
    config = replace(tiny(epochs=1, max_steps=20), model=model)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.01))
    run, artifact = exported(generated, tmp_path, config)
    still = replace(config, optimizer=replace(config.optimizer, learning_rate=0.0))
    told = []
    summary = train(generated, tmp_path / "2", still, start_from=artifact, log=told.append)
    assert summary["test"] == pytest.approx(Run.open(run).summary["test"], abs=1e-6)
    assert summary["test"] == pytest.approx(dqrm.evaluate(dqrm.load(artifact), generated, "test"), abs=1e-6)
    wanted = f"Starting from {artifact}: {sum(generated.table_rows):,} table rows kept, 0 table rows new"
    assert any(line.startswith(wanted) and "codes of 4 bits, and no optimizer state" in line for line in told), told


def test_all_but_the_tables(datasets, tmp_path):
    config = tiny(epochs=1, max_steps=9)
    _, artifact = exported(datasets[0], tmp_path, config, calibrate="platt")
    told = []
    first = started(datasets[0], tmp_path / "2", config, start_from=artifact, carry="mlp", log=told.append)
    fresh = started(datasets[0], tmp_path / "3", config)
    assert torch.equal(first.weights["tables.weight"], fresh.weights["tables.weight"])
    assert not torch.equal(first.weights["top.0.weight"], fresh.weights["top.0.weight"])
    assert any("all weights but the tables'; dropped: its calibration" in line for line in told), told


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_it_again(datasets, tmp_path):
    config = tiny(optimizer="adagrad", epochs=1)
    _, artifact = exported(datasets[0], tmp_path, config)
    whole = train(datasets[1], tmp_path / "whole", config, start_from=artifact)
    with pytest.raises(Killed):
        train(datasets[1], tmp_path / "2", config, start_from=artifact, progress=killer(3))
    assert not list((tmp_path / "2/checkpoints").glob("step-*"))
    other = tmp_path / "other"
    _, changed = exported(datasets[0], other, tiny(optimizer="adagrad", epochs=1, seed=9))
    kept = artifact.read_bytes()
    artifact.write_bytes(changed.read_bytes())
    with pytest.raises(UserError, match=r"model\.dqrm is no longer the artifact that this one was started from"):
        resume(tmp_path / "2")
    artifact.unlink()
    with pytest.raises(UserError, match=r"model\.dqrm"):
        resume(tmp_path / "2")
    artifact.write_bytes(kept)
    assert resume(tmp_path / "2")["test"] == whole["test"]


@pytest.mark.parametrize(
    "change", ["architecture", "vocabulary", "batch_norm", "carry", "damaged", "no artifact", "nothing"]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(datasets, tmp_path, change):
    config, more = tiny(max_steps=3), {}
    if change == "batch_norm":
        config = replace(config, model=replace(DCN, batch_norm=True))
    _, artifact = exported(datasets[1], tmp_path, config)
    data = datasets[1]
    if change == "architecture":
        config = replace(config, model=replace(config.model, top_mlp=(16, 1)))
        message = "model.dqrm has top_mlp 8-1, but this run 16-1: a run starts from one of the same architecture"
    elif change == "vocabulary":
        data = datasets[0]
        message = "is not the dataset that .*model.dqrm was trained on, nor does it have or extend its vocabularies"
    elif change == "batch_norm":
        message = "model.dqrm has its batch normalization folded into its layers, so no run with batch_norm starts"
    elif change == "carry":
        more, message = {"carry": "tables"}, "carry: got 'tables', expected 'all' or 'mlp'"
    elif change == "damaged":
        data_bytes = bytearray(artifact.read_bytes())
        data_bytes[-5] ^= 1
        artifact.write_bytes(data_bytes)
        message = "model.dqrm is damaged"
    elif change == "nothing":
        artifact.unlink()
        message = "model.dqrm does not exist, expected a run folder or a .dqrm file to start from"
    else:
        artifact.write_text("no artifact")
        message = "model.dqrm is not a dqrm model, expected a .dqrm file"
    with pytest.raises(UserError, match=message):
        train(data, tmp_path / "2", config, start_from=artifact, **more)
    assert not (tmp_path / "2").exists()
