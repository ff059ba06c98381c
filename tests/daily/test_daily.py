"""`dqrm daily`: days one after the other, against the same steps by hand; killed anywhere and started again."""

import json
import os
import random
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import dqrm
from conftest import tiny
from daily_helpers import DATA, days, run_days, write_day
from dqrm import Run, UserError, train
from dqrm.cli import cli
from dqrm.console import sparkline
from dqrm.daily import pipeline
from dqrm.daily.config import DailyConfig, Recipe
from dqrm.daily.days import Folder, list_days, published
from dqrm.daily.scores import measure
from dqrm.data.folder import SPLITS
from dqrm.training.metrics import click_metrics
from launch_helpers import same_tensors
from run_helpers import Killed, command, kill_often, killer

TRAIN = {
    "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
    "optimizer": {"optimizer": "adagrad", "learning_rate": 0.05},
    "training": {"batch_size": 32, "threads": 1, "device": "cpu", "patience": 2, "checkpoint_every": 3, "seed": 1},
}


def write_recipe(folder, evict_after=2, **changes):
    content = {**{name: list(v) if isinstance(v, tuple) else v for name, v in DATA.items()}, **TRAIN, **changes}
    file = folder / "daily.yaml"
    file.write_text(yaml.safe_dump({**content, "evict_after": evict_after}))
    return file


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    days(folder, 4)
    return f"{folder}/dt=*"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return Recipe.read(write_recipe(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def whole(logs, recipe, tmp_path_factory):
    """All days in one go, all kept: the folder and its lines."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, pipeline.run_daily(recipe, [logs], folder, DailyConfig(keep=10, gate_margin=None))


def without_times(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_each_day_is_what_the_same_steps_by_hand_give(logs, recipe, whole, tmp_path):
    folder, lines = whole
    assert [line["day"] for line in lines] == ["dt=1", "dt=2", "dt=3", "dt=4"]
    assert without_times(Folder(folder).done()) == without_times(lines)
    before, data = None, None
    for number, line in enumerate(lines):
        config = recipe.prepare(str(data.path) if data else None)
        source = logs.replace("*", str(number + 1))
        data = dqrm.prepare([source], tmp_path / f"data{number}", config)
        expected = None
        if before is not None:
            model, _ = before.load_model()
            seen = data.as_of(number - 1, [column["rows"] for column in before.info["data"]["columns"]])
            batches = [batch for split in SPLITS for batch in seen.split(split).batches(8192)]
            logits = np.concatenate([model(b.dense, b.ids, b.bags).detach().numpy() for b in batches])
            labels = np.concatenate([b.labels.numpy() for b in batches])
            expected = click_metrics(labels, logits)
        if expected is None:
            assert line["before"] is None
        else:
            assert line["before"] == pytest.approx(expected, rel=1e-4)
            assert line["before"]["rows"] == 300
        train(data, tmp_path / f"run{number}", recipe.train, start_from=before and before.path)
        before = Run.open(tmp_path / f"run{number}")
        same_tensors(before.path, Folder(folder).run(line["day"]))
        assert line["rows"] == data.rows
        assert line["model"] == (lines[number - 1]["day"] if number else None)
    assert lines[2]["changes"]["reused"] > 0
    assert {Run.open(Folder(folder).run(f"dt={day}")).config.training.epochs for day in (2, 3, 4)} == {1}


def test_the_published_model_is_the_newest_and_scores(whole, logs):
    folder, _ = whole
    assert (folder / "current.dqrm").read_bytes() == Folder(folder).model("dt=4").read_bytes()
    found = dqrm.evaluate(folder / "current.dqrm", Folder(folder).data("dt=4"))
    run = Run.open(Folder(folder).run("dt=4"))
    assert found["log_loss"] == pytest.approx(run.summary["test"]["log_loss"], rel=1e-5)
    assert measure(run, dqrm.Dataset(Folder(folder).data("dt=4")), ["test"]) == pytest.approx(run.summary["test"])


def test_what_is_done_is_not_done_again_and_old_days_go(logs, recipe, whole, tmp_path, monkeypatch):
    config = DailyConfig(keep=2, gate_margin=None)
    one, two = (logs.replace("*", names) for names in ("[12]", "[1-4]"))
    pipeline.run_daily(recipe, [one], tmp_path, config)
    called = []
    monkeypatch.setattr(pipeline, "train", lambda *a, **k: called.append(a[1]) or train(*a, **k))
    lines = pipeline.run_daily(recipe, [two], tmp_path, config)
    assert called == [Folder(tmp_path).run("dt=3"), Folder(tmp_path).run("dt=4")]
    assert without_times(lines) == without_times(whole[1])
    assert sorted(os.listdir(tmp_path / "days")) == ["dt=3", "dt=4"]
    assert (tmp_path / "current.dqrm").read_bytes() == (whole[0] / "current.dqrm").read_bytes()
    called.clear()
    assert without_times(pipeline.run_daily(recipe, [two], tmp_path, config)) == without_times(lines)
    assert not called
    write_day(tmp_path / "late" / "dt=0" / "part.csv", 0)
    with pytest.raises(UserError, match="dt=0 is before dt=4, which is done; days are trained in order"):
        pipeline.run_daily(recipe, [str(tmp_path / "late" / "*"), two], tmp_path, config)


class Cut:
    """Fails as a killed process does at the given call of one of the pipeline's functions, before or after it."""

    def __init__(self, monkeypatch, name, at, after):
        self.calls, self.at, self.after, self.call = 0, at, after, getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, self)

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Killed
        result = self.call(*arguments, **named)
        if self.calls == self.at:
            raise Killed
        return result


@pytest.mark.parametrize(
    ("name", "at", "after"),
    [
        ("prepare", 2, True),
        ("write_json", 1, False),
        ("train", 2, True),
        ("export_run", 2, False),
        ("measure", 2, True),
    ],
)
def test_cut_between_any_two_steps(logs, recipe, whole, tmp_path, monkeypatch, name, at, after):
    config = DailyConfig(keep=10, gate_margin=None)
    with monkeypatch.context() as patched:
        Cut(patched, name, at, after)
        with pytest.raises(Killed):
            pipeline.run_daily(recipe, [logs.replace("*", "[1-3]")], tmp_path, config)
    assert_same(pipeline.run_daily(recipe, [logs.replace("*", "[1-3]")], tmp_path, config), tmp_path, whole, 3)


@pytest.mark.parametrize("step", ["publish", "finish", "prune"])
def test_cut_while_a_day_is_finished(logs, recipe, whole, tmp_path, monkeypatch, step):
    config, real, calls = DailyConfig(keep=10, gate_margin=None), getattr(Folder, step), []

    def cut(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Folder, step, cut)
        with pytest.raises(Killed):
            pipeline.run_daily(recipe, [logs.replace("*", "[1-3]")], tmp_path, config)
    assert_same(pipeline.run_daily(recipe, [logs.replace("*", "[1-3]")], tmp_path, config), tmp_path, whole, 3)


@pytest.mark.parametrize("call", [3, 40, 90, 150])
def test_cut_within_a_step(logs, recipe, whole, tmp_path, call):
    config = DailyConfig(keep=10, gate_margin=None)
    try:
        pipeline.run_daily(recipe, [logs.replace("*", "[12]")], tmp_path, config, progress=killer(call))
    except Killed:
        assert len(Folder(tmp_path).done()) < 2
    assert_same(pipeline.run_daily(recipe, [logs.replace("*", "[12]")], tmp_path, config), tmp_path, whole, 2)


@pytest.mark.slow
def test_cut_at_twenty_random_moments(logs, recipe, whole, tmp_path):
    config, draw, cuts = DailyConfig(keep=10, gate_margin=None), random.Random(15), 0
    while True:
        try:
            lines = pipeline.run_daily(recipe, [logs], tmp_path, config, progress=killer(draw.randint(1, 20)))
            break
        except Killed:
            cuts += 1
            assert cuts < 200, "it never ends"
    assert cuts >= 20
    assert_same(lines, tmp_path, whole, 4)


def assert_same(lines, folder, whole, count):
    """The first days are those of the run that was never cut, bit for bit."""
    kept, expected = Folder(folder), Folder(whole[0])
    assert without_times(lines) == without_times(whole[1][:count])
    for line in lines:
        same_tensors(kept.run(line["day"]), expected.run(line["day"]))
        assert kept.model(line["day"]).read_bytes() == expected.model(line["day"]).read_bytes()
    assert kept.current.read_bytes() == expected.model(lines[-1]["day"]).read_bytes()


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(logs, whole, tmp_path):
    file, log = write_recipe(tmp_path), logs.replace("*", "[12]")
    kill_often(20, partial(run_days, file, log), tmp_path, lambda out: assert_same(Folder(out).done(), out, whole, 2))


@pytest.mark.slow
def test_sigkill_in_each_step(logs, whole, tmp_path):
    folder = tmp_path / "out"
    words = command(
        "daily", write_recipe(tmp_path), logs.replace("*", "[12]"), "-o", folder, "--keep", 10, "--gate-margin", "none"
    )
    for begun in ("dt=1/run/run.json", "dt=2/data*", "dt=2/model.dqrm*"):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((folder / "days").glob(begun)):
            time.sleep(0.001)
        assert process.poll() is None, begun
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "dt=2" in done.stdout
    assert_same(Folder(folder).done(), folder, whole, 2)


def test_a_worse_model_is_not_published_and_the_next_day_starts_from_the_published_one(logs, recipe, tmp_path):
    folder = tmp_path / "logs"
    days(folder, 4, rows=600)
    lines = pipeline.run_daily(recipe, [f"{folder}/dt=[12]"], tmp_path / "out", DailyConfig(gate_margin=1.0))
    real, told = pipeline.measure, []

    def judged(run, dataset, splits, *more):
        found = real(run, dataset, splits, *more)
        worse = run.path.parent.name == "dt=3" and splits != SPLITS
        return {**found, "auc": found["auc"] - 0.5} if worse else found

    pipeline.measure = judged
    try:
        lines = pipeline.run_daily(recipe, [f"{folder}/dt=*"], tmp_path / "out", DailyConfig(keep=1, gate_margin=0.1),
                                   log=told.append)  # fmt: skip
    finally:
        pipeline.measure = real
    assert [line["published"] for line in lines] == [True, True, False, True]
    assert [line["model"] for line in lines] == [None, "dt=1", "dt=2", "dt=2"]
    assert published(lines[:3]) == "dt=2"
    gate = lines[2]["gate"]
    assert (gate["metric"], gate["margin"], gate["split"], gate["passed"]) == ("auc", 0.1, "test", False)
    assert gate["new"] < gate["published"] - 0.1
    start = json.loads((Folder(tmp_path / "out").run("dt=4") / "run.json").read_text())["start"]
    assert start["run"] == str(Folder(tmp_path / "out").run("dt=2").resolve())
    assert any("Warning: the model of dt=3 is not published: auc on test is" in line for line in told)
    assert os.listdir(tmp_path / "out" / "days") == ["dt=4"]


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_models_are_judged_as_they_are_calibrated(logs, recipe, whole, tmp_path, method):
    config = DailyConfig(gate_margin=None, gate_metric="ne", calibrate=method)
    line = pipeline.run_daily(recipe, [logs.replace("*", "[12]")], tmp_path, config)[1]
    folder, found = Folder(tmp_path), {}
    for day in ("dt=1", "dt=2"):
        calibration = dqrm.Artifact.open(folder.model(day)).calibration
        assert calibration.method == method
        found[day] = measure(Run.open(folder.run(day)), dqrm.Dataset(folder.data("dt=2")), ["test"], None, calibration)
    assert (line["gate"]["published"], line["gate"]["new"]) == (found["dt=1"]["ne"], found["dt=2"]["ne"])
    same_tensors(folder.run("dt=2"), Folder(whole[0]).run("dt=2"))  # the next day starts from the run
    assert line["before"]["ne"] != whole[1][1]["before"]["ne"]
    scored = dqrm.evaluate(folder.current, folder.data("dt=2"))
    assert scored["log_loss"] == pytest.approx(found["dt=2"]["log_loss"], rel=1e-5)


def test_on_the_command_line(logs, tmp_path):
    recipe = write_recipe(tmp_path)
    words = ["daily", str(recipe), logs, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "dt=4" in result.stdout
    assert "AUC" in result.stdout
    assert any(block in result.stdout for block in "▁█")
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False).stdout)
    assert [line["day"] for line in found["days"]] == ["dt=1", "dt=2", "dt=3", "dt=4"]
    assert found["current"] == str(tmp_path / "out" / "current.dqrm")


@pytest.mark.parametrize(("change", "message"), [
    ({"extend": "data"}, "extend is 'data', but each day extends the one before; leave it out"),
    ({"optimiser": {}}, "unknown field 'optimiser'"),
    ({"training": {"epochs": 3}}, "epochs is 3, but from the second day on the callback redraw_tables would redraw"),
    ({"training": {"epoch": 3}}, "unknown field 'epoch'; did you mean 'epochs'"),
    ({"multi": ["nothing"]}, "multi has nothing, expected a column that is also in categorical"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_written(logs, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        pipeline.run_daily(Recipe.read(write_recipe(tmp_path, **change)), [logs], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logs_and_folders_that_cannot_be(logs, recipe, whole, tmp_path):
    with pytest.raises(UserError, match=r"nothing matches '.*dy=\*', expected a file or a folder for each day"):
        pipeline.run_daily(recipe, [logs.replace("dt", "dy")], tmp_path / "out")
    with pytest.raises(UserError, match=r"there is no .*dt=9, expected the log of a day"):
        list_days([logs.replace("*", "9")])
    with pytest.raises(UserError, match="have the same name, expected one file or folder for each day"):
        list_days([logs, logs])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine holds thesis.txt and no daily.json; name another folder with -o"):
        pipeline.run_daily(recipe, [logs], tmp_path / "mine")
    other = Recipe(recipe.file, {**recipe.fields, "min_count": 2}, recipe.train)
    with pytest.raises(UserError, match=r"has min_count 2, but .* was started with 1; name another folder with -o"):
        pipeline.run_daily(other, [logs], whole[0])
    other = Recipe(recipe.file, recipe.fields, tiny())
    with pytest.raises(UserError, match="was started with"):
        pipeline.run_daily(other, [logs], whole[0])
    with pytest.raises(ValueError, match="calibrate: got 'beta', expected"):
        DailyConfig(calibrate="beta")
    with pytest.raises(ValueError, match="keep is 0, expected 1 or more"):
        DailyConfig(keep=0)
    with pytest.raises(UserError, match="gate_metric: got 'auk', expected one of"):
        pipeline.run_daily(recipe, [logs], tmp_path / "out", DailyConfig(gate_metric="auk"))


def test_several_ranks_are_refused(logs, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="daily runs in one process; several ranks are for `dqrm train`, day by day"):
        pipeline.run_daily(recipe, [logs], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_days_whose_ids_are_hashed_extend_nothing_and_carry_all_rows_over(logs, tmp_path):
    recipe = Recipe.read(write_recipe(tmp_path, evict_after=None, vocabulary="hash", rows=64))
    lines = pipeline.run_daily(recipe, [logs.replace("*", "[12]")], tmp_path / "out", DailyConfig(gate_margin=None))
    assert [line["changes"] for line in lines] == [None, None]
    assert lines[1]["before"]["rows"] == 300


def test_days_are_in_natural_order(tmp_path):
    for name in ("day_10", "day_2", "day_1", "_SUCCESS"):
        (tmp_path / name).touch()
    assert list(list_days([f"{tmp_path}/*"])) == ["day_1", "day_2", "day_10"]


def test_a_curve_has_a_character_for_each_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█" or sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([0.7]) == sparkline([0.7, 0.7])[0] == "▁"
