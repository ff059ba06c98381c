"""Runs whose tables are stored as INT4 rows with an INT8 tier: resumed, exported, and damaged."""

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm.quant.storage import INT4
from dqrm.training.run import Run
from launch_helpers import newest
from run_helpers import assert_resumes, last

NAME = "weights.safetensors/tables.weight"
REDRAWN = {"training": {"callbacks": ("redraw_tables:min_rows=20",)}}
RANKS = {"exchange": {"simulate_ranks": 3}, "quantization": {"table_granularity": "row"}}
PERIODIC = {"quantization": {"scale_refresh": "periodic", "scale_period": 2}, "training": {"hot_rows": 0.0}}
CLIPPED = {"quantization": {"quantizer": "mse"}, "optimizer": {"optimizer": "adam"}}
AFFINE = {"quantization": {"table_qscheme": "affine"}, "optimizer": {"optimizer": "dense_adam"}}


def tiered(changes=None, **training):
    given = {"max_steps": 40, "checkpoint_every": 9, "table_dtype": "int4", "hot_rows": 0.1}
    sections = tiny(**given | training)
    changed = {name: values | (changes or {}).get(name, {}) for name, values in sections.to_dict().items()}
    return dqrm.Config.from_dict(changed)


@pytest.mark.parametrize("changes", [REDRAWN, RANKS, PERIODIC, CLIPPED, AFFINE])
def test_a_run_that_is_killed_goes_on_bit_for_bit_and_its_artifact_is_the_checkpoint(generated, tmp_path, changes):
    assert_resumes(generated, tmp_path, tiered(changes), 25)
    assert last(tmp_path / "cut")[NAME].dtype == torch.int32
    assert dqrm.export_run(tmp_path / "cut", tmp_path / "model.dqrm")["largest_difference"] == 0


@pytest.fixture(scope="module")
def run(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiered") / "run"
    dqrm.train(generated, folder, tiered())
    return Run.open(folder)


def test_its_info_says_what_the_tables_take(run):
    rows = sum(column["rows"] for column in run.info["data"]["columns"])
    assert run.table_bytes()["weights"] == INT4.with_hot_rows(0.1).memory_bytes(rows, 4)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_checkpoint_of_another_share_of_hot_rows_is_refused(run, mapped):
    changed = Run(run.path, {**run.info, "config": tiered(hot_rows=0.5).to_dict()})
    with pytest.raises(dqrm.UserError, match=r"torch.int32"):
        changed.load_model("last", mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_checkpoint_whose_slots_do_not_match_is_refused(run, mapped):
    owners = last(run.path)[NAME][:8].numpy().tobytes()
    assert any(owners)
    file = newest(run.path) / "weights.safetensors"
    content = file.read_bytes()
    assert content.count(owners) == 1
    try:
        file.write_bytes(content.replace(owners, owners[4:8] + owners[:4] + owners[8:]))
        with pytest.raises(dqrm.UserError, match="is damaged: rows and slots of a table stored as INT4 rows do not"):
            run.load_model("last", mapped=mapped, verify=False)
    finally:
        file.write_bytes(content)
