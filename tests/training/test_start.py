"""Runs that start from another: `train(..., start_from=RUN)`."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dqrm
from conftest import tensors, tiny
from daily_helpers import COLUMNS, days
from dqrm import ExchangeConfig, OptimizerConfig, PrepareConfig, QATConfig, Run, UserError, recipe, resume, train
from dqrm.data.lineage import row_changes
from dqrm.kernels.rows import slots_of
from dqrm.quant.int8_rows import Int8Rows
from dqrm.quant.storage import INT4, copy_rows, storage_for, storage_of
from dqrm.training.callbacks import Callback
from launch_helpers import launched, newest, same_run, same_tensors, simulated, train_words
from run_helpers import Killed, killer


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return days(tmp_path_factory.mktemp("logs"), 4)


@pytest.fixture(scope="module")
def datasets(logs, tmp_path_factory):
    """Datasets of four days; rows of ids that are not seen for a day are given to others."""
    folder, found = tmp_path_factory.mktemp("data"), []
    for number, log in enumerate(logs):
        more = {} if not found else {"extend": str(found[-1].path)}
        config = replace(COLUMNS, evict_after=1 if found else None, **more)
        found.append(dqrm.prepare([log], folder / str(number), config))
    return found


class First(Callback):
    """Weights, scales and optimizer state before the first step."""

    def on_epoch_start(self, trainer):
        if not trainer.state.step:
            self.weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
            self.state = [
                [
                    {name: value.clone() for name, value in optimizer.state[parameter].items()}
                    for parameter in group["params"]
                ]
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            ]


def started(data, folder, config, **more):
    first = First()
    train(data, folder, config, callbacks=[first], **more)
    return first


def test_rows_are_carried_over_by_id_and_others_drawn(datasets, tmp_path):
    """Against a dict of ids, row by row: weights and optimizer state."""
    monday, _, wednesday, _ = datasets
    config = tiny(optimizer="adagrad", seed=1, epochs=1)
    train(monday, tmp_path / "1", config)
    first = started(wednesday, tmp_path / "2", replace(config, training=replace(config.training, seed=5)),
                    start_from=tmp_path / "1")  # fmt: skip
    saved = tensors(newest(tmp_path / "1"))
    weight, sums = saved["weights.safetensors/tables.weight"], saved["optimizer.safetensors/0/0/sum"]
    fresh = started(wednesday, tmp_path / "3", tiny(optimizer="adagrad", seed=5, max_steps=1)).weights["tables.weight"]
    (state,), before, now, kept = first.state[0], 0, 0, 0
    for number in range(len(monday.columns)):
        old, new = monday.vocabulary(number), wednesday.vocabulary(number)
        rows = dict(zip(old.keys, old.table_rows.tolist()))
        stays = {0: 0} | {
            row: rows[key]
            for key, row, since in zip(new.keys, new.table_rows.tolist(), new.since.tolist())
            if key in rows and since == 0
        }
        for row in range(new.rows):
            if row in stays:
                assert torch.equal(first.weights["tables.weight"][now + row], weight[before + stays[row]])
                assert torch.equal(state["sum"][now + row], sums[before + stays[row]])
                assert stays[row] == row
                kept += 1
            else:
                assert torch.equal(first.weights["tables.weight"][now + row], fresh[now + row])
                assert not state["sum"][now + row].any()
        before, now = before + old.rows, now + new.rows
    assert 10 < kept < now - 10
    assert any(len(change.reused) for change in row_changes(wednesday, Run.open(tmp_path / "1").info["data"], tmp_path))
    for name, value in first.weights.items():
        if name != "tables.weight":
            assert torch.equal(value, saved[f"weights.safetensors/{name}"]), name
    for number, each in enumerate(first.state[1]):
        assert torch.equal(each["sum"], saved[f"optimizer.safetensors/1/{number}/sum"])
        assert torch.equal(each["step"], saved[f"optimizer.safetensors/1/{number}/step"])


@pytest.mark.parametrize(
    "rule", ["sgd", "rowwise_adagrad", "counter_adagrad", "frequency_adagrad", "adam", "dense_adam"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_finished_run_goes_on_with_all_of_its_state(generated, tmp_path, rule, dtype):
    config = tiny(optimizer=rule, epochs=1, max_steps=9, table_dtype=dtype, seed=3)
    train(generated, tmp_path / "1", config)
    first = started(generated, tmp_path / "2", config, start_from=tmp_path / "1")
    saved = tensors(newest(tmp_path / "1"))
    for name, value in first.weights.items():
        stored = value.stored if isinstance(value, Int8Rows) else value
        assert torch.equal(stored, saved[f"weights.safetensors/{name}"]), name
    found = {
        f"optimizer.safetensors/{at}/{number}/{name}": value
        for at, group in enumerate(first.state)
        for number, state in enumerate(group)
        for name, value in state.items()
    }
    assert found.keys() == {
        name for name in saved if name.startswith(("optimizer.safetensors/0", "optimizer.safetensors/1"))
    }
    for name, value in found.items():
        assert torch.equal(value, saved[name]), name


def test_what_evaluates_before_the_first_step_is_what_the_earlier_run_left(generated, tmp_path):
    """Without a learning rate nothing changes: the metrics are those of the earlier run."""
    config = tiny(bits=32, epochs=1, max_steps=20)
    train(generated, tmp_path / "1", config)
    still = replace(config, optimizer=OptimizerConfig("sgd", 0.0))
    summary = train(generated, tmp_path / "2", still, start_from=tmp_path / "1")
    assert summary["test"] == Run.open(tmp_path / "1").summary["test"]


@pytest.mark.parametrize(("one", "other"), [
    ("fp32", "int8"), ("int8", "fp32"), ("bf16", "int8"), ("fp32", "bf16"), ("fp32", "int4"), ("int8", "int4"),
    ("int4", "int8"), ("int4", "bf16"),
])  # fmt: skip
def test_another_storage_takes_the_nearest_values(one, other):
    """Against float64, row by row."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int4}
    draw = torch.Generator().manual_seed(1)
    for rows, dim in ((1, 1), (7, 3), (300, 8)):
        source, target = (storage_for(dtypes[name]).empty(rows, dim) for name in (one, other))
        source.copy_(torch.randn(rows, dim, generator=draw) * torch.logspace(-6, 3, rows)[:, None])
        target.zero_()
        chosen = torch.randperm(rows, generator=draw)[: rows - rows // 3]
        onto = torch.randperm(rows, generator=draw)[: len(chosen)]
        copy_rows(target, onto, source, chosen)
        exact = storage_for(dtypes[one]).read(source)[chosen].double()
        found = storage_for(dtypes[other]).read(target)
        largest = exact.abs().amax(1, keepdim=True)
        step = {"fp32": torch.zeros(1), "bf16": exact.abs() * 2**-8}.get(other)
        step = largest / (127 if other == "int8" else 7) * 1.01 / 2 if step is None else step
        assert (found[onto].double() - exact).abs().sub(step).max() <= 0
        untouched = torch.ones(rows, dtype=torch.bool)
        untouched[onto] = False
        assert not found[untouched].any()
    copy_rows(target, chosen[:0], source, chosen[:0])


@pytest.mark.parametrize(("before", "after", "told"), [
    ({"table_dtype": "fp32"}, {"table_dtype": "int8"}, "stored in int8, before in fp32"),
    ({"table_dtype": "int8"}, {"table_dtype": "fp32"}, "stored in fp32, before in int8"),
    ({"table_dtype": "int4"}, {"table_dtype": "int8"}, "stored in int8, before in int4"),
    ({"optimizer": "adagrad"}, {"optimizer": "adam"}, "dropped: the state of adagrad (now adam)"),
])  # fmt: skip
def test_what_is_dropped_is_told(generated, tmp_path, before, after, told):
    train(generated, tmp_path / "1", tiny(max_steps=3, **before))
    lines = []
    train(generated, tmp_path / "2", tiny(max_steps=3, **after), start_from=tmp_path / "1", log=lines.append)
    (line,) = [line for line in lines if line.startswith("Starting from")]
    assert told in line
    assert "0 table rows new" in line


def test_learned_scales_are_carried_over_where_they_fit(generated, tmp_path):
    lsq = replace(tiny(max_steps=8, optimizer="adam"), quantization=QATConfig(bits=4, quantizer="lsq"))
    train(generated, tmp_path / "1", lsq)
    saved, lines = tensors(newest(tmp_path / "1")), []
    first = started(generated, tmp_path / "2", lsq, start_from=tmp_path / "1", log=lines.append)
    names = [name for name in first.weights if name.endswith("scale")]
    assert len(names) > 3
    for name in names:
        assert torch.equal(first.weights[name], saved[f"weights.safetensors/{name}"]), name
    found = [state["exp_avg"] for state in first.state[1] + first.state[2]]
    assert all(
        torch.equal(each, saved[f"optimizer.safetensors/1/{number}/exp_avg"]) for number, each in enumerate(found)
    )
    assert "dropped" not in lines[1] + lines[2]
    for bits, quantizer in ((8, "lsq"), (4, "max")):
        lines = []
        config = replace(lsq, quantization=QATConfig(bits=bits, quantizer=quantizer))
        first = started(generated, tmp_path / f"{bits}", config, start_from=tmp_path / "1", log=lines.append)
        assert any("dropped: what quantizers learned" in line for line in lines)
        plain = "top.0.weight"
        assert torch.equal(first.weights[plain], saved[f"weights.safetensors/{plain}"])


def test_only_the_layers_with_carry_mlp(generated, bags_data, tmp_path):
    train(generated, tmp_path / "1", tiny(max_steps=9, optimizer="adagrad", seed=1))
    config = tiny(max_steps=3, optimizer="adagrad", seed=2)
    first = started(generated, tmp_path / "2", config, start_from=tmp_path / "1", carry="mlp")
    fresh = started(generated, tmp_path / "3", config)
    saved = tensors(newest(tmp_path / "1"))
    for name, value in first.weights.items():
        if name == "tables.weight":
            assert torch.equal(value, fresh.weights[name])
        else:
            assert torch.equal(value, saved[f"weights.safetensors/{name}"])
    assert not first.state[0][0]["sum"].any()
    with pytest.raises(UserError, match=r"has 13 dense and 26 categorical columns, but .* has 0 and 2"):
        train(bags_data, tmp_path / "4", replace(config, model=config.model), start_from=tmp_path / "1", carry="mlp")


def test_killed_and_resumed_bit_for_bit(datasets, tmp_path):
    config = tiny(optimizer="adagrad", checkpoint_every=3)
    train(datasets[0], tmp_path / "1", config)
    config = replace(config, training=replace(config.training, epochs=2))
    train(datasets[1], tmp_path / "whole", config, start_from=tmp_path / "1")
    for number, call in enumerate((1, 2, 5)):  # before the first checkpoint, and after it
        cut = tmp_path / f"cut{number}"
        with pytest.raises(Killed):
            train(datasets[1], cut, config, start_from=tmp_path / "1", verify=False, progress=killer(call))
        if call == 5:
            assert any(cut.glob("checkpoints/step-*"))
            shutil.rmtree(tmp_path / "1")  # no longer needed
        resume(cut)
        same_run(tmp_path / "whole", cut)


def test_a_start_whose_run_is_gone_or_another_is_refused(datasets, tmp_path):
    config = tiny(max_steps=5)
    train(datasets[0], tmp_path / "1", config)
    with pytest.raises(Killed):
        train(datasets[0], tmp_path / "2", config, start_from=tmp_path / "1", verify=False, progress=killer(1))
    assert not any((tmp_path / "2").glob("checkpoints/step-*"))
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(UserError, match="1 does not exist, expected a run folder"):
        resume(tmp_path / "2")
    train(datasets[0], tmp_path / "1", replace(config, training=replace(config.training, seed=9)))
    with pytest.raises(UserError, match="1 is no longer the run that this one was started from; start it again"):
        resume(tmp_path / "2")


@pytest.mark.parametrize("ranks", [2])
def test_real_ranks_do_what_simulated_ranks_do(datasets, tmp_path, capsys, ranks):
    earlier = simulated(capsys, datasets[0], tmp_path / "1", ranks, optimizer="adagrad")
    words = {"real": [*train_words(datasets[1], optimizer="adagrad"), "--from", earlier]}
    runs, _ = launched(tmp_path, ranks, words)
    config = Run.open(runs["real"][0]).config
    train(datasets[1], tmp_path / "simulated", replace(config, exchange=ExchangeConfig(ranks)), start_from=earlier)
    same_tensors(runs["real"][0], tmp_path / "simulated")


@pytest.mark.parametrize(
    "change", ["architecture", "columns", "vocabulary", "unfinished", "epochs", "carry", "damaged"]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(datasets, logs, tmp_path, change):
    config, data, more = tiny(max_steps=3), datasets[0], {}
    train(datasets[1], tmp_path / "1", config)
    if change == "architecture":
        config = replace(config, model=replace(config.model, top_mlp=(16, 1)))
        message = "1 has top_mlp 8-1, but this run 16-1: a run starts from one of the same architecture"
    elif change == "columns":
        data = dqrm.prepare([logs[0]], tmp_path / "other", PrepareConfig(categorical=("user",), dense=("price",)))
        message = "1 was trained with the columns price, user, tags, but .*other has price, user: a run starts"
    elif change == "vocabulary":
        message = "is not the dataset that .*1 was trained on, nor does it have or extend its vocabularies"
    elif change == "unfinished":
        data = datasets[1]
        (tmp_path / "1" / "summary.json").unlink()
        message = "1 is not finished; `dqrm train --resume .*1` continues it"
    elif change == "epochs":
        data = datasets[1]
        config = tiny(callbacks=("redraw_tables",))
        message = "epochs is 2, but the callback redraw_tables would redraw the rows carried over from .*1 at epoch 2"
    elif change == "carry":
        more, message = {"carry": "tables"}, "carry: got 'tables', expected 'all' or 'mlp'"
    else:
        data = datasets[1]
        file = newest(tmp_path / "1") / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        message = "optimizer.safetensors is damaged"
    with pytest.raises(UserError, match=message):
        train(data, tmp_path / "2", config, start_from=tmp_path / "1", **more)
    assert not (tmp_path / "2").exists()


def test_the_record_and_the_default_of_one_epoch(datasets, tmp_path):
    config = tiny(epochs=0, callbacks=("redraw_tables:min_rows=1",), patience=2)
    train(datasets[0], tmp_path / "1", replace(config, training=replace(config.training, epochs=2)))
    train(datasets[1], tmp_path / "2", config, start_from=tmp_path / "1")
    info = json.loads((tmp_path / "2" / "run.json").read_text())
    assert info["start"]["run"] == str((tmp_path / "1").resolve())
    assert (info["start"]["carry"], info["config"]["training"]["epochs"]) == ("all", 1)
    assert "start" not in json.loads((tmp_path / "1" / "run.json").read_text())
    assert np.isfinite(Run.open(tmp_path / "2").summary["test"]["log_loss"])


def in_tiers(rows, dim, seed=0):
    """Rows, of which some are updated far more often than others."""
    weight = INT4.with_hot_rows(0.2).encode(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))
    draw = torch.Generator().manual_seed(seed + 1)
    for step in range(40):
        often = torch.rand(rows, generator=draw) < 1 / (1 + torch.arange(rows) / 4)
        at = often.nonzero()[:, 0]
        INT4.update(weight, at, torch.randn(len(at), dim, generator=draw), 0.1, step, None)
    return weight


def slots(weight):
    return slots_of(weight.operand, torch.arange(len(weight)))


def test_rows_in_tiers_keep_their_codes_and_their_tier():
    """Of a table that is a slice of all tables, into one that begins at another row."""
    for dim in (1, 3, 8):
        source = in_tiers(200, dim)
        target = INT4.with_hot_rows(0.4).empty(300, dim)
        target.zero_()
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:90]
        copy_rows(target[150:250], rows + 0, source[40:140], rows)
        target.check()
        before, after = slots(source)[40:140][rows] >= 0, slots(target)[150:250][rows] >= 0
        assert before.any()
        assert not (after & ~before).any()
        assert (before & after).sum() > 0.7 * before.sum()
        values, exact = (weight.dequantize() for weight in (target, source))
        same = before == after
        assert torch.equal(values[150:250][rows[same]], exact[40:140][rows[same]])
        lost = rows[~same]
        step = exact[40:140][lost].abs().amax(1, keepdim=True) / 7 * 1.01 / 2
        assert ((values[150:250][lost] - exact[40:140][lost]).abs() <= step).all()
        for row in rows[before & after].tolist():
            there, here = slots(source)[40 + row], slots(target)[150 + row]
            assert source.operand.counts[there] == target.operand.counts[here]
        untouched = torch.ones(300, dtype=torch.bool)
        untouched[150 + rows] = False
        assert not values[untouched].any()


def test_all_rows_in_tiers_are_bit_for_bit_the_same():
    source = in_tiers(200, 8)
    target = INT4.with_hot_rows(0.2).empty(200, 8)
    target.zero_()
    everything = torch.arange(200)
    copy_rows(target, everything, source, everything)
    assert torch.equal(target.dequantize(), source.dequantize())
    assert torch.equal(slots(target) >= 0, slots(source) >= 0)
    again = target.clone()
    copy_rows(target, everything, source, everything)  # rows that have slots keep them
    assert torch.equal(target.stored, again.stored)


def test_of_a_set_without_room_the_most_often_updated_rows_have_slots():
    source = in_tiers(200, 4)
    target = INT4.with_hot_rows(0.04).empty(200, 4)  # one set
    target.zero_()
    everything = torch.arange(200)
    copy_rows(target, everything, source, everything)
    target.check()
    there, here = slots(source), slots(target)
    counts = source.operand.counts[there[there >= 0]]
    assert sorted(target.operand.counts.tolist()) == sorted(counts.tolist())[-8:]
    assert (here >= 0).sum() == 8


@pytest.mark.parametrize("before", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("after", ["int4", "fp32"])
def test_runs_start_from_and_in_tables_in_tiers(datasets, tmp_path, before, after):
    train(datasets[0], tmp_path / "one", tiny(max_steps=20, table_dtype=before, optimizer="rowwise_adagrad"))
    first = started(
        datasets[1],
        tmp_path / "two",
        tiny(max_steps=3, table_dtype=after, optimizer="rowwise_adagrad"),
        start_from=tmp_path / "one",
    )
    weight, model = first.weights["tables.weight"], Run.open(tmp_path / "one").load_model()[0]
    earlier, at = storage_of(model.tables.weight).read(model.tables.weight), 0
    found = storage_of(weight).read(weight)
    for change, begin, rows in zip(row_changes(datasets[1], Run.open(tmp_path / "one").info["data"], tmp_path),
                                   model.tables.row_offsets.tolist(), datasets[1].table_rows):  # fmt: skip
        kept = torch.from_numpy(change.kept).long()
        exact = earlier[begin + kept]
        coarse = 1 / 14 * 1.01 if after == "int4" else 0
        assert ((found[at + kept] - exact).abs() <= exact.abs().amax(1, keepdim=True) * coarse).all()
        at += rows
    summary = Run.open(tmp_path / "two").summary
    assert np.isfinite(summary["test"]["log_loss"])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_runs_in_fp32_with_encoded_tables_are_quantized_after_training(generated, tmp_path, dtype):
    train(generated, tmp_path / "run", tiny(32, max_steps=40, table_dtype=dtype, optimizer="rowwise_adagrad"))
    model, _ = Run.open(tmp_path / "run").load_model()
    weight = storage_of(model.tables.weight).read(model.tables.weight)
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=8, granularity="row", clip="none"))
    packed = dqrm.load(tmp_path / "m.dqrm").tables
    values = (packed.codes.int() - 128) * packed.scale[:, None]
    assert ((values - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=4))
    assert found["largest_difference"] < 1e-5 < found["largest_difference_from_fp32"]


def test_the_learning_rate_of_a_run_that_goes_on_with_adagrads_state(generated, tmp_path):
    def rate_of(name, rule="adagrad", rate=None, **more):
        config = tiny(max_steps=2, epochs=0)
        config = replace(config, optimizer=OptimizerConfig(rule, rate))
        train(generated, tmp_path / name, config, **more)
        return Run.open(tmp_path / name).config.optimizer.rate

    first = rate_of("first")
    assert first == recipe.learning_rate("adagrad", 64)
    assert rate_of("next", start_from=tmp_path / "first") == first * 1.5
    assert rate_of("third", start_from=tmp_path / "next") == first * 1.5
    assert rate_of("given", rate=0.02, start_from=tmp_path / "first") == 0.02
    assert rate_of("layers", start_from=tmp_path / "first", carry="mlp") == first
    assert rate_of("other", "rowwise_adagrad", start_from=tmp_path / "first") == first
    assert rate_of("adam", "adam", start_from=tmp_path / "first") == recipe.learning_rate("adam", 64)
    assert rate_of("adam again", "adam", start_from=tmp_path / "adam") == recipe.learning_rate("adam", 64)
