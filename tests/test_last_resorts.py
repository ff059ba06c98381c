"""What only shows on a bad day: a Ctrl-C while Python starts, a disk that fills under torch's own writer."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import dqrm
from conftest import tiny
from dqrm.artifact.watch import Watch
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from selection import slow

# The command, which sends itself SIGINT as it begins to import a module.
STOPPED_AT = """
import os, signal, sys
class Stop:
    def find_spec(name, path=None, target=None):
        if name == {imported!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop)
sys.argv = ["dqrm", *{arguments!r}]
from dqrm.__main__ import main
main()
"""


# What is imported says how far the process is: reading the command line, loading torch, the trainer.
@pytest.mark.parametrize("imported", ["click.globals", "torch.nn", *slow("torch._C", "dqrm.training.launch")])
def test_ctrl_c_while_the_command_starts(generated, tmp_path, imported):
    arguments = ["train", str(generated.path), "-o", str(tmp_path / "run")]
    code = STOPPED_AT.format(imported=imported, arguments=arguments)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert (ended.returncode, ended.stdout) == (130, ""), ended.stderr
    assert ended.stderr.strip() == "dqrm: stopped; nothing half-written is left"
    assert not (tmp_path / "run").exists()


def test_importing_the_command_is_next_to_nothing():
    code = "import dqrm.__main__, sys; print(sorted({'torch', 'click', 'polars', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.fixture(scope="module")
def artifact(generated, tmp_path_factory):
    """The packed file of a small model."""
    folder = tmp_path_factory.mktemp("artifact")
    dqrm.train(generated, folder / "run", tiny(max_steps=3))
    dqrm.export_run(folder / "run", folder / "m.dqrm")
    return folder / "m.dqrm"


def cannot_write_pt2(artifact, folder, limit=resource.RLIM_INFINITY):
    """`dqrm export` into a folder, as a process, since torch's own writer ends one that it cannot write for."""
    ended = subprocess.run(
        [sys.executable, "-m", "dqrm", "export", artifact, "-o", folder / "m.pt2"],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert os.listdir(folder) == []
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(f"dqrm: cannot write {folder / 'm.pt2'}: ")
    return sentence


# The archive does not begin, and it begins and does not end.
@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 60])
def test_a_pt2_on_a_full_disk(artifact, small_disk, kilobytes):
    assert "No space left on device" in cannot_write_pt2(artifact, small_disk(kilobytes))


def test_a_pt2_that_is_larger_than_a_file_may_be(artifact, tmp_path):
    assert "File too large" in cannot_write_pt2(artifact, tmp_path, 20_000)


def test_a_write_whose_time_was_set_back_is_seen_and_a_replacement_is_none(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"1234")
    kept = os.stat(path)
    watch = Watch(path.open("rb"), path, "the loaded model", "load it again")
    beside = tmp_path / "n"
    beside.write_bytes(b"5678")
    os.replace(beside, path)
    watch.check()  # the old one is whole
    watch = Watch(path.open("rb"), path, "the loaded model", "load it again")
    opened = os.stat(path).st_ctime_ns
    while os.stat(path).st_ctime_ns == opened:  # until the clock of the file system has ticked
        with path.open("r+b") as file:
            file.write(b"abcd")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    with pytest.raises(UserError, match="changed in place"):
        watch.check()


@pytest.mark.parametrize("precision", [40, 76])
def test_decimals_that_polars_cannot_hold_are_refused(tmp_path, precision):
    pa = pytest.importorskip("pyarrow", reason="writes what polars cannot")
    from decimal import Decimal

    import pyarrow.parquet as pq

    table = pa.table(
        {
            "label": [0, 1],
            "c": pa.array([[Decimal("1.00")], [Decimal("2.00")]], pa.list_(pa.decimal256(precision, 2))),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    config = PrepareConfig(label="label", categorical=("c",), multi=("c",))
    with pytest.raises(UserError, match=r"log\.parquet"):
        prepare(tmp_path / "log.parquet", tmp_path / "data", config)
    assert not Path(tmp_path / "data").exists()


def test_a_run_that_was_stopped_before_its_first_line(tmp_path):
    log = pl.DataFrame({"label": [0, 1] * 50, "c": list(range(100))})
    data = prepare(log, tmp_path / "data", PrepareConfig(label="label", categorical=("c",), split="none"))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".lock").touch()
    (run / "metrics.jsonl").touch()
    model = dqrm.config.ModelConfig(embedding_dim=4, top_mlp=(4, 1), interaction="cat")
    config = dqrm.Config(model=model, training=dqrm.config.TrainingConfig(max_steps=1, batch_size=8))
    assert dqrm.train(data, run, config)["steps"] == 1
