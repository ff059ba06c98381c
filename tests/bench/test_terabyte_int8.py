"""The benchmark of the full Terabyte model in INT8 rows, at a thousandth of its size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dqrm.bench.config import ARCHITECTURES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "terabyte_int8.py"


@pytest.mark.slow
def test_it_trains_dies_resumes_exports_and_evaluates(tmp_path):
    options = ["-o", tmp_path / "full", "--rows-scale=0.001", "--steps=6", "--batch-size=64", "--evaluated=500"]
    done = subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    rows = sum(ARCHITECTURES["terabyte"].scaled(0.001))
    assert (found["table_rows"], found["steps"]) == (rows, 6)
    tables = rows * 66
    assert tables < found["checkpoint_bytes"]["weights.safetensors"] < tables + 4e6
    # One accumulator per row, and those of the MLP.
    assert 4 * rows < found["checkpoint_bytes"]["optimizer.safetensors"] < 4 * rows + 4e6
    assert found["artifact_bytes"] < rows * 32 + 1e6
    assert found["largest_difference"] < 1e-5
    test = found["test"]
    assert test["artifact"] == test["run"]
    assert test["run"] == {name: test["summary"][name] for name in test["run"]}
    assert set(found["stages"]) == {
        "write data", "train, killed at half", "resume", "export", "evaluate run", "evaluate artifact",
    }  # fmt: skip


def test_it_refuses_a_folder_that_exists_and_too_few_steps(tmp_path):
    for options, message in ((["-o", tmp_path], "exists"), (["-o", tmp_path / "new", "--steps=1"], "expected 2 or")):
        done = subprocess.run([sys.executable, SCRIPT, *options], check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
