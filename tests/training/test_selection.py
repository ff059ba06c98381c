"""Early stopping and falling learning rates say when they cannot act; the bottom MLP follows the embedding dim."""

from dataclasses import replace

import polars as pl
import pytest

from conftest import tiny
from dqrm.config import Config, ModelConfig, OptimizerConfig
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.training.launch import train
from dqrm.training.run import Run
from dqrm.training.selection import check_selection, choose, chosen_by, evaluations, stops
from dqrm.training.state import State


def table(folder, validation=0.1, labels=(0, 1)):
    count = 600 // len(labels)
    folder.mkdir()
    log = pl.DataFrame(
        {"label": list(labels) * count, "a": [n % 7 for n in range(600)], "b": [n % 5 for n in range(600)]}
    )
    log.write_parquet(folder / "log.parquet")
    config = PrepareConfig(categorical=("a", "b"), validation_fraction=validation, split="time")
    return prepare([folder / "log.parquet"], folder / "data", config)


@pytest.mark.parametrize("options", [
    {"epochs": 3}, {"epochs": 2, "eval_every": 3}, {"epochs": 2, "eval_every": 4}, {"max_steps": 5, "eval_every": 2},
    {"max_steps": 6, "eval_every": 3}, {"epochs": 2, "max_steps": 12}, {"epochs": 1, "eval_every": 100},
    {"epochs": 2, "max_steps": 9, "eval_every": 1},
])  # fmt: skip
def test_evaluations_are_counted_as_the_loop_makes_them(tmp_path, options):
    data, config = table(tmp_path / "d"), tiny(**options)
    train(data, tmp_path / "run", config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"evaluation"' in line for line in lines) == evaluations(config, data.rows["train"])


def test_early_stopping_that_cannot_act_is_told(tmp_path):
    data, lines = table(tmp_path / "d"), []
    train(data, tmp_path / "run", tiny(epochs=1, early_stopping=2), log=lines.append)
    assert lines[0].startswith("early_stopping is 2, but the run has 1 evaluation (epochs 1, eval_every 0")
    with pytest.warns(UserWarning, match="early_stopping is 2, but the run has 3 evaluations"):
        train(data, tmp_path / "other", tiny(epochs=3, early_stopping=2))
    assert check_selection(tiny(epochs=4, early_stopping=2), data) == []
    assert check_selection(tiny(epochs=1, eval_every=2, early_stopping=2), data) == []
    assert check_selection(tiny(epochs=1), data) == []
    plateau = replace(tiny(epochs=2), optimizer=OptimizerConfig("sgd", 0.1, plateau_factor=0.5))
    assert "the learning rate will not drop" in check_selection(plateau, data)[0]


def test_a_run_with_one_evaluation_more_does_stop_early(tmp_path):
    data = table(tmp_path / "d")
    config = replace(tiny(epochs=4, early_stopping=2), optimizer=OptimizerConfig("sgd", 0))
    assert check_selection(config, data) == []
    assert train(data, tmp_path / "run", config)["epochs"] == 3


def test_early_stopping_without_a_figure_is_refused(tmp_path):
    empty, constant = table(tmp_path / "a", 0.0), table(tmp_path / "b", 0.01, (0, 1, 0, 1, 0, 1))
    with pytest.raises(UserError, match=r"early_stopping is 2, but .* has no validation rows"):
        train(empty, tmp_path / "run", tiny(early_stopping=2, epochs=9))
    constant.info["clicks"]["validation"] = 0
    with pytest.raises(UserError, match=r"validation rows of .* have the label 0, so auc is not defined"):
        train(constant, tmp_path / "run", tiny(early_stopping=2, epochs=9))
    assert not (tmp_path / "run").exists()
    assert check_selection(tiny(early_stopping=2, epochs=9, select_by="log_loss"), constant) == []


def test_the_bottom_mlp_ends_in_the_embedding_dim(tmp_path):
    assert ModelConfig().bottom_mlp == (512, 256, 64, 16)
    assert ModelConfig(embedding_dim=32).bottom_mlp == (512, 256, 64, 32)
    assert ModelConfig(embedding_dim=32, interaction="cat").bottom_mlp == (512, 256, 64, 16)
    assert ModelConfig(embedding_dim=32, bottom_mlp=(8, 32)).bottom_mlp == (8, 32)
    for bad in ((8, 16), (512, 256, 64, 16)):
        with pytest.raises(ValueError, match="bottom_mlp ends in 16 but embedding_dim is 32"):
            ModelConfig(embedding_dim=32, bottom_mlp=bad)
    config = Config.load(None, {"embedding_dim": "32"})
    assert config.to_dict()["model"]["bottom_mlp"] == [512, 256, 64, 32]
    assert Config.from_dict(config.to_dict()) == config


def test_a_run_keeps_the_resolved_widths(generated, tmp_path):
    train(generated, tmp_path / "run", replace(tiny(max_steps=1), model=ModelConfig(embedding_dim=8, top_mlp=(8, 1))))
    assert Run.open(tmp_path / "run").info["config"]["model"]["bottom_mlp"] == [512, 256, 64, 8]
    assert Run.open(tmp_path / "run").load_model()[0].bottom[-2].out_features == 8


@pytest.mark.parametrize(("select_by", "values", "best", "finished_at"), [
    ("auc", [0.6, 0.7, 0.65, 0.7, 0.9], 2, 4),  # the same again is no better
    ("log_loss", [0.6, 0.5, 0.55, 0.5, 0.4], 2, 4),
    ("auc", [0.6, 0.5, 0.7, 0.6, 0.5], 3, 5),
    ("auc", [None, 0.5, None, 0.4, 0.3], 4, None),  # without a figure, the last state counts
    ("auc", [None, None], 2, None),
])  # fmt: skip
def test_the_best_evaluation_is_chosen(select_by, values, best, finished_at):
    state, config = (
        State(),
        replace(tiny(), optimizer=OptimizerConfig("sgd", 0.1, plateau_factor=0.5, plateau_patience=2)),
    )
    config = replace(config, training=replace(config.training, select_by=select_by, early_stopping=2))
    better = []
    for state.step, value in enumerate(values, start=1):
        better.append(choose(state, {select_by: value}, 0.1, config))
        state.finished = stops(state, config.training, False) is not None
        if state.finished:
            break
    assert state.step == (finished_at or len(values))
    assert state.finished == (finished_at is not None)
    assert state.best == {"step": best, "epoch": 1, "train_loss": 0.1, "metrics": {select_by: values[best - 1]}}
    assert state.rate_factor == (0.5 if finished_at else 1.0)
    assert any(better) == any(value is not None for value in values)
    assert chosen_by(state, select_by) == (
        "last state (no validation figure)" if values[best - 1] is None else f"best validation {select_by}"
    )
