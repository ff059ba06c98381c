"""The recipe of no flags: what it leaves to the data, when it stops, and which state is its result."""

import json
import os
import signal
import subprocess
from dataclasses import replace

import polars as pl
import pytest
import yaml

from conftest import tiny
from dqrm import Callback, recipe
from dqrm.config import Config, ExchangeConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.quant.config import QATConfig
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import resolved, resume, train
from dqrm.training.run import Run
from dqrm.training.selection import stops
from dqrm.training.state import State
from launch_helpers import same_run
from run_helpers import Killed, command, killer, wait_for_checkpoint
from selection import slow

SMALL = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_of(folder, rows, **config):
    log = pl.DataFrame(
        {"label": [0, 1] * (rows // 2), "a": [n % 7 for n in range(rows)], "b": [n % 5 for n in range(rows)]}
    )
    return prepare(log, folder, PrepareConfig(categorical=("a", "b"), **config))


def test_what_is_left_open_is_resolved_before_the_run_is_written(generated, tmp_path):
    config = Config(model=SMALL, training=TrainingConfig(max_steps=3))
    told = []
    summary = train(generated, tmp_path / "run", config, log=told.append)
    assert told[0] == (
        f"Training with dense_adam, learning rate 0.0003, batch size 64, at most 20 epochs "
        f"(patience {recipe.PATIENCE}); callbacks: redraw_tables:min_rows=1000, ema:decay=0.999"
    )
    written = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert written == summary["config"]
    wanted = {"batch_size": recipe.batch_size(generated.rows["train"], "dense_adam"), "epochs": recipe.EPOCHS}
    assert {name: written["training"][name] for name in wanted} == wanted
    assert written["training"]["callbacks"] == list(recipe.CALLBACKS)
    assert written["optimizer"]["optimizer"] == "dense_adam"
    assert written["optimizer"]["learning_rate"] == recipe.learning_rate("dense_adam", wanted["batch_size"])
    large = replace(config, training=TrainingConfig(batch_size=4096))
    assert resolved(large, generated).optimizer.learning_rate == 0.001
    adagrad = replace(config, optimizer=OptimizerConfig("adagrad"))
    told.clear()
    train(generated, tmp_path / "adagrad", adagrad, log=told.append)
    steps = generated.rows["train"] // 64 // recipe.WARMUP_PARTS
    assert 0 < steps < 100
    assert told[0].startswith(f"Training with adagrad, learning rate 0.01 ({steps} steps of warm-up), batch size 64, ")
    given = Config(
        SMALL, optimizer=OptimizerConfig("sgd", 0.3, warmup_steps=2), training=TrainingConfig(epochs=7, batch_size=9)
    )
    assert resolved(given, generated) == given


@pytest.mark.parametrize(("optimizer", "batch_size", "goes_on", "steps"), [
    (OptimizerConfig(), 1, False, 0),
    (OptimizerConfig("adagrad"), 1, False, 100),
    (OptimizerConfig("rowwise_adagrad"), 1, False, 100),
    (OptimizerConfig("adagrad"), 10, False, 13),
    (OptimizerConfig("adagrad"), 400, False, 0),
    (OptimizerConfig("adagrad"), 1, True, 0),
    (OptimizerConfig("sgd"), 1, False, 0),
    (OptimizerConfig("adam"), 1, False, 0),
    (OptimizerConfig(warmup_steps=7), 400, True, 7),
    (OptimizerConfig("adagrad", decay_start_step=99, decay_steps=9), 1, False, 0),
    (OptimizerConfig("adagrad", decay_start_step=100, decay_steps=9), 1, False, 100),
])  # fmt: skip
def test_steps_of_warm_up(tmp_path, optimizer, batch_size, goes_on, steps):
    data = log_of(tmp_path / "data", 400, validation_fraction=0, test_fraction=0)
    config = Config(optimizer=optimizer, training=TrainingConfig(batch_size=batch_size))
    assert resolved(config, data, starts=goes_on, goes_on=goes_on).optimizer.warmup_steps == steps


@pytest.mark.parametrize(("splits", "options", "epochs"), [
    ({"validation_fraction": 0.2}, {}, recipe.EPOCHS),
    ({"validation_fraction": 0.2}, {"patience": 0}, 1),
    ({"validation_fraction": 0}, {}, 1),
    ({"validation_fraction": 0}, {"epochs": 4}, 4),
    ({"validation_fraction": 0.003, "split": "time"}, {}, 1),  # one row: no AUC
    ({"validation_fraction": 0.003, "split": "time"}, {"select_by": "log_loss"}, recipe.EPOCHS),
])  # fmt: skip
def test_without_a_figure_to_stop_by_there_is_one_epoch(tmp_path, splits, options, epochs):
    data = log_of(tmp_path / "data", 400, **splits)
    assert resolved(Config(training=TrainingConfig(**options)), data).training.epochs == epochs


def test_a_run_of_no_validation_rows_ends_after_its_epoch(tmp_path):
    data, told = log_of(tmp_path / "data", 400, validation_fraction=0), []
    summary = train(data, tmp_path / "run", Config(training=TrainingConfig(threads=1)), log=told.append)
    assert told[0].split(";")[0].endswith("at most 1 epoch (no validation auc that could end it earlier)")
    assert (summary["epochs"], summary["selection"]) == (1, "last state (no validation figure)")


def test_more_ranks_than_the_samples_of_the_resolved_batch_are_refused(generated, tmp_path):
    config = Config(exchange=ExchangeConfig(simulate_ranks=200))
    with pytest.raises(UserError, match=r"simulate_ranks is 200, more than the 64 samples of a batch \(batch_size\)"):
        train(generated, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("patience", "aucs", "ends"), [
    (1, [[0.6], [0.7], [0.6]], 3),
    (2, [[0.6], [0.7], [0.6], [0.7]], 4),  # the same again is no better
    (2, [[0.6], [0.5], [0.7], [0.6], [0.65]], 5),
    (1, [[0.5, 0.7, 0.6], [0.6, 0.6, 0.6]], 2),  # evaluations within an epoch do not wait
    (1, [[0.6], [0.5, 0.7, 0.6], [0.6, 0.75]], None),
    (0, [[0.6], [0.5], [0.4]], None),
    (1, [[None], [None]], None),
    (3, [[0.6], [0.5], [0.4]], None),
])  # fmt: skip
def test_patience_counts_epochs(patience, aucs, ends):
    state, options, stopped = State(), TrainingConfig(patience=patience), None
    for state.epoch, values in enumerate(aucs):
        for number, value in enumerate(values):
            state.step += 1
            best = state.best and state.best["metrics"]["auc"]
            if value is None or best is None or value > best:
                state.best = {"step": state.step, "epoch": state.epoch + 1, "metrics": {"auc": value}}
            if why := stops(state, options, number + 1 == len(values)):
                stopped = why
                break
        if stopped:
            break
    assert (stopped and state.epoch + 1) == ends
    if stopped:
        epochs = "1 epoch" if patience == 1 else f"{patience} epochs"
        assert f"Stopped in epoch {ends}: no better validation auc for {epochs}; the result is step" in stopped


class Collapse(Callback):
    """From epoch 3 on, sets the weights of the last layer back to what ranks nothing."""

    def on_step_end(self, trainer, loss):
        if trainer.state.epoch >= 2:
            trainer.model.top[-1].weight.data.mul_(-1)


def test_a_collapse_is_not_the_result(generated, tmp_path):
    told = []
    config = Config(model=SMALL, training=TrainingConfig(patience=2, seed=3, batch_size=64, threads=1, device="cpu"))
    summary = train(generated, tmp_path / "run", config, log=told.append, callbacks=[Collapse()])
    aucs = [line["auc"] for line in lines(tmp_path / "run") if line["kind"] == "evaluation"]
    best = aucs.index(max(aucs)) + 1
    assert summary["epochs"] == len(aucs) == best + 2 < recipe.EPOCHS
    assert summary["best"]["epoch"] == best
    assert aucs[-1] < max(aucs) - 0.002
    assert sum(line.startswith(f"Stopped in epoch {best + 2}: no better validation auc for 2 epochs") for line in told)
    model, _ = Run.open(tmp_path / "run").load_model()
    assert evaluate(model, generated, "validation")["auc"] == max(aucs)
    assert evaluate(model, generated, "test") == summary["test"]


@pytest.mark.parametrize("call", [40, 75, 110])
def test_a_resumed_run_stops_where_the_whole_one_does(generated, tmp_path, call):
    config = tiny(
        epochs=9, patience=2, optimizer="adagrad", checkpoint_every=5, callbacks=("redraw_tables:min_rows=9",)
    )
    config = replace(config, optimizer=OptimizerConfig("adagrad", 0.5))
    whole = train(generated, tmp_path / "whole", config)
    assert whole["epochs"] < 9
    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, progress=killer(call))
    assert resume(tmp_path / "cut")["epochs"] == whole["epochs"]
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_of_before_there_was_a_recipe_is_resumed_as_it_was(generated, tmp_path):
    """Its run.json names neither patience nor callbacks."""
    config = tiny(epochs=4, optimizer="adagrad", checkpoint_every=2)
    whole = train(generated, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train(generated, tmp_path / "old", config, progress=killer(9))
    info = json.loads((tmp_path / "old" / "run.json").read_text())
    del info["config"]["training"]["callbacks"], info["config"]["training"]["patience"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(info))
    assert Run.open(tmp_path / "old").config == config
    assert resume(tmp_path / "old")["steps"] == whole["steps"]
    same_run(tmp_path / "whole", tmp_path / "old")


@pytest.mark.parametrize("refresh", ["running_max", "periodic"])
def test_a_run_that_stored_the_period_of_the_other_rule_opens_and_resumes(generated, tmp_path, refresh):
    """As 0.1.0 did."""
    config = tiny(checkpoint_every=2, max_steps=6)
    config = replace(config, quantization=QATConfig(bits=4, scale_refresh=refresh))
    train(generated, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train(generated, tmp_path / "old", config, progress=killer(4))
    info = json.loads((tmp_path / "old" / "run.json").read_text())
    info["config"]["quantization"] |= {"scale_period": 200, "rescan_period": 10_000}
    (tmp_path / "old" / "run.json").write_text(json.dumps(info))
    assert Run.open(tmp_path / "old").config == config
    resume(tmp_path / "old")
    same_run(tmp_path / "whole", tmp_path / "old")


@pytest.mark.parametrize("callbacks", ["redraw_tables:min_rows=30,ema:decay=0.9"])
@pytest.mark.parametrize("refresh", ["running_max", *slow("periodic")])
def test_sigkill_in_epoch_two_changes_no_bit(generated, tmp_path, callbacks, refresh):
    batches = -(-generated.rows["train"] // 64)
    values = tiny(epochs=3, optimizer="adagrad", checkpoint_every=1, callbacks=tuple(callbacks.split(",")), threads=1)
    values = values.to_dict() | {"quantization": {"scale_refresh": refresh}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    arguments = ["train", generated.path, "--config", tmp_path / "c.yaml", "-o"]
    process = subprocess.Popen(command(*arguments, tmp_path / "cut"), stdout=subprocess.DEVNULL)
    try:
        wait_for_checkpoint(tmp_path / "cut", process, batches + batches // 2)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    stood = max((tmp_path / "cut" / "checkpoints").glob("step-*[0-9]"))
    assert batches < int(stood.name[5:]) < 2 * batches
    subprocess.run(command("train", "--resume", tmp_path / "cut"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(*arguments, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ()),
        (("stage_bits:mlp=16",), ("stage_bits:mlp=16",)),
        (("+stage_bits:mlp=16",), (*recipe.CALLBACKS, "stage_bits:mlp=16")),
        (("+ema:decay=0.5",), (recipe.CALLBACKS[0], "ema:decay=0.5")),
        (("+redraw_tables", "+toy"), (recipe.CALLBACKS[1], "redraw_tables", "toy")),
    ],
)
def test_callbacks_with_a_plus_are_added_to_the_default_ones(given, expected):
    assert TrainingConfig(callbacks=given).callbacks == expected
    assert Config.from_dict({"training": {"callbacks": list(given)}}).training.callbacks == expected
    assert Config.load(overrides={"callbacks": ",".join(given)}).training.callbacks == expected


@pytest.mark.parametrize(
    ("in_file", "flag", "expected"),
    [
        ("[toy]", "+ema", ("toy", "ema")),
        ("toy,ema:decay=0.1", "+ema", ("toy", "ema")),
        ("['+toy']", "+ema", (recipe.CALLBACKS[0], "toy", "ema")),
        ("''", "+ema", ("ema",)),
        ("['+toy']", "ema", ("ema",)),
    ],
)
def test_a_flag_with_a_plus_adds_to_the_callbacks_of_the_file(tmp_path, in_file, flag, expected):
    (tmp_path / "run.yaml").write_text(f"training:\n  callbacks: {in_file}\n")
    assert Config.load(tmp_path / "run.yaml", {"callbacks": flag}).training.callbacks == expected


def test_callbacks_with_and_without_a_plus_are_refused():
    with pytest.raises(ValueError, match=r"callbacks is 'ema,\+toy', expected '\+' before each name .* or before none"):
        TrainingConfig(callbacks=("ema", "+toy"))
    with pytest.raises(UserError, match=r"callbacks is 'ema,\+toy', expected"):
        Config.load(overrides={"callbacks": "ema,+toy"})


@pytest.mark.parametrize(
    ("callbacks", "shown"),
    [
        ((), "callbacks: none"),
        (("+redraw_tables:min_rows=9",), "callbacks: ema:decay=0.999, redraw_tables:min_rows=9"),
        (("ema",), "callbacks: ema, Collapse"),
    ],
)
def test_a_run_says_which_callbacks_it_has(generated, tmp_path, callbacks, shown):
    told = []
    config = tiny(max_steps=1, callbacks=callbacks)
    train(generated, tmp_path / "run", config, log=told.append, callbacks=[Collapse()] if "Collapse" in shown else [])
    assert told[0].startswith("Training with sgd, learning rate 0.1, batch size 64, at most 2 epochs")
    assert told[0].endswith(shown)
