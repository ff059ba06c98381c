"""Loggers receive the figures of metrics.jsonl; none can end a run, and a resumed run continues theirs."""

import json
import sys
from dataclasses import replace

import pytest

from conftest import tiny
from dqrm.errors import UserError
from dqrm.training.launch import resume, train
from dqrm.training.loggers import LOGGERS, LoggedRun, Loggers
from launch_helpers import same_figures
from run_helpers import Killed, killer


class Diary:
    """A user's own logger: one method."""

    def __init__(self):
        self.lines = []

    def log_metrics(self, metrics, step):
        self.lines.append((step, dict(metrics)))


class Broken:
    calls = 0

    def log_metrics(self, metrics, step):
        self.calls += 1
        raise ConnectionError("no route\nto the server")


def recorded(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_users_own_logger_receives_the_figures(generated, tmp_path):
    diary = Diary()
    summary = train(generated, tmp_path / "run", tiny(max_steps=4, log_every=2), loggers=[diary])
    train_lines = [(line["step"], line["loss"]) for line in recorded(tmp_path / "run") if line["kind"] == "train"]
    assert [(step, m["train/loss"]) for step, m in diary.lines if "train/loss" in m] == train_lines
    (evaluated,) = [metrics for _, metrics in diary.lines if "evaluation/auc" in metrics]
    assert evaluated["evaluation/auc"] == summary["best"]["metrics"]["auc"]
    assert diary.lines[-1] == (4, {f"test/{n}": v for n, v in summary["test"].items() if isinstance(v, float)})


def test_a_logger_that_fails_is_told_once_and_changes_nothing(generated, tmp_path, monkeypatch):
    def refuse(run):
        raise OSError("disk")

    monkeypatch.setitem(LOGGERS, "refuses", refuse)
    said, broken, diary = [], Broken(), Diary()
    config = tiny(max_steps=4, log_every=1, loggers=("refuses",))
    train(generated, tmp_path / "run", config, log=said.append, loggers=[broken, diary])
    warnings = [line for line in said if "is disabled" in line]
    assert len(warnings) == 2
    assert "refuses" in warnings[0]
    assert "no route to the server" in warnings[1]
    assert broken.calls == 1
    assert len(diary.lines) == 6
    train(generated, tmp_path / "plain", tiny(max_steps=4, log_every=1))
    same_figures(tmp_path / "run", tmp_path / "plain")


def test_what_is_no_logger_is_refused_before_any_work(generated, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"loggers: got 'tensorbord'.*tensorboard"):
        train(generated, tmp_path / "run", tiny(loggers=("tensorbord",)))
    with pytest.raises(UserError, match="got a int, expected objects with log_metrics"):
        train(generated, tmp_path / "run", tiny(), loggers=[3])
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"pip install 'dqrm\[{name}\]'"):
            train(generated, tmp_path / "run", tiny(loggers=(name,)))
    assert not (tmp_path / "run").exists()


def interrupted_and_resumed(generated, folder, name):
    """A run that is killed in its 4th step, after the checkpoint of the 2nd, and resumed, with the logger `name`."""
    config = tiny(max_steps=5, log_every=1, checkpoint_every=2, loggers=(name,))
    with pytest.raises(Killed):
        train(generated, folder, config, progress=killer(4), verify=False)
    resume(folder)


def test_mlflow_has_one_run_of_a_run_that_was_resumed(generated, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: dqrm[mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "clicks")
    store = f"file://{tmp_path}/store"
    mlflow.set_tracking_uri(store)
    interrupted_and_resumed(generated, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("clicks").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["quantization.bits"] == "4"
    losses = {line["step"]: line["loss"] for line in recorded(tmp_path / "run") if line["kind"] == "train"}
    logged = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
    assert logged == losses
    assert set(losses) == {1, 2, 3, 4, 5}


def test_weights_and_biases_offline_keeps_its_id(generated, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: dqrm[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed(generated, tmp_path / "run", "wandb")
    number = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]["id"]
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith(number) for folder in folders)


def test_a_damaged_memory_is_one_warning(tmp_path):
    (tmp_path / "loggers.json").write_text("{")
    said = []
    Loggers(["it"], [], LoggedRun(tmp_path, {}, 0), said.append)  # not registered: as a name that left the register
    make = LOGGERS | {"it": lambda run: run.recall("it")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqrm.training.loggers.LOGGERS", make)
        Loggers(["it"], [], LoggedRun(tmp_path, {}, 2), said.append)
    assert len(said) == 2
    assert "is not JSON" in said[1]


def test_the_flag_of_tensorboard_is_the_logger(generated, tmp_path):
    config = tiny(max_steps=2)
    config = replace(config, training=replace(config.training, tensorboard=True, loggers=("tensorboard",)))
    train(generated, tmp_path / "run", config)
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1
