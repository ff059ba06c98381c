"""Averaged weights: the average is the formula's, it is what is evaluated, saved and exported, and training never sees
it."""

from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tensors, tiny
from dqrm import Callback
from dqrm.config import ExchangeConfig, ModelConfig, OptimizerConfig
from dqrm.errors import UserError
from dqrm.training.callbacks import EMA, build_callbacks
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from launch_helpers import same_tensors
from run_helpers import Killed, assert_resumes, killer, last


class Weights(Callback):
    """All of the model's floating-point values after each step, in float64."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, trainer, loss):
        values = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
        self.taken.append({name: value.detach().double() for name, value in values.items()})


def average(taken, decay):
    """In float64: average = d * average + (1 - d) * weight, d = min(decay, (1 + n) / (10 + n)); the first is itself."""
    mean = taken[0]
    for n, weight in enumerate(taken):
        d = min(decay, (1 + n) / (10 + n))
        mean = {name: d * mean[name] + (1 - d) * value for name, value in weight.items()}
    return mean


def normalized(config):
    model = ModelConfig(embedding_dim=4, model="dcn", cross_layers=1, deep_mlp=(8,), batch_norm=True)
    return replace(config, model=model, optimizer=OptimizerConfig("adagrad", 0.05))


@pytest.mark.parametrize("decay", [0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_average_is_saved_and_training_goes_on_with_its_own_weights(generated, tmp_path, decay, batch_norm):
    config, seen = tiny(max_steps=30, eval_every=7, checkpoint_every=4), Weights()
    config = normalized(config) if batch_norm else config
    train(generated, tmp_path / "averaged", config, callbacks=[EMA(decay), seen])
    train(generated, tmp_path / "plain", config)
    saved, plain, wanted = last(tmp_path / "averaged"), last(tmp_path / "plain"), average(seen.taken, decay)
    averaged = {name.removeprefix("callbacks.safetensors/EMA/") for name in saved if name.startswith("callbacks")}
    assert any("running_var" in name for name in averaged) == batch_norm
    for name, value in plain.items():
        file, _, key = name.partition("/")
        if key in averaged:
            assert torch.equal(saved[f"callbacks.safetensors/EMA/{key}"], value), name
            torch.testing.assert_close(saved[name].double(), wanted[key], rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(saved[name], value) == (decay == 0)
        else:  # tables, their scales, optimizer and random state
            assert torch.equal(saved[name], value), name
            assert file != "weights.safetensors" or "tables" in name or "num_batches" in name


@pytest.mark.parametrize("bits", [4, 32])
def test_the_average_is_evaluated_chosen_and_exported(generated, tmp_path, bits):
    config = tiny(bits, eval_every=5, callbacks=("ema:decay=0.8", "redraw_tables:min_rows=30"), seed=4)
    summary = train(generated, tmp_path / "run", config)
    model, state = Run.open(tmp_path / "run").load_model("best")
    assert state["step"] == summary["best"]["step"]
    assert evaluate(model, generated, "validation") == summary["best"]["metrics"]
    assert evaluate(model, generated, "test") == summary["test"]
    raw = train(generated, tmp_path / "raw", tiny(bits, eval_every=5, callbacks=("redraw_tables:min_rows=30",), seed=4))
    assert raw["best"] != summary["best"]
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
    packed = dqrm.evaluate(tmp_path / "m.dqrm", generated.path)
    for name, value in packed.items():
        assert summary["test"][name] == pytest.approx(value, abs=1e-6)


def test_the_last_state_is_evaluated_as_averaged_where_validation_chooses_nothing(generated, tmp_path):
    """The result is the last step, so nothing is loaded before the test split."""
    summary = train(generated, tmp_path / "run", tiny(epochs=1, callbacks=("ema:decay=0.8",)))
    assert summary["best"]["step"] == summary["steps"]
    assert evaluate(Run.open(tmp_path / "run").load_model()[0], generated, "test") == summary["test"]


@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("calls", [(5, 14), (30,), (1,)])
def test_a_resumed_run_keeps_its_bits(generated, tmp_path, ranks, calls):
    config = tiny(optimizer="adagrad", checkpoint_every=4, eval_every=11, max_steps=45,
                  callbacks=("ema:decay=0.9", "redraw_tables:min_rows=30"))  # fmt: skip
    config = replace(config, exchange=ExchangeConfig(ranks))
    assert_resumes(generated, tmp_path, config, *calls)


def test_the_weights_of_a_checkpoint_without_an_average_are_its_first(generated, tmp_path):
    config = tiny(checkpoint_every=4, max_steps=20)
    with pytest.raises(Killed):
        train(generated, tmp_path / "run", config, progress=killer(9))
    before, ema = last(tmp_path / "run"), EMA(0.9)
    resume(tmp_path / "run", callbacks=[ema])
    assert ema.updates == 20 - 8
    assert set(before) <= set(tensors(max((tmp_path / "run" / "checkpoints").iterdir())))


def test_an_average_starts_with_each_run(generated, tmp_path):
    ema = EMA(0.9)
    for name in ("one", "two"):
        train(generated, tmp_path / name, tiny(max_steps=9), callbacks=[ema])
        assert ema.updates == 9
    same_tensors(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("decay", [1, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UserError, match=r"ema:decay=.*: decay is .*, expected at least 0 and below 1"):
        build_callbacks([f"ema:decay={decay}"])
