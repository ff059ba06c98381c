"""Runs whose tables are stored as INT8 rows: how they start and learn, resume to the bit, and are exported."""

import copy
import json
import os
import shutil
import signal
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dqrm
from conftest import tensors, tiny
from dqrm.artifact.file import Artifact
from dqrm.errors import NotVerified
from dqrm.export.weights import EncodedWeights
from dqrm.models.registry import build_model
from dqrm.quant.int8_rows import Int8Rows, row_width
from dqrm.training.checkpoints import load_weights, save_checkpoint
from dqrm.training.launch import resume, train
from dqrm.training.optimizers import build_optimizers
from dqrm.training.run import Run
from kernel_helpers import NATIVE, on
from launch_helpers import newest, same_run
from run_helpers import assert_resumes, command, last, wait_for_checkpoint
from test_cli import run as command_here

pytestmark = pytest.mark.long
RULES = ["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "dense_adam"]
TABLES = "weights.safetensors/tables.weight"
DIM = 4  # of `tiny`


def config(bits=4, rule="rowwise_adagrad", quantization=None, **training):
    base = tiny(bits, optimizer=rule, **{"table_dtype": "int8", "max_steps": 30, **training})
    base = replace(base, optimizer=replace(base.optimizer, learning_rate=0.02))
    return replace(base, quantization=dqrm.QATConfig(**{"bits": bits, **(quantization or {"rescan_period": 7})}))


@pytest.fixture(scope="module")
def made(generated, tmp_path_factory):
    """A run in INT4 and one in 32 bits, both on INT8 rows: not to be changed."""
    folder = tmp_path_factory.mktemp("int8")
    train(generated, folder / "four", config(checkpoint_every=10))
    train(generated, folder / "full", config(32))
    return folder


# ---- the model and its optimizers


def test_a_run_starts_from_the_encoded_tables_of_an_fp32_run(generated, tmp_path):
    """In the order in which those are drawn, whatever the number of threads that draw them."""
    weights = {}
    for dtype in ("int8", "fp32"):
        chosen = config(table_dtype=dtype, max_steps=1)
        model = build_model(chosen, 13, generated.table_rows)
        weights[dtype] = model.tables.weight.detach()
    assert torch.equal(weights["int8"].stored, Int8Rows.encode(weights["fp32"]).stored)


def test_all_parameters_but_the_tables_are_fp32(made):
    found = last(made / "four")
    assert found[TABLES].dtype == torch.int8
    assert found[TABLES].shape[1] == row_width(DIM)
    assert found["weights.safetensors/tables.weight_fake_quantizer.scale"].dtype == torch.float32
    assert found["weights.safetensors/top.0.weight"].dtype == torch.float32
    model, _ = Run.open(made / "four").load_model("last")
    assert torch.equal(model.tables.weight.stored, found[TABLES])


def test_it_learns_as_an_fp32_run_does(generated, made, tmp_path):
    summaries = [
        json.loads((made / "four" / "summary.json").read_text()),
        train(generated, tmp_path / "run", config(table_dtype="fp32")),
    ]
    losses = [summary["best"]["train_loss"] for summary in summaries]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    assert losses[0] < 0.5  # it starts from 0.69


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_optimizer_continues_with_the_same_bits(rule):
    chosen = replace(tiny(optimizer=rule).optimizer, learning_rate=0.01)

    def steps(weight, optimizer, numbers):
        for number in numbers:
            values = torch.randn(3, 5, generator=torch.Generator().manual_seed(number))
            weight.grad = torch.sparse_coo_tensor(torch.tensor([[1, 2, 1]]), values, (5, 5), check_invariants=True)
            optimizer.step()

    whole = nn.Parameter(Int8Rows.encode(torch.ones(5, 5)))
    optimizer = build_optimizers([whole], [nn.Parameter(torch.zeros(1))], chosen)[0]
    steps(whole, optimizer, range(40))
    cut, saved = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    restored = build_optimizers([cut], [nn.Parameter(torch.zeros(1))], chosen)[0]
    restored.load_state_dict(saved)
    for name, value in optimizer.state[whole].items():
        assert restored.state[cut][name].dtype == value.dtype, name
        assert torch.equal(restored.state[cut][name], value), name
    before = whole.stored.clone()
    steps(whole, optimizer, range(40, 60))
    steps(cut, restored, range(40, 60))
    assert torch.equal(whole.stored, cut.stored)
    assert torch.equal(whole.stored[[0, 3, 4]], before[[0, 3, 4]])
    assert not torch.equal(whole.stored[1], before[1])


@pytest.mark.parametrize("rule", RULES)
def test_rules_follow_those_on_fp32_weights(path, rule):
    """On average: 400 rows get the same gradients as one of float32."""
    chosen = replace(tiny(optimizer=rule).optimizer, learning_rate=0.01)
    small = nn.Parameter(Int8Rows.encode(torch.ones(400, 3)))
    whole = nn.Parameter(small.detach().dequantize())
    for weight in (small, whole):
        optimizer = build_optimizers([weight], [nn.Parameter(torch.zeros(1))], chosen)[0]
        for number in range(30):
            values = torch.randn(3, generator=torch.Generator().manual_seed(number)).expand(400, 3).contiguous()
            optimizer.step_rows(torch.arange(400), values)
    difference = small.detach().dequantize() - whole.detach()
    step = float(whole.detach().abs().max()) / 127
    assert (difference.mean(0).abs() < 5 * (30**0.5 * step / 2) / 400**0.5).all()
    assert difference.std() < 30**0.5 * step
    assert (whole - 1).abs().max() > step / 2


# ---- kills


OPTIONS = {
    "sgd": (config(rule="sgd"), {}),
    "adagrad, periodic": (config(rule="adagrad", quantization={"scale_refresh": "periodic", "scale_period": 3}), {}),
    "adam": (config(rule="adam"), {}),
    "rowwise_adam, bf16": (config(rule="rowwise_adam", precision="bf16"), {}),
    "dense_adam": (config(rule="dense_adam"), {"table_l2": 1e-3}),
    "32 bits": (config(32), {}),
    "8 bits, small tables": (config(quantization={"bits": 8, "small_table_bits": 32, "small_table_rows": 9}), {}),
    "lsq": (config(quantization={"quantizer": "lsq"}), {}),
    "mse": (config(quantization={"quantizer": "mse", "scale_period": 7}), {}),
    "naive": (config(quantization={"quantizer": "naive"}), {}),
    "stochastic": (config(quantization={"forward_rounding": "stochastic"}), {}),
    "l2, clipped": (config(), {"table_l2": 1e-3, "clip_norm": 0.1}),
    "redrawn, ema": (config(callbacks=("redraw_tables:min_rows=30", "ema:decay=0.9"), max_steps=60), {}),
}


def chosen_of(name, **training):
    base, optimizer = OPTIONS[name]
    optimizer = replace(base.optimizer, **optimizer)
    return replace(base, optimizer=optimizer, training=replace(base.training, **training))


@pytest.mark.parametrize("name", OPTIONS)
def test_killed_and_resumed_is_as_if_never_killed(generated, tmp_path, name):
    assert_resumes(generated, tmp_path, chosen_of(name, checkpoint_every=4, eval_every=11, log_every=5), 14)
    found = last(tmp_path / "cut")
    assert found[TABLES].dtype == torch.int8
    found = dqrm.export_run(tmp_path / "cut", tmp_path / "model.dqrm")
    assert found["largest_difference"] == 0


@pytest.mark.parametrize("rule", ["rowwise_adagrad", pytest.param("dense_adam", marks=pytest.mark.slow)])
def test_sigkill_of_the_process_itself(generated, tmp_path, rule):
    flags = ["--table-dtype=int8", "--embedding-dim=5", "--bottom-mlp=8-5", "--top-mlp=8-1", "--epochs=2",
             f"--optimizer={rule}", "--learning-rate=0.01", "--batch-size=64", "--device=cpu", "--checkpoint-every=1",
             "--threads=1", "--patience=0", "--callbacks=redraw_tables:min_rows=30"]  # fmt: skip
    words = ["train", generated.path, *flags, "-o"]
    process = subprocess.Popen(command(*words, tmp_path / "cut"), stdout=subprocess.DEVNULL)
    try:
        wait_for_checkpoint(tmp_path / "cut", process, 30)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    subprocess.run(command("train", "--resume", tmp_path / "cut"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(*words, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert last(tmp_path / "cut")[TABLES].shape[1] == row_width(5)


@NATIVE
def test_both_paths_train_the_same_tables(generated, tmp_path):
    """Sums of the MLP have another order, which may move a draw to the other neighbour."""
    for path in ("native", "plain"):
        with on(path):
            train(generated, tmp_path / path, config(max_steps=8))
    one, two = (last(tmp_path / path)[TABLES] for path in ("native", "plain"))
    assert (one != two).float().mean() < 0.02


def test_simulated_ranks_give_the_same_bits_each_time_and_those_of_one_rank_on_average(generated, tmp_path):
    ranks = replace(config(), exchange=dqrm.ExchangeConfig(simulate_ranks=2, table_codec="fp32", mlp_codec="fp32"))
    found = [train(generated, tmp_path / name, ranks) for name in ("a", "b")]
    same_run(tmp_path / "a", tmp_path / "b")
    alone = train(generated, tmp_path / "alone", config())
    losses = [summary["best"]["train_loss"] for summary in (found[0], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# ---- checkpoints


def unfinished(made, tmp_path):
    shutil.copytree(made / "four", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def refused(call, *arguments):
    with pytest.raises(dqrm.UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_refused(made, tmp_path, damage):
    run = unfinished(made, tmp_path)
    file = newest(run) / "weights.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-9] ^= 1  # of a code
    file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if damage == "missing":
        file.unlink()
    assert str(file) in refused(resume, run)
    assert str(file) in refused(lambda: Run.open(run).load_model("last"))
    assert str(file) in refused(dqrm.export_run, run, tmp_path / "m.dqrm", dqrm.ExportConfig(checkpoint="last"))
    assert not (tmp_path / "m.dqrm").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_of_another_storage_is_refused(made, tmp_path, dtype):
    """In both directions, by the run's own configuration and by a model."""
    run = unfinished(made, tmp_path)
    info = json.loads((run / "run.json").read_text())
    info["config"]["training"]["table_dtype"] = dtype
    (run / "run.json").write_text(json.dumps(info))
    for mapped in (False, True):
        said = refused(lambda: Run.open(run).load_model("last", mapped=mapped))  # noqa: B023
        assert "torch.int8" in said
        assert {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype] in said
    assert "torch.int8" in refused(resume, run)
    assert "torch.int8" in refused(dqrm.export_run, run, tmp_path / "m.dqrm", dqrm.ExportConfig(checkpoint="last"))
    assert not (tmp_path / "m.dqrm").exists()


@pytest.mark.parametrize("kind", ["fp32", "wide"])
def test_an_int8_run_refuses_tables_of_another_form(made, tmp_path, kind):
    run = unfinished(made, tmp_path)
    file = newest(run) / "weights.safetensors"
    content = load_file(file)
    stored = content["tables.weight"]
    content["tables.weight"] = {"fp32": stored[:, :DIM].float(), "wide": nn.functional.pad(stored, (0, 2))}[kind]
    save_file(content, file)
    state = json.loads((newest(run) / "state.json").read_text())
    (newest(run) / "state.json").write_text(
        json.dumps({key: value for key, value in state.items() if key not in ("files", "sha256")})
    )
    for mapped in (False, True):
        with nullcontext() if mapped else pytest.warns(NotVerified):  # once per folder
            said = refused(lambda: Run.open(run).load_model("last", mapped=mapped))  # noqa: B023
        assert "tables" in said
        assert str(list(content["tables.weight"].shape)) in said


def test_weights_pass_from_an_fp32_run_and_back_by_a_state_dict(generated, made, tmp_path):
    small, _ = Run.open(made / "four").load_model("last")
    whole = build_model(config(table_dtype="fp32"), 13, generated.table_rows)
    whole.load_state_dict(small.state_dict())
    assert torch.equal(whole.tables.weight, small.tables.weight.detach().dequantize())
    batch = torch.zeros(3, 13), torch.zeros(3, 26, dtype=torch.int32)
    assert torch.equal(whole.eval()(*batch), small(*batch))
    back = build_model(config(), 13, generated.table_rows)
    back.load_state_dict(whole.state_dict())
    assert torch.equal(back.tables.weight.stored, Int8Rows.encode(whole.tables.weight.detach()).stored)


def test_a_model_with_a_buffer_of_codes_is_saved(made, tmp_path):
    model, state = Run.open(made / "four").load_model("last")
    model.register_buffer("seen", torch.arange(5, dtype=torch.int8))
    save_checkpoint(tmp_path, 7, model, [], {**state, "step": 7}, set())
    other = copy.deepcopy(model)
    other.seen.zero_()
    other.tables.weight.detach().zero_()
    load_weights(newest_in(tmp_path), other)
    assert torch.equal(other.seen, model.seen)
    assert torch.equal(other.tables.weight.stored, model.tables.weight.stored)


def newest_in(folder):
    return max(folder.glob("step-*"))


# ---- what is made of a run


@pytest.mark.parametrize("name", ["four", "full"])
def test_the_artifact_gives_the_figures_of_the_checkpoint_to_six_digits(generated, made, tmp_path, capsys, name):
    found = dqrm.export_run(made / name, tmp_path / "model.dqrm")
    assert found["largest_difference"] == 0
    figures = []
    for path in (made / name, tmp_path / "model.dqrm"):
        code, out, err = command_here(capsys, "eval", path, generated.path, "--json", "--device=cpu")
        assert code == 0, err
        figures.append({key: round(value, 6) for key, value in json.loads(out).items()})
    assert figures[0] == figures[1]


def test_the_artifact_is_that_of_the_same_values_in_fp32(made, tmp_path):
    model, _ = Run.open(made / "four").load_model()
    dqrm.export_run(made / "four", tmp_path / "model.dqrm")
    tables = dqrm.load(tmp_path / "model.dqrm").tables
    ids = torch.stack([torch.arange(7) % rows for rows in tables.table_rows], 1)
    assert torch.equal(tables(ids), model.tables(ids))
    assert (
        Artifact.open(tmp_path / "model.dqrm", verify=True).sizes()["table codes"] < last(made / "four")[TABLES].nbytes
    )


@pytest.mark.parametrize("granularity", ["table", "row"])
@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_32_bit_run_is_quantized_after_training(generated, made, tmp_path, granularity, clip, bits):
    """To the file that the same weights give from an FP32 model."""
    options = dqrm.PTQConfig(bits=bits, granularity=granularity, clip=clip)
    found = dqrm.export_run(made / "full", tmp_path / "model.dqrm", ptq=options)
    assert found["largest_difference"] < 1e-6
    model, _ = Run.open(made / "full").load_model()
    whole = build_model(config(32, table_dtype="fp32"), 13, generated.table_rows)
    whole.load_state_dict(model.state_dict())
    one, two = (EncodedWeights(each, options).entries() for each in (model, whole.eval()))
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name
        assert all(torch.equal(x, y) for x, y in zip(a.pieces(), b.pieces(), strict=True)), a.name


def test_commands_take_such_a_run(generated, made, tmp_path, capsys):
    for words in (
        ["info", made / "four"], ["info", made / "four", "--verify"], ["eval", made / "four", generated.path],
        ["export", made / "full", "-o", tmp_path / "full.dqrm"], ["export", made / "four", "-o", tmp_path / "m.dqrm"],
        ["quantize", made / "full", "-o", tmp_path / "q.dqrm"], ["info", tmp_path / "m.dqrm"],
        ["predict", tmp_path / "m.dqrm", generated.path.parent / "log.txt", "-o", tmp_path / "p.csv"],
    ):  # fmt: skip
        code, _, err = command_here(capsys, *words)
        assert code == 0, (words, err)
    assert len((tmp_path / "p.csv").read_text().splitlines()) >= 2000


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_unquantized_model_is_exported_as_a_graph(made, tmp_path, format):
    """From the run and from its artifact, whose tables are float32."""
    pytest.importorskip("onnxruntime" if format == "onnx" else "torch")
    dqrm.export_run(made / "full", tmp_path / "m.dqrm")
    found = dqrm.export_run(tmp_path / "m.dqrm", tmp_path / f"m.{format}")
    assert found["largest_difference"] < 1e-5


def test_a_run_that_diverged_is_not_exported(generated, made, tmp_path):
    run = unfinished(made, tmp_path)
    model, state = Run.open(run).load_model("last")
    model.tables.weight.detach()[3:4].copy_(torch.full((1, DIM), float("nan")))
    save_checkpoint(run / "checkpoints", 31, model, [], {**state, "step": 31}, set())
    said = refused(dqrm.export_run, run, tmp_path / "m.dqrm", dqrm.ExportConfig(checkpoint="last"))
    assert "NaN or infinite" in said
    assert not (tmp_path / "m.dqrm").exists()


def test_bags_are_trained(bags_data, tmp_path):
    chosen = config(max_steps=15, checkpoint_every=4)
    chosen = replace(chosen, model=replace(chosen.model, pooling="mean"))
    assert_resumes(bags_data, tmp_path, chosen, 9)
    assert dqrm.export_run(tmp_path / "cut", tmp_path / "m.dqrm")["largest_difference"] == 0
    assert tensors(newest(tmp_path / "cut"))[TABLES].dtype == torch.int8
