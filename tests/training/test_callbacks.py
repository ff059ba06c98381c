"""Callbacks: called when they say, saved and resumed bit for bit, refused where they cannot be what was meant."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import tensors, tiny
from dqrm import Callback, checksums
from dqrm.config import ExchangeConfig, OptimizerConfig
from dqrm.errors import UserError
from dqrm.models.dlrm import DLRM
from dqrm.quant.config import QATConfig
from dqrm.training.callbacks import CALLBACKS, RedrawTables, build_callbacks, save_callbacks
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from launch_helpers import same_figures, same_run, same_tensors
from run_helpers import Killed, assert_resumes, killer


class Nudge(Callback):
    """Changes the model by what it remembers: a number and a tensor."""

    def __init__(self, every: int = 1, size: float = 1e-3):
        self.every, self.size = every, size
        self.calls, self.mean = 0, torch.zeros(())

    def on_step_end(self, trainer, loss):
        self.calls += 1
        self.mean = self.mean + (loss - self.mean) / self.calls
        if self.calls % self.every == 0:
            trainer.model.top[-1].bias.data.add_(self.size * self.mean)

    def state_dict(self):
        return {"calls": self.calls, "mean": self.mean}

    def load_state_dict(self, state):
        self.calls, self.mean = state["calls"], state["mean"]


class Diary(Callback):
    """Writes down each call."""

    def __init__(self):
        self.lines = []

    def on_epoch_start(self, trainer):
        self.lines.append(("epoch", trainer.state.epoch, trainer.state.step))

    def on_step_end(self, trainer, loss):
        assert (loss.shape, loss.requires_grad) == ((), False)
        self.lines.append(("step", trainer.state.step, float(loss)))

    def on_evaluation(self, trainer, metrics):
        self.lines.append(("evaluation", trainer.state.step, metrics["auc"]))


def evaluations(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "evaluation"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_hooks_are_called_in_the_order_of_the_run(generated, tmp_path, ranks):
    diary, config = Diary(), replace(tiny(eval_every=10, max_steps=40), exchange=ExchangeConfig(ranks))
    train(generated, tmp_path / "run", config, callbacks=[diary])
    batches, lines = -(-generated.rows["train"] // 64), evaluations(tmp_path / "run")
    assert [line for line in diary.lines if line[0] == "epoch"] == [("epoch", 0, 0), ("epoch", 1, batches)]
    assert [line[1] for line in diary.lines if line[0] == "step"] == list(range(1, 41))
    assert [line[1:] for line in diary.lines if line[0] == "evaluation"] == [(e["step"], e["auc"]) for e in lines]
    for number, line in enumerate(diary.lines):
        if line[0] == "evaluation":
            assert diary.lines[number - 1][:2] == ("step", line[1])
    losses = [line[2] for line in diary.lines if line[0] == "step"][:batches]
    rows = [64] * (batches - 1) + [generated.rows["train"] - 64 * (batches - 1)]
    mean = sum(loss * count for loss, count in zip(losses, rows)) / sum(rows)
    (epoch,) = [line for line in lines if line["step"] == batches]
    assert mean == pytest.approx(epoch["train_loss"], rel=1e-6)


def test_a_callback_that_only_looks_changes_no_bit_and_one_may_end_the_run(generated, tmp_path):
    class Ends(Callback):
        def on_step_end(self, trainer, loss):
            trainer.state.finished = trainer.state.step == 7

    train(generated, tmp_path / "plain", tiny(max_steps=7))
    train(generated, tmp_path / "watched", tiny(max_steps=7), callbacks=[Diary()])
    train(generated, tmp_path / "ended", tiny(), callbacks=[Ends()])
    same_tensors(tmp_path / "plain", tmp_path / "watched")
    same_figures(tmp_path / "plain", tmp_path / "watched")
    same_tensors(tmp_path / "plain", tmp_path / "ended")


@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("calls", [(5, 14), (30,)])
def test_state_is_resumed_bit_for_bit(generated, tmp_path, ranks, calls):
    config = tiny(optimizer="rowwise_adagrad", checkpoint_every=4, eval_every=11, max_steps=45,
                  callbacks=("redraw_tables:min_rows=30",))  # fmt: skip
    config = replace(config, exchange=ExchangeConfig(ranks))
    train(generated, tmp_path / "without", replace(config, training=replace(config.training, callbacks=())))
    assert_resumes(generated, tmp_path, config, *calls, callbacks=lambda: [Nudge(3)])
    newest = max((tmp_path / "whole" / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["callbacks"]["Nudge"] == {"calls": 45}
    assert tensors(newest)["callbacks.safetensors/Nudge/mean"] > 0
    with pytest.raises(AssertionError):
        same_tensors(tmp_path / "whole", tmp_path / "without")


def test_without_one_of_its_callbacks_a_run_is_not_resumed(generated, tmp_path):
    with pytest.raises(Killed):
        train(generated, tmp_path / "run", tiny(checkpoint_every=2), callbacks=[Nudge()], progress=killer(9))
    with pytest.raises(UserError, match=r"the callback Nudge, which is missing; resume it in Python with dqrm\.resume"):
        resume(tmp_path / "run")
    resume(tmp_path / "run", callbacks=[Nudge(), Diary()])  # a further one begins anew


def test_a_checkpoint_of_before_there_were_callbacks_resumes(generated, tmp_path):
    with pytest.raises(Killed):
        train(generated, tmp_path / "run", tiny(checkpoint_every=2, max_steps=20), progress=killer(9))
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    for file in (tmp_path / "old" / "checkpoints").glob("*/state.json"):
        state = json.loads(file.read_text())
        assert state.pop("callbacks") == {}
        del state[checksums.SEAL]
        file.write_text(json.dumps(checksums.seal(state)))
    info = json.loads((tmp_path / "old" / "run.json").read_text())
    del info["config"]["training"]["callbacks"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(info))
    resume(tmp_path / "run")
    resume(tmp_path / "old")
    same_run(tmp_path / "run", tmp_path / "old")


def test_by_name_in_python_yaml_and_flags(generated, tmp_path, monkeypatch):
    monkeypatch.setitem(CALLBACKS, "nudge", Nudge)
    (callback,) = build_callbacks(["nudge:every=3:size=0.5"])
    assert (callback.every, callback.size) == (3, 0.5)
    redrawn, nudge = build_callbacks(["redraw_tables"], [Nudge()])
    assert (redrawn.min_rows, redrawn.name, nudge.name) == (10_000, "RedrawTables", "Nudge")
    train(generated, tmp_path / "named", tiny(max_steps=7, callbacks=["nudge:every=3"]))
    train(generated, tmp_path / "object", tiny(max_steps=7), callbacks=[Nudge(3)])
    same_tensors(tmp_path / "named", tmp_path / "object")
    assert Run.open(tmp_path / "named").config.training.callbacks == ("nudge:every=3",)


@pytest.mark.parametrize(("named", "given", "message"), [
    (["redraw"], [], "callbacks: got 'redraw', expected one of redraw_tables"),
    (["redraw_tables:rows=5"], [], "redraw_tables has no option 'rows'; did you mean 'min_rows'"),
    (["redraw_tables:min_rows=few"], [], "redraw_tables:min_rows: got 'few', expected a whole number"),
    (["redraw_tables:5"], [], "got 'redraw_tables:5', expected NAME:OPTION=VALUE"),
    ([], [Nudge], "got a type, expected instances of dqrm.Callback"),
    (["redraw_tables:min_rows=-1"], [], r"min_rows is -1, expected 0 \(all tables\) or more"),
    (["ema:decay=2"], [], "decay is 2.0, expected at least 0 and below 1"),
    (["ema:decay=0.5:decay=0.9"], [], "got 'ema:decay=0.5:decay=0.9', which gives decay twice"),
    (["redraw_tables"], [RedrawTables(5)], "two of them are named RedrawTables"),
])  # fmt: skip
def test_what_is_no_callback_is_refused_before_any_work(generated, tmp_path, named, given, message):
    with pytest.raises(UserError, match=message):
        train(generated, tmp_path / "run", tiny(callbacks=named), callbacks=given)
    assert not (tmp_path / "run").exists()


def test_a_state_that_cannot_be_saved_is_named():
    class Odd(Callback):
        def state_dict(self):
            return {"seen": {1, 2}}

    with pytest.raises(UserError, match="callback Odd: 'seen' of its state_dict is a set, expected a tensor or a JSON"):
        save_callbacks([Odd()])


# ---- redraw_tables


class Snapshot(Callback):
    """Tables, scales and optimizer state at the start of each epoch; before or after another callback's turn."""

    def __init__(self, name):
        self._name, self.taken = name, []

    name = property(lambda self: self._name)

    def on_epoch_start(self, trainer):
        tables = trainer.model.tables
        state = trainer.optimizers[0].state[tables.weight]["sum"]
        self.taken.append(
            ([tables.table(n).clone() for n in range(26)], tables.scale.clone(), state.clone(), tables.scale_ticks)
        )


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_scale_of_a_table_that_has_grown_falls_with_its_redrawing(generated, tmp_path, ranks):
    """A scale that only rises would leave nothing but zeros of the fresh rows: they are in a range of its own."""
    before, after = Snapshot("before"), Snapshot("after")
    config = replace(
        tiny(epochs=2, seed=5), optimizer=OptimizerConfig("adagrad", 1.0), exchange=ExchangeConfig(ranks),
        quantization=QATConfig(bits=4, scale_refresh="running_max", rescan_period=10**6),
    )  # fmt: skip
    train(generated, tmp_path / "run", config, callbacks=[before, RedrawTables(30), after])
    (old, old_scale, *_), (new, scale, *_) = before.taken[1], after.taken[1]
    drawn = [number for number, rows in enumerate(generated.table_rows) if rows >= 30]
    assert drawn
    for number, table in enumerate(new):
        assert scale[number] == pytest.approx(float(table.abs().max()) / 7)
        if number in drawn:
            assert (old[number] / old_scale[number]).abs().max() <= 7.5
            assert scale[number] < old_scale[number] / 5
            assert ((table / scale[number]).round() == 0).float().mean() < 0.15  # of uniform values: 1/14
            assert ((table / old_scale[number]).round() == 0).float().mean() > 0.5
    model, _ = Run.open(tmp_path / "run").load_model("last")
    for number in drawn:
        assert model.tables.table(number).abs().max() <= model.tables.scale[number] * 7.001


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("rule", ["adagrad", "rowwise_adagrad"])
def test_large_tables_are_drawn_anew_with_their_scale_and_optimizer_state(generated, tmp_path, bits, rule):
    before, after = Snapshot("before"), Snapshot("after")
    config = tiny(bits, optimizer=rule, epochs=3, seed=5)
    train(generated, tmp_path / "run", config, callbacks=[before, RedrawTables(30), after])
    rows = generated.table_rows
    assert 0 < sum(count >= 30 for count in rows) < len(rows)
    fresh = DLRM(13, rows, config=config.model, qat=config.quantization, seed=5)
    ends, drawn = [0, *torch.tensor(rows).cumsum(0).tolist()], []
    for epoch, (old, new) in enumerate(zip(before.taken, after.taken)):
        for number, count in enumerate(rows):
            part, table = slice(ends[number], ends[number + 1]), new[0][number]
            if epoch == 0 or count < 30:
                assert torch.equal(table, old[0][number])
                assert torch.equal(new[2][part], old[2][part])
                continue
            assert table.abs().max() <= count**-0.5 * 1.0001
            assert table.std() == pytest.approx((3 * count) ** -0.5, rel=0.2)
            assert not torch.equal(table, fresh.tables.table(number))
            assert old[2][part].any()
            assert not new[2][part].any()
            drawn.append((number, epoch, table))
        assert old[3] == new[3]
        if bits == 4 and epoch:
            largest = torch.stack([table.abs().max() for table in new[0]])
            torch.testing.assert_close(new[1], largest / 7)
    for number, epoch, table in drawn:
        others = [other for n, e, other in drawn if n == number and e != epoch]
        assert others
        assert not any(torch.equal(table, other) for other in others)
        again = DLRM(13, rows, config=config.model, qat=config.quantization, seed=9)
        again.redraw_tables(5, epoch, [number])
        assert torch.equal(again.tables.table(number), table)
