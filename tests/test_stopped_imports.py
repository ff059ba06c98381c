"""Ctrl-C and SIGTERM while modules are imported, and what fails because of them: one sentence and exit code 130."""

import subprocess
import sys

import pytest

RUN = """
import importlib, os, signal, sys, pathlib
sys.path.insert(0, {folder!r})
import click
from dqrm.process import run_command

@click.command()
def verb():
    {body}

sys.argv = ["dqrm"]
run_command(verb, "dqrm")
"""
# A module that swallows what stops it, as packages with C extensions do, and then does not work. It prints
# its last line itself: after the import the stop comes at once on a busy machine, before anything else is printed.
SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.1)
    print('whole', flush=True)
except BaseException:
    pass
"""


def ended(folder, body):
    command = [sys.executable, "-c", RUN.format(folder=str(folder), body=body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_is_not_broken_off_but_followed_by_the_stop(tmp_path, name):
    (tmp_path / "swallows.py").write_text(SWALLOWS.format(name=name))
    body = "import swallows; import time; time.sleep(30)"
    found = ended(tmp_path, body)
    assert (found.returncode, found.stdout.strip()) == (130, "whole"), found.stderr
    assert found.stderr.strip() == "dqrm: stopped; nothing half-written is left"


def test_what_fails_because_it_was_stopped_was_stopped(tmp_path):
    """C code that calls back into Python makes another error of KeyboardInterrupt."""
    body = "\n    ".join(
        [
            "try:",
            "    os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)",
            "except BaseException:",
            "    raise ValueError('a callback failed') from None",
        ]
    )
    found = ended(tmp_path, body)
    assert (found.returncode, found.stderr.strip()) == (130, "dqrm: stopped; nothing half-written is left")
    found = ended(tmp_path, "raise ValueError('ours')")
    assert found.returncode == 1
    assert "ValueError: ours" in found.stderr
