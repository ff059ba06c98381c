"""What only shows on a bad day: a Ctrl-C while Python starts, a disk that fills under torch's own writer."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

import dqrm
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.export import program
from dqrm.export.watch import Watch


def test_ctrl_c_before_the_command_line_is_there():
    begun = "import sys; sys.argv = ['dqrm', '--help']\nimport dqrm.__main__ as m\nprint('ready', flush=True)\n"
    # What main() does first, then a start that takes its time.
    slow = "import signal, time\nsignal.signal(signal.SIGINT, m._stop)\nprint('set', flush=True)\ntime.sleep(600)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", begun + slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "set\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=600)
    assert (process.returncode, told) == (130, "dqrm: stopped; nothing half-written is left\n")


def test_importing_the_command_is_next_to_nothing():
    code = "import dqrm.__main__, sys; print(sorted({'torch', 'click', 'polars', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_pt2_on_a_full_disk_is_an_error_that_can_be_caught(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = program._Sink(Full())
    assert sink.write(b"abc") == 3  # torch's writer goes on
    assert sink.failed.errno == errno.ENOSPC


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
    time.sleep(0.02)  # the clock of a file system ticks
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
