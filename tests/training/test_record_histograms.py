"""Histograms of tables: what they count, and that a run that records them is the same run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny
from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.training.callbacks.record_histograms import histograms
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from launch_helpers import same_run
from run_helpers import Killed, killer


def recorded(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "histogram"]


def test_master_weights_and_codes_are_counted():
    tables = QuantEmbeddingBagCollection([7, 50], 4, bits=4).eval()
    found = histograms(tables, 1)
    weights = tables.table(1).numpy()
    edges = np.linspace(-np.abs(weights).max(), np.abs(weights).max(), 65)
    assert found["master"]["counts"] == np.histogram(weights, edges)[0].tolist()
    with torch.no_grad():
        used = tables(torch.stack([torch.zeros(50, dtype=torch.int64), torch.arange(50)], 1))[:, 1]
    values, counts = np.unique(used.numpy(), return_counts=True)
    assert found["quantized"]["values"] == pytest.approx(values, rel=1e-4)
    assert found["quantized"]["counts"] == counts.tolist()
    assert (found["bits"], found["rows"]) == (4, 50)


@pytest.mark.parametrize("options", [{"bits": 32}, {"bits": 4, "table_granularity": "row"}, {"bits": 8}])
def test_all_weights_are_in_the_counts(options):
    tables = QuantEmbeddingBagCollection([300], 4, **options)
    found = histograms(tables, 0)
    assert sum(found["master"]["counts"]) == 1200
    if options["bits"] == 32:
        assert found["quantized"] is None
    else:
        assert sum(found["quantized"]["counts"]) == 1200
        assert max(len(each) for each in found["quantized"].values() if isinstance(each, list)) <= 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.int4])
def test_encoded_tables_are_read_as_they_are_stored(dtype):
    tables = QuantEmbeddingBagCollection([40], 8, bits=4, dtype=dtype)
    assert sum(histograms(tables, 0)["master"]["counts"]) == 320


def test_a_large_table_is_sampled_evenly():
    tables = QuantEmbeddingBagCollection([1 << 18], 1, bits=4)
    with torch.no_grad():
        tables.table(0).copy_(torch.arange(1 << 18)[:, None] / (1 << 18))
    found = histograms(tables, 0)
    assert found["rows"] == 1 << 16
    assert found["master"]["counts"][32:] == pytest.approx([2048] * 32, abs=2)


def test_a_table_of_zeros_or_without_finite_weights_has_a_histogram():
    tables = QuantEmbeddingBagCollection([5], 2, bits=32)
    for value, counted in ((0.0, 10), (float("nan"), 0)):
        with torch.no_grad():
            tables.weight.fill_(value)
        assert sum(histograms(tables, 0)["master"]["counts"]) == counted


def test_a_run_that_records_is_the_same_run(generated, tmp_path):
    names = [column.name for column in generated.columns]
    config = tiny(epochs=2, eval_every=10, record_histograms=(names[2], "largest", names[2]))
    train(generated, tmp_path / "recorded", config)
    train(generated, tmp_path / "plain", replace(config, training=replace(config.training, record_histograms=())))
    one, two = (Run.open(tmp_path / name).load_model("last")[0].state_dict() for name in ("recorded", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    tables = {line["table"] for line in recorded(tmp_path / "recorded")}
    assert names[2] in tables
    assert len(tables) in (3, 4)
    assert {line["step"] for line in recorded(tmp_path / "recorded")} >= {10, 20}
    assert not recorded(tmp_path / "plain")


def test_a_resumed_run_goes_on_recording(generated, tmp_path):
    config = tiny(max_steps=5, eval_every=2, record_histograms=("largest",))
    train(generated, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, progress=killer(4), verify=False)
    resume(tmp_path / "cut")
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "cut")


def test_an_unknown_column_is_refused_before_any_work(generated, tmp_path):
    with pytest.raises(UserError, match="record_histograms: no categorical column 'C99'"):
        train(generated, tmp_path / "run", tiny(record_histograms=("C99",)))
    assert not (tmp_path / "run").exists()


def test_the_scale_of_a_period_is_not_refreshed_by_looking():
    tables = QuantEmbeddingBagCollection([9], 2, qat=QATConfig(bits=4, scale_refresh="periodic", scale_period=100))
    tables.train()
    tables(torch.arange(9)[:, None]).sum().backward()
    before = tables.scale.clone()
    with torch.no_grad():
        tables.weight.mul_(0.5)
    histograms(tables, 0)
    assert torch.equal(tables.scale, before)


def test_it_is_part_of_the_configuration():
    assert Config.load(None, {"record_histograms": "C1,C2"}).training.record_histograms == ("C1", "C2")
