"""Quantization in stages: what trains unquantized or with more bits does so bit for bit, what is evaluated, saved and
exported has the final bits, and a run ends no earlier for it."""

import json
from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm import Callback
from dqrm.config import ExchangeConfig, OptimizerConfig
from dqrm.errors import UserError
from dqrm.quant.config import QATConfig
from dqrm.training.callbacks import StageBits
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from launch_helpers import same_run, same_tensors
from run_helpers import Killed, killer, last
from training.test_callbacks import Snapshot, evaluations

STAGED = ("stage_bits:tables=32:mlp=32-16",)


def weights(run):
    """Weights and optimizer state of the newest checkpoint, without scales, which depend on the final bits."""
    return {name: value for name, value in last(run).items() if "fake_quantizer" not in name and "scale" not in name}


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize(("stages", "bits"), [
    ("tables=32:mlp=32", QATConfig(bits=32)),
    ("tables=32", QATConfig(table_bits=32, mlp_bits=4)),
    ("mlp=8", QATConfig(table_bits=4, mlp_bits=8)),
    ("tables=32:mlp=16", QATConfig(table_bits=32, mlp_bits=16)),
])  # fmt: skip
def test_an_epoch_trains_as_a_run_with_these_bits(generated, tmp_path, stages, bits, ranks):
    batches = -(-generated.rows["train"] // 64)
    base = replace(tiny(optimizer="adagrad", callbacks=(f"stage_bits:{stages}",)), exchange=ExchangeConfig(ranks))
    base = replace(base, quantization=QATConfig(bits=4))
    ended = replace(base, training=replace(base.training, max_steps=batches))
    with pytest.warns(UserWarning, match="the run ends in epoch 1, before stage_bits reached the final bits"):
        train(generated, tmp_path / "staged", ended)
    plain = replace(ended, quantization=bits, training=replace(ended.training, callbacks=()))
    train(generated, tmp_path / "plain", plain)
    mine, theirs = weights(tmp_path / "staged"), weights(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    assert mine
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    train(generated, tmp_path / "unstaged", replace(ended, training=plain.training))
    with pytest.raises(AssertionError):
        same_tensors(tmp_path / "unstaged", tmp_path / "staged")


def test_evaluations_and_artifact_of_a_staged_epoch_have_the_final_bits(generated, tmp_path):
    config = tiny(epochs=3, optimizer="adagrad", select_by="log_loss", callbacks=STAGED)
    summary = train(generated, tmp_path / "run", config)
    assert summary["best"]["epoch"] == 1  # the log is small: later epochs overfit
    model, _ = Run.open(tmp_path / "run").load_model("best")
    assert model.tables.bits == 4
    assert {layer.bits for layer in model.top if hasattr(layer, "bits")} == {4}
    assert evaluate(model, generated, "validation") == summary["best"]["metrics"]
    assert evaluate(model, generated, "test") == summary["test"]
    assert dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")["largest_difference"] == 0
    packed = dqrm.evaluate(tmp_path / "m.dqrm", generated.path)
    for name, value in summary["test"].items():
        assert packed[name] == pytest.approx(value, abs=1e-6), name


def test_stages_follow_the_epochs_and_scales_are_set_when_quantization_begins(generated, tmp_path):
    class Bits(Callback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, trainer, loss):
            model = trainer.model
            self.seen.append((trainer.state.epoch + 1, model.tables.bits_in_use, model.top[0].bits_in_use))

    bits, snapshot, said = Bits(), Snapshot("after"), []
    config = tiny(epochs=4, optimizer="adagrad", period=10**6, callbacks=("stage_bits:tables=32-32:mlp=16-8-4",))
    train(generated, tmp_path / "run", config, callbacks=[snapshot, bits], log=said.append)
    assert list(dict.fromkeys(bits.seen)) == [(1, 32, 16), (2, 32, 8), (3, 4, 4), (4, 4, 4)]
    tables, scale, *_ = snapshot.taken[2]
    largest = torch.stack([table.abs().max() for table in tables])
    torch.testing.assert_close(scale, largest / 7)
    assert not torch.equal(scale, snapshot.taken[1][1])
    assert [line for line in said if line.startswith("Epoch")] == [
        "Epoch 1 trains with 32 bits in the tables and 16 in the MLP; evaluated with 4 and 4",
        "Epoch 2 trains with 32 bits in the tables and 8 in the MLP; evaluated with 4 and 4",
    ]


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("options", [
    {"scale_period": 7},
    {"rescan_period": 7},
    {"quantizer": "mse", "bias_bits": 8, "scale_period": 7},
    {"forward_rounding": "stochastic", "small_table_bits": 8, "small_table_rows": 50, "scale_period": 7},
])  # fmt: skip
def test_a_resumed_run_keeps_its_bits(generated, tmp_path, options, ranks):
    """Killed within the stages, at the end of one, and after them."""
    config = tiny(epochs=3, optimizer="adagrad", checkpoint_every=4, callbacks=(*STAGED, "ema:decay=0.9"))
    config = replace(config, exchange=ExchangeConfig(ranks), quantization=QATConfig(**options))
    train(generated, tmp_path / "whole", config)
    batches = -(-generated.rows["train"] // 64)
    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, progress=killer(9))
    for call in (batches - 3, batches, batches + 3):
        with pytest.raises(Killed):
            resume(tmp_path / "cut", progress=killer(call))
    resume(tmp_path / "cut")
    if ranks:
        same_tensors(tmp_path / "whole", tmp_path / "cut")
    else:
        same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_stops_at_the_end_of_a_stage_sets_scales_when_it_goes_on(generated, tmp_path):
    class Dies(Callback):
        def __init__(self, dies=True):
            self.dies = dies

        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 1 and self.dies:
                raise Killed

    config = tiny(epochs=2, period=10**6, callbacks=("stage_bits:tables=32",))
    train(generated, tmp_path / "whole", config, callbacks=[Dies(False)])
    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, callbacks=[Dies()])
    batches = -(-generated.rows["train"] // 64)
    assert max((tmp_path / "cut" / "checkpoints").iterdir()).name.endswith(f"{batches}")
    resume(tmp_path / "cut", callbacks=[Dies(False)])
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("callbacks", "options", "stops"), [
    ((), {"patience": 1}, 2),
    (("stage_bits:mlp=32-32-32",), {"patience": 1}, 4),
    (("stage_bits:mlp=32-32-32",), {"patience": 2}, 5),
    ((), {"early_stopping": 2}, 3),
    (("stage_bits:mlp=32-32-32",), {"early_stopping": 2}, 5),
])  # fmt: skip
def test_stages_do_not_count_for_patience(generated, tmp_path, callbacks, options, stops):
    """At learning rate 0 nothing improves after the first epoch."""
    config = tiny(epochs=9, callbacks=callbacks, **options)
    optimizer = OptimizerConfig("sgd", 0.0, plateau_factor=0.5)
    summary = train(generated, tmp_path / "run", replace(config, optimizer=optimizer))
    assert (summary["epochs"], summary["best"]["epoch"]) == (stops, 1)
    state = json.loads((max((tmp_path / "run" / "checkpoints").iterdir()) / "state.json").read_text())
    staged = 3 if callbacks else 0
    assert state["uncounted_epoch"] == staged
    assert state["rate_factor"] == 0.5 ** (stops - max(staged, 1))
    assert len(evaluations(tmp_path / "run")) == stops


@pytest.mark.parametrize(("options", "fields", "message"), [
    ("", {}, "no stages are given, expected tables or mlp"),
    (":tables=8", {}, "tables is 8, expected 32"),
    (":mlp=8-16", {}, "mlp is 8-16, expected falling numbers among 32-16-8-4-2"),
    (":mlp=12", {}, "mlp is 12, expected falling numbers"),
    (":mlp=few", {}, "stage_bits:mlp: got 'few', expected a whole number"),
    (":mlp=16-4", {"mlp_bits": 8}, "mlp is 16-4, but the configuration gives mlp 8 bits .*expected no fewer than 8"),
    (":mlp=32", {"mlp_bits": 32}, "mlp is 32, but the configuration gives mlp 32 bits .*expected no stages"),
    (":tables=32", {"bits": 32}, "tables is 32, but the configuration gives tables 32 bits"),
    (":tables=32", {"quantizer": "lsq"}, "quantizer is 'lsq', whose scales are learned"),
    (":mlp=32-16", {}, "mlp is 32-16, but the run has 2 epochs, which leaves none to train in 4 bits"),
])  # fmt: skip
def test_stages_that_cannot_be_are_refused_before_any_work(generated, tmp_path, options, fields, message):
    config = replace(tiny(callbacks=(f"stage_bits{options}",)), quantization=QATConfig(**fields))
    with pytest.raises(UserError, match=message):
        train(generated, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_the_last_stage_may_be_the_final_bits(generated, tmp_path):
    train(generated, tmp_path / "named", tiny(callbacks=("stage_bits:mlp=8-4",)))
    train(generated, tmp_path / "object", tiny(), callbacks=[StageBits(mlp=(8,))])
    same_tensors(tmp_path / "named", tmp_path / "object")
