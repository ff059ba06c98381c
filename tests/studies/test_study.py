"""`dqrm study` on small data: its folder, tables and failures; a study that is stopped, killed and resumed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from statistics import mean, stdev
from unittest.mock import patch

import polars as pl
import pytest

from cli_helpers import command
from conftest import tiny
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.studies.folder import Folder, Result
from dqrm.studies.plan import shipped
from dqrm.training.launch import train
from dqrm.training.metrics import METRICS
from dqrm.training.run import Run
from run_helpers import wait_for_checkpoint


def lines(folder):
    """results.csv without its times."""
    with open(folder / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "train_seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def done(generated, tmp_path_factory):
    """A study of three variants and two seeds."""
    import yaml

    from studies.conftest import VARIANTS

    folder = tmp_path_factory.mktemp("study")
    content = {"title": "Bits <b>", "base": tiny(epochs=2, eval_every=9).to_dict(), "variants": VARIANTS}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = [sys.executable, "-m", "dqrm", "study", folder / "study.yaml", generated.path, "-o", folder / "out"]
    ended = subprocess.run(
        [*map(str, arguments), "--seeds", "1,2", "--jobs", "2"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return folder, ended


def test_the_folder_of_a_study(done, generated):
    folder, ended = done
    for variant in ("FP32", "INT4"):
        for seed in (1, 2):
            run = Run.open(folder / "out" / "runs" / variant / f"seed-{seed}")
            assert run.config.training.seed == seed
            assert run.config.training.threads == 1
            assert run.config.quantization.bits == {"FP32": 32, "INT4": 4}[variant]
            run.require_same_data(generated)
            kept = [path.name for path in run.checkpoints.iterdir()]
            assert kept == [f"step-{run.summary['best']['step']:09d}"]
            run.load_model()
    opened = Folder.open(folder / "out")
    assert [each["name"] for each in opened.variants] == ["FP32", "INT4", "PTQ INT4"]
    assert (opened.baseline, opened.seeds, opened.failures, opened.title) == ("FP32", [1, 2], [], "Bits <b>")
    rows = lines(folder / "out")
    test = [row for row in rows if row["split"] == "test"]
    assert [(row["seed"], row["variant"]) for row in test] == [
        (seed, name) for seed in "12" for name in ("FP32", "INT4", "PTQ INT4")
    ]
    per_run = len([row for row in rows if (row["variant"], row["seed"], row["split"]) == ("INT4", "1", "validation")])
    metrics = (folder / "out/runs/INT4/seed-1/metrics.jsonl").read_text().splitlines()
    assert per_run == sum(json.loads(line)["kind"] == "evaluation" for line in metrics) == 6
    summary = json.loads((folder / "out/runs/INT4/seed-1/summary.json").read_text())
    assert float(test[1]["auc"]) == summary["test"]["auc"]
    assert int(test[1]["step"]) == summary["best"]["step"]
    assert re.search(r"\[6/6\] .*: test AUC 0\.\d+, epoch \d, \d+ s$", ended.stderr, re.M)
    assert re.search(r"; about \d+ s left", ended.stderr)


def test_the_tables_are_of_the_runs(done):
    folder, ended = done
    page = (folder / "out" / "results.md").read_text()
    assert page.startswith("# Bits \\<b\\>\n")
    assert "by epoch" not in page
    assert "Validation AUC after each epoch" in page
    test = [row for row in lines(folder / "out") if row["split"] == "test"]
    auc = {name: [float(row["auc"]) for row in test if row["variant"] == name] for name in ("FP32", "INT4")}
    shown = f"{mean(auc['INT4']):.4f} ± {stdev(auc['INT4']):.4f}"
    paired = [four - full for full, four in zip(auc["FP32"], auc["INT4"])]
    difference = f"{mean(paired):+.5f} ± {stdev(paired) / 2**0.5:.5f}"
    assert (
        f"| INT4 | {' '.join(row['epoch'] for row in test if row['variant'] == 'INT4')} | {shown} | {difference} |"
        in page
    )
    assert re.search(rf"^ INT4 .*{re.escape(shown)} .*{re.escape(difference)}.* [▁-█]+ *$", ended.stdout, re.M)


def test_ptq_is_that_of_dqrm_quantize(done, generated, tmp_path, capsys):
    import dqrm

    folder, _ = done
    found = Result.read(folder / "out/runs/PTQ INT4/seed-1")
    dqrm.export_run(folder / "out/runs/FP32/seed-1", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=4))
    assert found.summary["test"] == dqrm.evaluate(tmp_path / "m.dqrm", generated, "test")
    assert not list((folder / "out/runs/PTQ INT4/seed-1").glob("*.dqrm*"))


def test_the_last_checkpoint_of_a_run_that_kept_the_best_is_refused(generated, tmp_path):
    train(
        generated, tmp_path / "run", tiny(optimizer="adagrad", epochs=5, select_by="log_loss")
    )  # long enough to overfit
    run = Run.open(tmp_path / "run")
    best, steps = run.summary["best"]["step"], run.summary["steps"]
    assert best < steps
    run.load_model("last")
    run.keep_best()
    assert run.load_model()[1]["step"] == best
    with pytest.raises(UserError, match=f"no checkpoint of its last step {steps}: only the best was kept"):
        run.load_model("last")


def test_a_study_goes_on_with_more_seeds_and_keeps_what_is_there(done, generated, capsys, tmp_path):
    import shutil

    folder, _ = done
    out = shutil.copytree(folder / "out", tmp_path / "out")
    before = lines(out)
    stamp = (out / "runs/INT4/seed-1/summary.json").stat().st_mtime_ns
    arguments = ("study", folder / "study.yaml", generated.path, "-o", out)
    code, _, errors = command(capsys, *arguments)
    assert (code, "exists and is not empty; --resume continues it" in errors) == (2, True)
    code, shown, errors = command(capsys, *arguments, "--seeds", "1,2,3", "--resume", "--json")
    assert code == 0, errors
    assert (out / "runs/INT4/seed-1/summary.json").stat().st_mtime_ns == stamp
    assert lines(out)[: len(before)] == before
    result = json.loads(shown)
    assert result["variants"]["INT4"]["seeds"] == [1, 2, 3]
    assert len(result["variants"]["INT4"]["difference"]["auc"]["values"]) == 3
    assert result["variants"]["FP32"]["difference"] == {}
    code, _, errors = command(capsys, *arguments, "--seeds", "1,3", "--resume")  # nothing is left to do
    assert code == 0
    assert "runs, 1 at a time" not in errors


def test_a_failure_is_recorded_and_the_others_go_on(generated, study_file, tmp_path, capsys):
    variants = {
        "INT4": {"quantization.bits": 4},
        "diverges": {"optimizer.learning_rate": 1e30, "quantization.bits": 32},
        "from it": {"from": "diverges"},
        "PTQ of it": {"ptq": {"of": "diverges"}},
    }
    out = tmp_path / "out"
    arguments = ("study", study_file(variants=variants), generated.path, "-o", out, "--seeds", "1")
    code, shown, errors = command(capsys, *arguments)
    assert code == 1
    assert "3 runs failed" in errors
    failures = {each["variant"]: each["error"] for each in json.loads((out / "study.json").read_text())["failures"]}
    assert "training diverged" in failures["diverges"]
    assert "is not finished" in failures["from it"]
    assert "is not finished" in failures["PTQ of it"]
    assert "Failed: diverges, seed 1: training diverged" in shown
    assert "* diverges, seed 1: training diverged" in (out / "results.md").read_text()
    assert [row["variant"] for row in lines(out)] == ["INT4", "INT4"]
    assert re.search(r"^\| INT4 \| 1 \| 0\.\d+ \|", (out / "results.md").read_text(), re.M)
    # Another configuration than what was begun is a failure, not a silent mixture.
    other = study_file(variants={"INT4": {"quantization.bits": 4}, "diverges": {"optimizer.learning_rate": 0.1}})
    code, _, errors = command(capsys, "study", other, generated.path, "-o", out, "--seeds", "1", "--resume")
    assert code == 1
    assert "was started with another configuration" in errors


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_study_that_is_stopped_and_resumed_has_the_same_results(done, generated, tmp_path, capsys, number):
    """Killed, its runs end with it at once; stopped, they save a checkpoint first."""
    folder, _ = done
    out = tmp_path / "out"
    words = [sys.executable, "-m", "dqrm", "study", folder / "study.yaml", generated.path, "-o", out, "--seeds", "1,2"]
    words = [*map(str, words)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as study:
        wait_for_checkpoint(out / "runs/FP32/seed-1", study, 1)
        study.send_signal(number)
        _, errors = study.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert study.returncode == 130
        assert "--resume to continue" in errors
        assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _trains(out):
        time.sleep(0.05)
    code, _, errors = command(capsys, *words[3:], "--resume")
    assert code == 0, errors
    assert lines(out) == lines(folder / "out")


def _trains(out):
    """Whether a process holds a lock below the folder."""
    import fcntl

    for lock in out.rglob(".lock"):
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


@pytest.mark.slow
def test_a_run_that_is_killed_is_a_failure_with_its_signal(generated, study_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "dqrm", "study", study_file(variants={"a": {"training.epochs": 10_000}})]
    words += [generated.path, "-o", out, "--seeds", "1"]
    with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as study:
        wait_for_checkpoint(out / "runs/a/seed-1", study, 1)
        os.kill(_trainer(out), signal.SIGKILL)
        _, errors = study.communicate(timeout=120)
    assert study.returncode == 1
    assert "its process was killed by SIGKILL, as the system does where memory runs out" in errors


def _trainer(out):
    """The process that holds the lock on the run: of its open files the system tells."""
    from pathlib import Path

    lock = out / "runs/a/seed-1/.lock"
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if handle.resolve() == lock:
                return int(handle.parts[2])
        except OSError:
            continue
    raise AssertionError("no process holds the lock")


@patch.dict(METRICS)
def test_modules_that_a_study_names_are_imported_in_its_runs(generated, study_file, tmp_path, capsys):
    """A metric of the user's own decides which checkpoint is chosen, and is in the results."""
    (tmp_path / "metrics_of_mine.py").write_text(
        "from dqrm.training.metrics import METRICS, Metric\n"
        "METRICS['mean_logit'] = Metric(lambda scores: scores.mean(scores.logits), higher_is_better=True)\n"
    )
    file = study_file(
        variants={"own": {"training.select_by": "mean_logit"}}, seeds=[1], **{"import": ["metrics_of_mine"]}
    )
    code, _, errors = command(capsys, "study", file, generated.path, "-o", tmp_path / "out")
    assert code == 0, errors
    assert all(float(line["mean_logit"]) for line in lines(tmp_path / "out"))
    for name, said in [("nowhere", "ModuleNotFoundError"), ("broken", "ValueError: too bad")]:
        (tmp_path / "broken.py").write_text("raise ValueError('too bad')")
        code, _, errors = command(capsys, "study", study_file(**{"import": name}), generated.path, "-o", tmp_path / "x")
        assert (code, f"import: module '{name}' cannot be imported ({said}" in errors) == (2, True)


def test_data_without_figures_is_refused(study_file, tmp_path, capsys):
    log = pl.DataFrame({"label": [0, 1] * 20, "u": range(40), "v": range(40)})
    data = prepare(log, tmp_path / "data", PrepareConfig(categorical=("u", "v"), test_fraction=0.0))
    code, _, errors = command(capsys, "study", study_file(), data.path, "-o", tmp_path / "out")
    assert code == 2
    assert re.search("the test split of .* has 0 rows and 0 clicks, expected rows of both labels", errors)
    assert not (tmp_path / "out").exists()


def test_a_variant_that_this_data_cannot_train_is_refused_before_any_run(generated, study_file, tmp_path, capsys):
    file = study_file(variants={"a": {}, "b": {"training.select_by": "gauc"}})
    code, _, errors = command(capsys, "study", file, generated.path, "-o", tmp_path / "out")
    assert code == 2
    assert "variant 'b': select_by is gauc, but" in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_study_or_of_other_data_is_refused(done, bags_data, generated, tmp_path, capsys):
    folder, _ = done
    before = (folder / "out" / "study.json").read_bytes()
    code, _, errors = command(capsys, "study", "parts", generated.path, "-o", folder / "out", "--resume")
    assert (code, "holds 'study', not 'parts'; name another folder" in errors) == (2, True)
    settings = ("--set", "model.interaction=cat", "--set", "model.bottom_mlp=4")
    code, _, errors = command(
        capsys, "study", folder / "study.yaml", bags_data.path, "-o", folder / "out", "--resume", *settings
    )
    assert (code, "holds runs on other data" in errors) == (2, True)
    assert (folder / "out" / "study.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(generated, study_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for more, message in (((), "is not empty; name another folder"), (("--resume",), "holds no study.json")):
        code, _, errors = command(capsys, "study", study_file(), generated.path, "-o", tmp_path / "out", *more)
        assert code == 2
        assert message in errors
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "pretraining" else pytest.mark.slow) for name in shipped()]
)
def test_a_shipped_study_runs(name, generated, tmp_path, capsys):
    settings = ["training.max_steps=2", "model.top_mlp=8-1", "model.bottom_mlp=8-16"]
    code, shown, errors = command(
        capsys, "study", name, generated.path, "-o", tmp_path / "out", "--seeds", "1",
        *(word for each in settings for word in ("--set", each)),
    )  # fmt: skip
    assert code == 0, errors
    folder = Folder.open(tmp_path / "out")
    assert all(runs[1].summary for runs in folder.results().values())
    for each in folder.variants:
        assert f" {each['name']} " in shown
