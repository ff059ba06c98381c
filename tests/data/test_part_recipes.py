"""The recipes for Slurm and Kubernetes, with stand-ins for sbatch and kubectl that run the jobs here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_helpers import content, criteo_lines, write
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import prepare

EXAMPLES = Path(__file__).parents[2] / "examples"
# Each job is run before the next one is submitted; of an array the last index first.
SBATCH = """import os, re, subprocess, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
first, last = map(int, given.get("--array", "0-0").split("-"))
for index in range(last, first - 1, -1):
    subprocess.run(["bash", "-c", given["--wrap"]], check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(index)})
print(17)
"""
KUBECTL = """import os, subprocess, sys, yaml
if sys.argv[1] == "apply":
    spec = yaml.safe_load(sys.stdin)["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    for index in range(spec["completions"]):
        subprocess.run(container["command"], check=True, env={**os.environ, "JOB_COMPLETION_INDEX": str(index)})
else:
    assert sys.argv[1:3] == ["wait", "--for=condition=complete"]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "name", "program"), [("slurm", "sbatch", SBATCH), ("kubernetes", "kubectl", KUBECTL)]
)
def test_recipe(tmp_path, recipe, name, program):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "stand_in.py").write_text(program)
    for file, what in ((name, f"'{programs / 'stand_in.py'}'"), ("dqrm", "-m dqrm")):
        (programs / file).write_text(f"#!/bin/bash\nexec '{sys.executable}' {what} \"$@\"\n")
        (programs / file).chmod(0o755)
    for day in range(3):
        write(tmp_path / f"day {day}", criteo_lines(50, seed=day))
    whole = prepare(str(tmp_path / "day*"), tmp_path / "whole", PrepareConfig(layout="criteo-terabyte"))
    log = ["day*", "-o", "out", "--layout", "criteo-terabyte"]
    ended = subprocess.run(
        ["bash", str(EXAMPLES / f"prepare_{recipe}.sh"), "2", *log],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert content(Dataset(tmp_path / "out")) == content(whole)
    assert (tmp_path / "out" / "dataset.json").read_bytes() == (tmp_path / "whole" / "dataset.json").read_bytes()
