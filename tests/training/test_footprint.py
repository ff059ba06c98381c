"""What tables take in training: the default optimizer of INT8 rows, what is said of bytes, and that nothing makes a
second copy of the tables or of optimizer state."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dqrm
from cli_helpers import command
from conftest import tiny
from dqrm.config import Config, OptimizerConfig, TrainingConfig
from dqrm.models.registry import build_model
from dqrm.training import launch
from dqrm.training.checkpoints import checkpoint_path, latest_step, load_optimizers, load_weights
from dqrm.training.footprint import table_bytes
from dqrm.training.optimizers import OPTIMIZERS
from dqrm.training.run import Run
from dqrm.training.step import TrainStep
from selection import slow

DIM = 4


def lean(optimizer=None, dtype="int8", **training):
    base = tiny(max_steps=4, **training)
    return replace(base, optimizer=OptimizerConfig(optimizer, 0.1), training=replace(base.training, table_dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("fp32", None, "dense_adam"), ("bf16", None, "adagrad"), ("int8", None, "rowwise_adagrad"),
        ("int8", "adam", "adam"),
    ],
)  # fmt: skip
def test_the_default_optimizer_follows_the_storage(dtype, given, expected):
    in_python = Config(optimizer=OptimizerConfig(given), training=TrainingConfig(table_dtype=dtype))
    overrides = {"table_dtype": dtype} | ({} if given is None else {"optimizer": given})
    for config in (in_python, Config.load(None, overrides), Config.from_dict(in_python.to_dict())):
        assert config.optimizer.optimizer == config.optimizer.rule == expected
        assert config.to_dict()["optimizer"]["optimizer"] == expected  # resolved in what a run stores
    assert OptimizerConfig().rate == Config().optimizer.rate


BYTES = {"sgd": (0, 0), "adagrad": (4, 0), "rowwise_adagrad": (0, 4), "adam": (8, 4), "rowwise_adam": (4, 8)}


@pytest.mark.parametrize("optimizer", BYTES)
@pytest.mark.parametrize(("dtype", "row"), [("fp32", 16), ("bf16", 8), ("int8", 6)])
def test_bytes_are_those_of_the_tensors(optimizer, dtype, row):
    rows = [50, 7]
    config = lean(optimizer, dtype)
    model = build_model(config, 1, rows)
    found = table_bytes(model.tables.weight, TrainStep(model.train(), config).optimizers[0])
    each, of_row = BYTES[optimizer]
    steps = 8 * (dtype != "fp32")  # counted where updates round at random
    assert found == {"weights": 57 * row, "optimizer": 57 * (each * DIM + of_row) + steps}


def test_a_run_tells_what_its_tables_take(generated, tmp_path, capsys):
    lines = []
    summary = dqrm.train(generated, tmp_path / "run", lean(), log=lines.append)
    rows = sum(generated.table_rows)
    expected = {"weights": rows * (DIM + 2), "optimizer": rows * 4 + 8}
    assert summary["table_bytes"] == expected
    (said,) = [line for line in lines if line.startswith("Tables in training")]
    assert "int8 weights" in said
    assert "(1.5 bytes per weight), rowwise_adagrad state" in said
    assert "rowwise_adagrad keeps" not in said
    code, out, _ = command(capsys, "info", str(tmp_path / "run"), "--json")
    assert (code, json.loads(out)["table_bytes"]) == (0, expected)
    code, out, _ = command(capsys, "info", str(tmp_path / "run"))
    assert said in " ".join(out.split())
    (tmp_path / "run" / "summary.json").unlink()  # as before it is finished: the checkpoint's tensors say the same
    code, out, _ = command(capsys, "info", str(tmp_path / "run"))
    assert "not finished" in out
    assert said in " ".join(out.split())


def test_a_state_that_outweighs_int8_tables_is_pointed_out(generated, tmp_path):
    lines = []
    dqrm.train(generated, tmp_path / "run", lean("adagrad"), log=lines.append)
    (said,) = [line for line in lines if line.startswith("Tables in training")]
    assert "adagrad state" in said
    assert said.endswith("rowwise_adagrad keeps 4 bytes per row, sgd none")


@pytest.mark.parametrize(("free", "warned"), [(10, True), (10**12, False), (None, False)])
def test_a_state_that_does_not_fit_is_told(generated, tmp_path, monkeypatch, free, warned):
    monkeypatch.setattr(launch, "free_memory", lambda device: free)
    lines = []
    dqrm.train(generated, tmp_path / "run", lean("dense_adam", "fp32"), log=lines.append)
    (said,) = [line for line in lines if line.startswith("Tables in training")]
    assert said.endswith("--optimizer adagrad keeps 4 bytes per weight, rowwise_adagrad 4 per row") == warned
    assert ("Warning: 0.0 MB of memory are free" in said) == warned


def test_a_run_without_a_checkpoint_has_no_bytes_yet(generated, tmp_path):
    run = Run.plan(tmp_path / "run", lean(), generated)
    with run.started():
        assert run.table_bytes() is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_state_is_read_in_place_and_no_mapping_is_kept(generated, tmp_path, optimizer, dtype):
    config = lean(optimizer, dtype)
    dqrm.train(generated, tmp_path / "run", config)
    run = Run.open(tmp_path / "run")
    checkpoint = checkpoint_path(run.checkpoints, latest_step(run.checkpoints))
    model = run.new_model(drawn=False)
    load_weights(checkpoint, model)
    optimizers = TrainStep(model.train(), config).optimizers
    state = optimizers[0].state[model.tables.weight]
    before = {name: value.data_ptr() for name, value in state.items()}
    load_optimizers(checkpoint, optimizers)
    assert {name: value.data_ptr() for name, value in optimizers[0].state[model.tables.weight].items()} == before
    assert str(checkpoint) not in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        again, _ = run.load_model("last")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# Tables of 256 MB in FP32; peaks are of a process of its own, above what it has before the first table.
_ROWS, _WIDTH = 1_000_000, 64
_PROGRAM = """
import json, re
from pathlib import Path
import polars, sklearn.metrics, torch
from dqrm.config import Config
from dqrm.models.registry import build_model
import dqrm.training.launch, dqrm.export.pipeline, dqrm.serving.evaluation
torch.set_num_threads(1)
overrides = {"embedding_dim": WIDTH, "bottom_mlp": [8, WIDTH], "top_mlp": [1], "table_dtype": "int8", "bits": BITS}
config = Config.load(None, overrides)
build_model(config, 1, [100])  # compiles kernels
# Not ru_maxrss, which begins with that of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
WORK
print(json.dumps(peak() - before))
"""


def grown(work, bits=4):
    """Bytes by which the peak of resident memory grows while a program does this work."""
    program = _PROGRAM.replace("WORK", work).replace("WIDTH", str(_WIDTH)).replace("BITS", str(bits))
    return json.loads(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout)


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")


@LINUX
def test_a_model_is_created_without_an_fp32_copy():
    fp32 = 4 * _ROWS * _WIDTH
    needed = grown(f"build_model(config, 1, [{_ROWS}]).tables.refresh_scale()")
    assert 0.2 * fp32 < needed < 0.5 * fp32


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("bits", [4, *slow(32)])
def test_saving_loading_evaluating_and_exporting_make_no_fp32_copy(tmp_path, bits):
    from dqrm.bench.data import write_dataset

    fp32, data, run = 4 * _ROWS * _WIDTH, tmp_path / "data", tmp_path / "run"
    write_dataset(data, {"train": 640, "validation": 64, "test": 64}, 1, [_ROWS], 0)
    config = (
        "Config.load(None, overrides | dict(batch_size=64, epochs=1, patience=0, callbacks=[], checkpoint_every=5))"
    )
    needed = grown(f"dqrm.training.launch.train({str(data)!r}, {str(run)!r}, {config})", bits)
    assert 0.2 * fp32 < needed < 0.5 * fp32
    evaluate = "dqrm.serving.evaluation.evaluate"
    needed = grown(f"{evaluate}({str(run)!r}, {str(data)!r})", bits)
    assert 0.2 * fp32 < needed < 0.5 * fp32
    # The mapped tables, the mapped artifact and the pieces in between.
    export = f"dqrm.export.pipeline.export_run({str(run)!r}, {str(tmp_path / 'model.dqrm')!r}, MORE)"
    options = "dqrm.export.pipeline.ExportConfig(vocabulary='none')"
    if bits == 32:
        options += ", dqrm.export.pipeline.PTQConfig(bits=4)"
    assert grown(export.replace("MORE", options), bits) < fp32
