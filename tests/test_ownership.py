"""Who owns an output: whoever is refused has written nothing, and what a kill left behind is taken over."""

import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from itertools import product

import pytest

import dqrm
from conftest import tiny
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.files import exclusive, replacing, write_json
from dqrm.studies import demo
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from selection import some_quick

pytestmark = pytest.mark.long


def refused(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_that_is_refused_by_the_lock_has_written_nothing(generated, tmp_path):
    """The other one holds the lock but has not written yet: as seen from here, the folder is still free."""
    run = tmp_path / "run"
    run.mkdir()
    with exclusive(run / ".lock", "never"):
        assert "another process is training" in refused(train, generated, run, tiny(32))
        assert set(content(run)) == set(content(run)) & {(run / ".lock").relative_to(run)}


def test_what_appears_between_looking_and_locking_is_found(generated, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = Run.plan(run, tiny(4), generated)
    second = Run.plan(run, tiny(32), generated)
    with first.started():
        before = content(run)
        assert "another process" in refused(second.started().__enter__)
        assert content(run) == before
    assert "not empty" in refused(second.started().__enter__)
    assert Run.open(run).config == tiny(4)


def test_resume_looks_again_under_the_lock(generated, tmp_path, monkeypatch):
    run = tmp_path / "run"
    whole = train(generated, run, tiny(max_steps=3))
    summary = (run / "summary.json").read_bytes()
    (run / "summary.json").unlink()
    real = Run.exclusive

    @contextmanager
    def late(self):  # who held the lock finishes the run just before it is ours
        with real(self):
            (run / "summary.json").write_bytes(summary)
            yield

    monkeypatch.setattr(Run, "exclusive", late)
    said = []
    assert resume(run, log=said.append) == whole
    assert "is finished" in said[0]

    @contextmanager
    def replaced(self):
        with real(self):
            info = json.loads((run / "run.json").read_text())
            info["config"]["training"]["seed"] = 77
            (run / "run.json").write_text(json.dumps(info))
            yield

    (run / "summary.json").unlink()
    monkeypatch.setattr(Run, "exclusive", replaced)
    assert "replaced by another run" in refused(resume, run)


@pytest.mark.parametrize(
    "left", [[], [".lock"], [".lock", "checkpoints/"], [".lock", "checkpoints/", "run.json.partial"]]
)
def test_what_a_kill_at_start_up_left_is_taken_over(generated, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir() if name.endswith("/") else (run / name).write_text("{")
    sentence = refused(resume, run)
    assert "run.json" in sentence
    assert (f"dqrm train DATA -o {run}" in sentence) == (left != [])
    assert train(generated, run, tiny(max_steps=2))["steps"] == 2


@pytest.mark.parametrize("left", ["checkpoints/step-000000004/state.json", "notes.txt", "metrics.jsonl"])
def test_a_folder_with_something_of_value_is_not_taken_over(generated, tmp_path, left):
    file = tmp_path / "run" / left
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert "not empty" in refused(train, generated, tmp_path / "run", tiny())
    assert list(content(tmp_path)) == [file.relative_to(tmp_path)]


def test_json_that_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert [(path.name, json.loads(path.read_text())) for path in tmp_path.iterdir()] == [("a.json", {"a": 1})]


def test_json_outlasts_a_power_cut(tmp_path, monkeypatch):
    """The file is flushed before it takes its name, and the folder once it has it."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(first, *rest, name=name, real=real):
            path = first if name == "replace" else os.readlink(f"/proc/self/fd/{first}")
            done.append((name, str(path)))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)
    write_json(tmp_path / "a.json", {"a": 1})
    beside = str(tmp_path / "a.json.partial")
    assert done == [("fsync", beside), ("replace", beside), ("fsync", str(tmp_path))]


def test_two_writers_of_one_file(tmp_path):
    with replacing(tmp_path / "out", "busy here") as partial:
        partial.write_text("mine")
        assert "busy here" in refused(replacing(tmp_path / "out", "busy here").__enter__)
    assert (tmp_path / "out").read_text() == "mine"
    for name in ("log.txt", "log.truth.npy"):
        with replacing(tmp_path / name, "busy") as partial:
            partial.write_text("the other one's")
            assert "another dqrm generate" in refused(generate, tmp_path / "log.txt", GenerateConfig(rows=10))
        assert {path.name: path.read_text() for path in tmp_path.glob("log*")} == {name: "the other one's"}
        (tmp_path / name).unlink()


def test_a_log_in_the_folder_that_prepare_empties_is_not_deleted(generated, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / ".dqrm-preparing").touch()  # what a killed run left; somebody put a log there
    (left / "log.txt").write_bytes((generated.path.parent / "log.txt").read_bytes())
    config = dqrm.PrepareConfig(layout="criteo-kaggle")
    assert "which is emptied" in refused(prepare, [left / "log.txt"], tmp_path / "out", config)
    assert (left / "log.txt").stat().st_size > 0


def test_the_demo_deletes_only_what_a_demo_made(tmp_path):
    (tmp_path / "log.txt").write_text("a log of mine")
    (tmp_path / "data").mkdir()
    assert "holds no demo" in refused(demo.run_demo, tmp_path)
    assert (tmp_path / "log.txt").read_text() == "a log of mine"
    own = tmp_path / "demo"
    own.mkdir()
    with exclusive(own / ".dqrm-demo", "never"):
        (own / "log.txt").write_text("the other demo's")
        assert "another dqrm demo" in refused(demo.run_demo, own)
    assert (own / "log.txt").read_text() == "the other demo's"


def test_predictions_do_not_overwrite_what_is_read(bags_data, tmp_path):
    train(bags_data, tmp_path / "run", tiny(max_steps=2))
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
    (tmp_path / "m.dqrm").rename(tmp_path / "m.csv")
    log = bags_data.path.parent / "log.parquet"
    before = (tmp_path / "m.csv").read_bytes()
    assert "would be overwritten" in refused(dqrm.predict, tmp_path / "m.csv", log, tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == before
    vocabulary = next((bags_data.path / "vocabulary").iterdir())
    config = dqrm.PredictConfig(data=str(bags_data.path))
    assert "would be overwritten" in refused(dqrm.predict, tmp_path / "m.csv", log, vocabulary, config)


@pytest.mark.parametrize("mask", [0o027, pytest.param(0o022, marks=pytest.mark.slow)])
def test_files_have_the_modes_that_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        generate(tmp_path / "log.txt", GenerateConfig(rows=600))
        prepare([tmp_path / "log.txt"], tmp_path / "data", dqrm.PrepareConfig(layout="criteo-kaggle"))
        train(tmp_path / "data", tmp_path / "run", tiny(max_steps=2))
        dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
        dqrm.export_run(tmp_path / "run", tmp_path / "m.pt2")
        for kind in ("parquet", "csv"):
            dqrm.predict(tmp_path / "m.dqrm", tmp_path / "log.txt", tmp_path / f"p.{kind}")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    wrong = {
        path.name: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong


VERBS = {
    "prepare": ("prepare", "log.txt", "-o", "out", "--layout", "criteo-kaggle"),
    "generate": ("generate", "-o", "out", "--rows", "100"),
    "train": ("train", "data", "-o", "out"),
    "export": ("export", "run", "-o", "out.dqrm"),
    "eval": ("eval", "run", "data"),
    "demo": ("demo", "-o", "shown"),
}
# Raises the signal in the middle of the verb: where it first hashes, locks or scores.
STOP = """
import os, signal, sys, threading, time
import dqrm.cli, dqrm.checksums, dqrm.files, numpy
def stop(*arguments, **named):
    os.kill(os.getpid(), signal.{name})
    while threading.current_thread() is threading.main_thread():
        time.sleep(1)
    time.sleep(1)  # of the threads that compute checksums the end of the process waits for each
    raise OSError
dqrm.checksums._hash = dqrm.checksums._hash_all = numpy.lib.format.write_array_header_1_0 = stop
sys.argv = ["dqrm", *{arguments!r}]
dqrm.cli.main()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, generated):
    folder = tmp_path_factory.mktemp("work")
    (folder / "log.txt").write_bytes((generated.path.parent / "log.txt").read_bytes())
    (folder / "data").symlink_to(generated.path)
    train(generated, folder / "run", tiny(max_steps=2))
    return folder


@pytest.mark.parametrize(
    ("verb", "name"),
    some_quick(
        ("prepare", "SIGINT"),
        ("generate", "SIGTERM"),
        ("export", "SIGTERM"),
        ("eval", "SIGINT"),
        of=product(VERBS, ["SIGINT", "SIGTERM"]),
    ),
)
def test_every_verb_answers_ctrl_c_alike(workplace, verb, name):
    before = set(workplace.iterdir())
    command = [sys.executable, "-c", STOP.format(name=name, arguments=list(VERBS[verb]))]
    ended = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 130, ended.stderr
    assert "stopped" in ended.stderr.lower()
    assert len(ended.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in ended.stderr
    assert "Aborted" not in ended.stderr
    left = {path.name for path in set(workplace.iterdir()) - before}
    assert left <= {"demo": {"shown"}, "prepare": {"out.partial"}}.get(verb, set()), left
    shutil.rmtree(workplace / "out.partial", ignore_errors=True)  # prepare would resume it
    if verb == "demo":
        assert [path.name for path in (workplace / "shown").iterdir()] == [".dqrm-demo"]
