"""A run from start to end, killed and resumed anywhere, refused where it cannot work."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from conftest import tiny
from dqrm.config import OptimizerConfig
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.models.dlrm import DLRM
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import resume, train
from dqrm.training.optimizers import OPTIMIZERS
from dqrm.training.run import Run
from launch_helpers import same_run
from run_helpers import assert_resumes, command, last, wait_for_checkpoint
from selection import some_quick

pytestmark = pytest.mark.long


def test_a_run_leaves_what_it_promises(generated, tmp_path):
    config = tiny(eval_every=10, log_every=7, seed=3)
    summary = train(generated, tmp_path / "run", config)
    run = Run.open(tmp_path / "run")
    steps = 2 * -(-generated.rows["train"] // 64)
    assert summary == run.summary
    assert summary["steps"] == steps
    assert summary["config"] == config.to_dict() == run.info["config"]
    assert run.config == config
    assert summary["data"]["fingerprint"] == generated.fingerprint
    assert summary["seed"] == 3
    assert summary["selection"] == "best validation auc"
    assert {"dqrm", "torch", "python"} <= summary["versions"].keys()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if line["kind"] == "evaluation"]
    assert evaluated == sorted({*range(10, steps, 10), steps // 2, steps})
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(7, steps + 1, 7))
    best = max((line for line in lines if line["kind"] == "evaluation"), key=lambda line: line["auc"])
    assert summary["best"]["step"] == best["step"]
    assert len(list(run.checkpoints.iterdir())) == len({best["step"], steps})


def test_the_checkpoint_gives_the_figures_that_were_reported(generated, tmp_path):
    """Evaluation uses the codes and scales of the checkpoint: loading it must reproduce every digit."""
    summary = train(generated, tmp_path / "run", tiny(eval_every=5, period=7))
    model, _ = Run.open(tmp_path / "run").load_model("best")
    assert evaluate(model, generated, "validation") == summary["best"]["metrics"]
    assert evaluate(model, generated, "test") == summary["test"]
    # Another batch size changes the order of float sums in the matrix products, nothing else.
    other = evaluate(model, generated, "test", batch_size=33)
    assert other["log_loss"] == pytest.approx(summary["test"]["log_loss"], abs=1e-6)


def test_training_learns_and_equals_a_plain_loop(generated, tmp_path):
    """The trainer in FP32 against nn modules and torch.optim, written out."""
    config = replace(tiny(32, shuffle="none", epochs=1), optimizer=OptimizerConfig("sgd", 0.05))
    train(generated, tmp_path / "run", config)
    model = DLRM(13, generated.table_rows, config=config.model, qat=config.quantization, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for batch in generated.split("train").batches(64):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch.dense, batch.ids), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained, _ = Run.open(tmp_path / "run").load_model("last")
    for (name, ours), (_, plain) in zip(trained.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, msg=name)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize(
    ("bits", "optimizer"),
    some_quick(
        *((bits, "sgd") for bits in (2, 4, 8, 16, 32)), (4, "adagrad"), (2, "rowwise_adagrad"),
        of=product([2, 4, 8, 16, 32], list(OPTIMIZERS)),
    ),
)  # fmt: skip
def test_all_optimizers_and_bits_train(generated, tmp_path, optimizer, bits):
    summary = train(generated, tmp_path / "run", tiny(bits, optimizer=optimizer, epochs=1, table_l2=1e-4))
    assert 0.3 < summary["best"]["metrics"]["log_loss"] < 1
    weights = sum(generated.table_rows) * 4 * bits // 8
    assert summary["stored_bytes"]["tables"] == weights + (0 if bits == 32 else 4 * 26)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(generated, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(generated, tmp_path / name, tiny(seed=seed, max_steps=9))
    same_run(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(last(tmp_path / name)["weights.safetensors/tables.weight"] for name in "ac"))


@pytest.mark.parametrize(
    ("calls", "shuffle", "optimizer"),
    some_quick(
        ((1,), "global", "sgd"),
        ((4,), "block", "rowwise_adagrad"),
        ((2, 2, 13, 16, 15, 2), "block", "sgd"),
        ((2, 2, 13, 16, 15, 2), "global", "rowwise_adagrad"),
        ((4,), "block", "adam"),
        ((2, 2, 13, 16, 15, 2), "global", "rowwise_adam"),
        ((4,), "block", "dense_adam"),
        ((2, 2, 13, 16, 15, 2), "global", "dense_adam"),
        of=product(
            [(1,), (4,), (30,), (2, 2, 13, 16, 15, 2)],
            ["global", "block"],
            ["sgd", "adam", "rowwise_adam", "rowwise_adagrad", "dense_adam"],
        ),
    ),
)
def test_killed_anywhere_and_resumed_is_as_if_never_killed(generated, tmp_path, optimizer, shuffle, calls):
    config = tiny(optimizer=optimizer, shuffle=shuffle, checkpoint_every=4, eval_every=11, log_every=5, max_steps=45)
    whole_table_l2 = 1e-3 if optimizer == "dense_adam" else 0.0
    more = {"warmup_steps": 9, "plateau_factor": 0.5, "table_l2": whole_table_l2}
    config = replace(config, optimizer=replace(config.optimizer, **more))
    assert_resumes(generated, tmp_path, config, *calls)


@pytest.mark.parametrize("steps", [(8,), pytest.param((1, 20), marks=pytest.mark.slow)])
def test_sigkill_of_the_process_itself(generated, tmp_path, steps):
    config = tiny(checkpoint_every=1, epochs=2, max_steps=35, threads=1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in
             {"embedding_dim": 4, "bottom_mlp": "8-4", "top_mlp": "8-1", "scale_period": 3, "epochs": 2,
              "max_steps": 35, "batch_size": 64, "device": "cpu", "checkpoint_every": 1, "optimizer": "sgd",
              "threads": 1, "patience": 0, "callbacks": "", "bits": 4}.items()]  # fmt: skip
    train(generated, tmp_path / "whole", config)
    run = tmp_path / "killed"
    arguments = ["train", generated.path, "-o", run, *flags]
    for step in steps:
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for_checkpoint(run, process, step)
        process.kill()
        process.communicate()
        arguments = ["train", "--resume", run]
    subprocess.run(command(*arguments), check=True, stdout=subprocess.DEVNULL)
    same_run(tmp_path / "whole", run)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_says_how_to_resume(generated, tmp_path, number):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", generated.path, "-o", run, "--epochs=5000", "--patience=0", "--checkpoint-every=1",
                "--embedding-dim=4", "--bottom-mlp=8-4", "--top-mlp=8-1", "--device=cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_checkpoint(run, process, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert f"dqrm train --resume {run}" in err
    assert "Traceback" not in err
    assert out == ""


def test_resuming_a_finished_run_changes_nothing(generated, tmp_path):
    summary = train(generated, tmp_path / "run", tiny(max_steps=5))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert resume(tmp_path / "run") == summary
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_early_stopping_and_the_drop_on_a_plateau(generated, tmp_path):
    config = tiny(epochs=50, eval_every=10, early_stopping=3, seed=1)
    config = replace(config, optimizer=OptimizerConfig("sgd", 0.5, plateau_factor=0.1))
    summary = train(generated, tmp_path / "run", config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert summary["epochs"] < 50
    assert [line["best"] for line in evaluations[-4:]] == [True, False, False, False]
    rates = [line["learning_rate"] for line in evaluations]
    worse = 0
    for line, following in zip(evaluations, rates[1:]):
        worse += not line["best"]
        assert following == pytest.approx(0.5 * 0.1**worse)


def test_selection_by_log_loss(generated, tmp_path):
    summary = train(generated, tmp_path / "run", tiny(select_by="log_loss", eval_every=5, epochs=4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["log_loss"] for line in lines if line["kind"] == "evaluation"]
    assert summary["best"]["metrics"]["log_loss"] == min(losses)


def test_bags_without_dense_columns_are_learned(bags_data, tmp_path):
    summary = train(
        bags_data, tmp_path / "run", replace(tiny(epochs=15, batch_size=16), optimizer=OptimizerConfig("adagrad", 0.1))
    )
    assert summary["best"]["metrics"]["auc"] > 0.9  # the label is a function of the user


def test_a_diverging_loss_is_said_and_the_last_good_checkpoint_kept(generated, tmp_path):
    config = replace(tiny(32, checkpoint_every=1), optimizer=OptimizerConfig("sgd", 1e6))
    with pytest.raises(UserError, match=r"training diverged: the loss is (nan|inf) at step \d+; lower learning_rate"):
        train(generated, tmp_path / "run", config)
    for name, tensor in last(tmp_path / "run").items():
        assert torch.isfinite(tensor).all(), name


def test_tensorboard_events_are_written(generated, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=3, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_what_cannot_run_is_refused_before_any_work(generated, bags_data, tmp_path, monkeypatch):
    train(generated, tmp_path / "run", tiny(max_steps=2))
    with pytest.raises(UserError, match=r"exists and is not empty; `dqrm train --resume"):
        train(generated, tmp_path / "run", tiny())
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match="is not the dataset that"):
        resume(tmp_path / "run", bags_data)
    with pytest.raises(UserError, match="does not exist"):
        resume(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no run\.json"):
        Run.open(tmp_path / "empty")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees 0 CUDA devices"):
            train(generated, tmp_path / "cuda", tiny(device="cuda"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"dqrm\[tensorboard\]"):
        train(generated, tmp_path / "board", tiny(tensorboard=True))
    assert not (tmp_path / "cuda").exists()
    assert not (tmp_path / "board").exists()


def test_an_id_outside_its_table_is_refused_before_any_work(generated, tmp_path):
    import shutil

    shutil.copytree(generated.path, tmp_path / "data")
    ids = np.memmap(tmp_path / "data" / "train" / "ids.i32", "<i4", mode="r+")
    ids[26 * 7 + 3] = 10**6
    ids.flush()
    with pytest.raises(UserError, match="1000000"):
        train(Dataset(tmp_path / "data"), tmp_path / "run", tiny(), verify=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_a_damaged_checkpoint_is_one_sentence(generated, tmp_path, damage):
    train(generated, tmp_path / "run", tiny(max_steps=2))
    file = next((tmp_path / "run" / "checkpoints").iterdir()) / "weights.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "foreign":
        file.write_bytes(b"PK\x03\x04 not safetensors")
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"is damaged|is missing") as error:
        Run.open(tmp_path / "run").load_model()
    assert "\n" not in str(error.value)


def test_a_run_of_another_format_version(generated, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=2))
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="format version 9, this dqrm reads version 1"):
        Run.open(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")
def test_cuda_trains_to_the_same_figures_as_cpu(generated, tmp_path):
    cpu = train(generated, tmp_path / "cpu", tiny(epochs=1))
    cuda = train(generated, tmp_path / "cuda", tiny(epochs=1, device="cuda"))
    assert cuda["best"]["metrics"]["log_loss"] == pytest.approx(cpu["best"]["metrics"]["log_loss"], abs=5e-3)
