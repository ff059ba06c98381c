"""What goes wrong around a run: each is one sentence, and nothing that was saved is lost."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import polars as pl
import pytest
import torch

from conftest import tensors, tiny
from dqrm.config import ModelConfig, OptimizerConfig
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.training import checkpoints
from dqrm.training.launch import resume, train
from dqrm.training.run import Run


def refused(call, *arguments):
    """The sentence with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def table(folder, columns, **config):
    """A dataset of 60 rows with the given columns."""
    pl.DataFrame({"label": [0, 1] * 30} | columns).write_parquet(folder / "log.parquet")
    return prepare([folder / "log.parquet"], folder / "data", PrepareConfig(**config))


def test_only_dense_columns(tmp_path):
    data = table(tmp_path, {"x": list(range(60))}, dense=("x",))
    summary = train(data, tmp_path / "run", tiny(epochs=1))
    assert summary["stored_bytes"]["tables"] == 0


def test_an_impossible_model_leaves_no_folder(tmp_path):
    data = table(tmp_path, {"a": list(range(60))}, categorical=("a",))
    assert "make no pair" in refused(train, data, tmp_path / "run", tiny())
    too_large = replace(tiny(), model=ModelConfig(10**9, (8, 10**9), (8, 1)))
    assert "does not fit in memory" in refused(train, data, tmp_path / "run", too_large)
    assert not (tmp_path / "run").exists()
    cat = replace(tiny(), model=ModelConfig(4, (8, 4), (8, 1), interaction="cat"))
    assert train(data, tmp_path / "run", cat)["steps"] == 2


@pytest.mark.parametrize("rate", [1e12, 1e30])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_divergence_is_said_whenever_it_is_noticed(generated, tmp_path, rate, steps):
    config = replace(tiny(max_steps=steps), optimizer=OptimizerConfig("sgd", rate))
    assert "diverged" in refused(train, generated, tmp_path / "run", config)


def test_without_validation_rows_the_last_state_is_the_result(tmp_path):
    columns = {"a": list(range(60)), "b": [1] * 60}
    data = table(tmp_path, columns, categorical=("a", "b"), validation_fraction=0.0)
    lines = []
    summary = train(data, tmp_path / "run", tiny(epochs=3), log=lines.append)
    assert summary["selection"].startswith("last state")
    assert summary["best"]["step"] == summary["steps"]
    told = [line for line in lines if not line.startswith(("Training with", "Tables in training"))]
    assert told
    assert all("validation has no rows" in line for line in told)


def test_two_processes_do_not_train_into_one_folder(generated, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=2))
    (tmp_path / "run" / "summary.json").unlink()
    with Run.open(tmp_path / "run").exclusive():
        # A lock is an open file's: a second one in this process is refused as one of another process is.
        assert "another process is training" in refused(resume, tmp_path / "run")
    assert resume(tmp_path / "run")["steps"] == 2  # and the lock is gone with its holder


def test_a_full_disk_keeps_the_checkpoint_before(generated, tmp_path, monkeypatch):
    config = tiny(checkpoint_every=5, max_steps=12)
    train(generated, tmp_path / "whole", config)
    write = checkpoints.save_file

    def full(content, path, *rest):
        if "step-000000010" in str(path) and "optimizer" in str(path):
            raise OSError(28, os.strerror(28))
        write(content, path, *rest)

    monkeypatch.setattr(checkpoints, "save_file", full)
    sentence = refused(train, generated, tmp_path / "run", config)
    assert "No space left" in sentence
    assert "step-000000010" in sentence
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000005"]
    monkeypatch.undo()
    resume(tmp_path / "run")
    one, two = (tensors(tmp_path / name / "checkpoints" / "step-000000012") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", '{"format_version": 1}', "lacks 'config'"),
        ("run.json", "[]", "format version None"),
        ("run.json", "{", "is not JSON"),
        ("state", '{"step": 3}', "lacks"),
        ("state", "not json", "is not JSON"),
        ("optimizer", "other", "holds no random state"),
    ],
)
def test_damaged_run_files(generated, tmp_path, file, content, message):
    from safetensors.torch import save_file

    train(generated, tmp_path / "run", tiny(max_steps=3))
    (tmp_path / "run" / "summary.json").unlink()
    folder = tmp_path / "run" / "checkpoints" / "step-000000003"
    if file == "optimizer":
        save_file({"x": torch.zeros(1)}, folder / "optimizer.safetensors")
    else:
        (folder / "state.json" if file == "state" else tmp_path / "run" / file).write_text(content)
    assert message in refused(partial(resume, verify=False), tmp_path / "run")


def test_a_copy_beside_the_checkpoints_is_not_taken_for_one(generated, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=3))
    (tmp_path / "run" / "summary.json").unlink()
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-000000003", folder / "step-000000099 (copy)")
    assert resume(tmp_path / "run")["steps"] == 3


def test_moved_data_is_found_by_naming_it(generated, tmp_path):
    shutil.copytree(generated.path, tmp_path / "here")
    train(Dataset(tmp_path / "here"), tmp_path / "run", tiny(max_steps=3))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert f"--resume {tmp_path / 'run'} DATA" in refused(resume, tmp_path / "run")
    assert resume(tmp_path / "run", tmp_path / "there")["steps"] == 3


def test_brackets_in_names_are_shown(tmp_path, capsys):
    from dqrm.info import print_dataset

    data = table(tmp_path, {"tags[a]": list(range(60)), "x[/b]": [1] * 60}, categorical=("tags[a]", "x[/b]"))
    print_dataset(data)
    shown = capsys.readouterr().out
    assert "tags[a]" in shown
    assert "x[/b]" in shown


def test_the_time_of_an_interrupted_stretch_counts(generated, tmp_path, monkeypatch):
    """Samples per second must not rise because a run was stopped by Ctrl-C."""
    import signal

    calls = 0

    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == 8:
            signal.raise_signal(signal.SIGINT)

    from dqrm.training.launch import Interrupted

    with pytest.raises(Interrupted):
        train(generated, tmp_path / "run", tiny(log_every=0), progress)
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["train_rows"] == 9 * 64  # the step after the signal tells the loop
    assert state["train_seconds"] > 0


def test_a_dataset_may_be_named_by_its_path(generated, tmp_path):
    assert train(str(generated.path), str(tmp_path / "run"), tiny(max_steps=1))["steps"] == 1
