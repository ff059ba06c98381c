"""Runs that start from another: `train(..., start_from=RUN)`."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dqrm
from conftest import tensors, tiny
from daily_helpers import days, extended, started
from dqrm import ExchangeConfig, OptimizerConfig, PrepareConfig, QATConfig, Run, UserError, recipe, resume, train
from dqrm.data.lineage import row_changes
from dqrm.quant.int8_rows import Int8Rows
from dqrm.quant.storage import copy_rows, storage_for
from launch_helpers import launched, newest, same_run, same_tensors, simulated, train_words
from run_helpers import Killed, killer


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return days(tmp_path_factory.mktemp("logs"), 4)


@pytest.fixture(scope="module")
def datasets(logs, tmp_path_factory):
    return extended(logs, tmp_path_factory.mktemp("data"))


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


def test_the_learning_rate_of_a_run_that_goes_on_with_the_optimizers_state(generated, tmp_path):
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
    dense = rate_of("dense", "dense_adam", start_from=tmp_path / "first")
    assert dense == recipe.learning_rate("dense_adam", 64)
    assert rate_of("dense again", "dense_adam", start_from=tmp_path / "dense") == dense * 2
