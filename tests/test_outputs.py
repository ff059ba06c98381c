"""Pipes, devices and full disks where a file is written or read: named in one sentence, and left as they are."""

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

import dqrm
from conftest import tiny
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig
from dqrm.errors import UserError
from dqrm.export.pipeline import export_run
from dqrm.files import replacing, require_replaceable
from dqrm.serving.predict import predict
from dqrm.training import checkpoints
from dqrm.training.launch import train
from dqrm.training.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory, generated):
    folder = tmp_path_factory.mktemp("outputs")
    train(generated, folder / "run", tiny(max_steps=2))
    export_run(folder / "run", folder / "model.dqrm")
    return folder / "run"


def verbs(run, log):
    return {
        "generate": lambda output: generate(output, GenerateConfig(rows=10)),
        "export": lambda output: export_run(run, output),
        "predict": lambda output: predict(run.parent / "model.dqrm", [log], output),
    }


@pytest.mark.parametrize(("verb", "name"), [("generate", "log.txt"), ("export", "m.dqrm"), ("predict", "p.csv")])
def test_a_pipe_stays_a_pipe(run, generated, tmp_path, verb, name):
    os.mkfifo(tmp_path / name)
    link = tmp_path / f"link{Path(name).suffix}"
    link.symlink_to(tmp_path / name)
    call = verbs(run, generated.path.parent / "log.txt")[verb]
    for output in (tmp_path / name, link):
        with pytest.raises(UserError, match=r"is a pipe, expected the name of a file$"):
            call(output)
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {name, link.name}


@pytest.mark.parametrize(("output", "what"), [(os.devnull, "is a device"), (".", "is a folder"), ("-", "standard out")])
def test_what_is_no_file_is_named(output, what):
    with pytest.raises(UserError, match=what):
        require_replaceable(Path(output))
    with pytest.raises(UserError, match=what), replacing(Path(output), "busy"):
        pass


def test_generate_has_no_file_called_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"standard output \(-\)"):
        generate("-", GenerateConfig(rows=10))
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_file_means_the_file(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("old.txt")
    with replacing(tmp_path / "link.txt", "busy") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "old.txt").read_text() == "new"


def test_a_model_in_a_pipe_is_named_and_not_read(run, tmp_path):
    os.mkfifo(tmp_path / "m.dqrm")
    with pytest.raises(UserError, match=r"m.dqrm is a pipe or a device, expected a .dqrm file"):
        dqrm.load(tmp_path / "m.dqrm")
    with pytest.raises(UserError, match="is not a folder, expected a run folder"):
        Run.open(tmp_path / "m.dqrm")
    with pytest.raises(UserError, match="does not exist, expected a run folder"):
        Run.open(tmp_path / "nowhere")


def test_a_full_disk_is_named_where_a_checkpoint_is_saved(generated, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(UserError, match=r"step-\d+: the disk is full \(No space left on device\); the one before it"):
        train(generated, tmp_path / "run", tiny(max_steps=2))


def test_what_is_called_parquet_and_is_none(tmp_path):
    config = PrepareConfig(categorical=("c",))
    for content in (b"", b"label,c\n1,a\n"):
        (tmp_path / "log.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"log\.parquet does not begin as Parquet does, expected Parquet"):
            prepare(tmp_path / "log.parquet", tmp_path / "out", config)
    (tmp_path / "log.parquet").write_bytes(b"label,c\n1,a\n0,b\n")
    assert prepare(tmp_path / "log.parquet", tmp_path / "out", replace(config, delimiter=",", vocabulary="all"))
