"""`dqrm tune`: its file, its trials, and a search that is stopped and resumed."""

import json
import sys

import pytest
import yaml

from cli_helpers import command
from conftest import tiny
from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.studies import tune
from dqrm.studies.folder import Folder
from dqrm.studies.search import Range, read_search
from dqrm.training.run import Run

RATE = {"optimizer.learning_rate": {"log": [0.01, 1.0]}}


@pytest.fixture
def search_file(tmp_path):
    def write(**keys):
        file = tmp_path / "search.yaml"
        file.write_text(yaml.safe_dump({"base": tiny(epochs=1).to_dict(), "ranges": RATE, **keys}, sort_keys=False))
        return str(file)

    return write


def test_ranges(search_file):
    ranges = {
        **RATE,
        "optimizer.table_l2": {"uniform": [0, 1e-5]},
        "model.top_mlp": {"choice": [[8, 1], [4, 1]]},
        "optimizer.warmup_steps": {"int": [0, 9]},
    }
    search = read_search(search_file(ranges=ranges), settings=["training.batch_size=32"])
    assert search.ranges["learning_rate"] == Range("log", (0.01, 1.0))
    assert search.ranges["warmup_steps"] == Range("int", (0, 9))
    config = search.config({"learning_rate": 0.5, "top_mlp": "4-1", "warmup_steps": 3, "table_l2": 0.0})
    assert (config.optimizer.learning_rate, config.model.top_mlp, config.training.batch_size) == (0.5, (4, 1), 32)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, "ranges is {}, expected fields, each with one of uniform, log, int, choice"),
        ({"learning_rate": {"log": [1, 2]}}, "unknown field 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ({"optimizer.learning_rate": [1, 2]}, r"got \[1, 2\], expected one of uniform"),
        ({"optimizer.learning_rate": {"lin": [1, 2]}}, "got {'lin': "),
        ({"optimizer.learning_rate": {"log": [0, 1]}}, "expected two numbers above 0, the lower one first"),
        ({"optimizer.learning_rate": {"uniform": [2, 1]}}, "expected two numbers, the lower one first"),
        ({"optimizer.learning_rate": {"uniform": [1]}}, "expected the lowest and the highest value"),
        ({"optimizer.learning_rate": {"uniform": ["x", 1]}}, "got 'x', expected a number"),
        ({"optimizer.learning_rate": {"uniform": [0, float("inf")]}}, "expected two numbers"),
        ({"training.batch_size": {"uniform": [0.5, 4.5]}}, "got 0.5, expected a whole number"),
        ({"training.batch_size": {"choice": []}}, "expected a list of values"),
        ({"training.batch_size": {"choice": [8, 8]}}, "expected different values"),
        ({"quantization.bits": {"choice": [4, 5]}}, "bits is 5, expected one of"),
        ({"training.seed": {"int": [1, 5]}}, "training.seed is set by seeds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(search_file, ranges, message):
    with pytest.raises(UserError, match=message):
        read_search(search_file(ranges=ranges))


def test_without_optuna(generated, search_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, errors = command(capsys, "tune", search_file(), generated.path, "-o", tmp_path / "out", "--trials", "1")
    assert (code, errors) == (2, "dqrm: dqrm tune needs Optuna: `pip install 'dqrm[tune]'` adds it\n")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="the extra dqrm[tune] is not installed")


def test_trials_are_runs_of_a_study(optuna, generated, search_file, tmp_path, capsys):
    out = tmp_path / "out"
    ranges = {**RATE, "model.top_mlp": {"choice": [[8, 1], [4, 1]]}}
    arguments = ("tune", search_file(ranges=ranges), generated.path, "-o", out)
    code, shown, errors = command(capsys, *arguments, "--trials", "3", "--json")
    assert code == 0, errors
    folder = Folder.open(out)
    names = [each["name"] for each in folder.variants]
    assert names == ["trial-0000", "trial-0001", "trial-0002"]
    values = {}
    for each in folder.variants:
        run = Run.open(folder.run(each["name"], 1))
        assert run.config.to_dict()["optimizer"]["learning_rate"] == each["fields"]["learning_rate"]
        values[each["name"]] = run.summary["best"]["metrics"]["auc"]
    best = json.loads(shown)["best"]
    assert (best["variant"], best["value"]) == max(values.items(), key=lambda item: item[1])
    assert Config.load(out / "best.yaml") == Run.open(folder.run(best["variant"], 1)).config
    assert "What was tried:" in (out / "results.md").read_text()
    assert "trial-0002" in command(capsys, "compare", out)[1]
    assert "--resume continues it" in command(capsys, *arguments, "--trials", "4")[2]
    code, _, errors = command(capsys, *arguments, "--trials", "4", "--resume")
    assert code == 0, errors
    assert [each["name"] for each in Folder.open(out).variants] == [*names, "trial-0003"]
    fields = [str(each["fields"]) for each in Folder.open(out).variants]
    assert len(set(fields)) == 4  # the sampler of the second process does not begin again
    code, _, errors = command(capsys, "tune", search_file(), generated.path, "-o", out, "--trials", "5", "--resume")
    assert (code, "other ranges" in errors) == (2, True)
    code, _, errors = command(capsys, *arguments, "--trials", "4", "--resume", "--seed", "2")
    assert (code, "was started with seed 1" in errors) == (2, True)


def test_a_trial_that_was_cut_off_is_continued(optuna, generated, search_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ("tune", search_file(), generated.path, "-o", out, "--trials", "2")
    perform, calls = tune.perform, []

    def cut(task, *rest):
        calls.append(task.name)
        if len(calls) == 2:
            perform(task, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), *rest[1:])
        perform(task, *rest)

    monkeypatch.setattr(tune, "perform", cut)
    code, _, errors = command(capsys, *arguments)
    assert code == 130
    assert "--resume to continue" in errors
    before = Folder.open(out).variants
    code, _, errors = command(capsys, *arguments, "--resume")
    assert code == 0, errors
    assert calls == ["trial-0000", "trial-0001", "trial-0001"]
    assert Folder.open(out).variants == before
    assert Run.open(out / "runs/trial-0001/seed-1").summary is not None


def test_trials_that_fail_or_are_bad_are_ended_and_recorded(optuna, generated, search_file, tmp_path, capsys):
    out = tmp_path / "out"
    # Rates at which nothing is learned, or the loss is not finite.
    ranges = {"optimizer.learning_rate": {"choice": [0.1, 1e-9, 1e30]}}
    base = tiny(epochs=2, eval_every=5).to_dict()
    code, _, errors = command(
        capsys, "tune", search_file(ranges=ranges, base=base), generated.path, "-o", out, "--trials", "14"
    )
    assert code == 0, errors
    folder = Folder.open(out)
    rates = {each["name"]: each["fields"]["learning_rate"] for each in folder.variants}
    assert {rates[each["variant"]] for each in folder.failures} == {1e30}
    assert "training diverged" in folder.failures[0]["error"]
    pruned = [line.split(":")[0] for line in errors.splitlines() if ", pruned; " in line]
    assert pruned
    for name in pruned:
        run = Run.open(folder.run(name, 1))
        assert run.summary["epochs"] < 2
        assert run.summary["test"]
