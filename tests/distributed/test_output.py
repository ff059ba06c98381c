"""Standard output is for what was asked for: nothing that a library prints while ranks are connected goes there."""

import os
import subprocess
import sys

import pytest

from dqrm.distributed.processes import _gloo_unheard


def test_what_connecting_prints_is_not_in_standard_output(capfd):
    with _gloo_unheard():
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks\n")
        os.write(2, b"an error\n")
    print("{}", flush=True)
    with pytest.raises(RuntimeError), _gloo_unheard():
        raise RuntimeError
    os.write(1, b"and on\n")
    assert capfd.readouterr() == ("{}\nand on\n", "an error\n")


def test_connecting_without_standard_output():
    code = (
        "import os, sys; from dqrm.distributed.processes import _gloo_unheard\n"
        "os.close(1)\n"
        "with _gloo_unheard():\n    print(2, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "2\n")
