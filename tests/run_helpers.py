"""Runs that are killed and resumed, and what they must be then."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import dqrm
from conftest import tensors
from launch_helpers import newest, same_run


class Killed(Exception):
    pass


def killer(call: int) -> Callable[..., None]:
    """A progress callback that fails the whole process, as far as the run can tell, at the given call."""
    calls = 0

    def progress(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed

    return progress


def kill_often(kills: int, work: Callable[[Path], Any], folder: Path, ended: Callable[[Path], None]) -> None:
    """Start `work(folder / "N")` in one new process after the other, each killed (SIGKILL) at a random moment, until so
    many were killed and the last work has ended.

    work: can be pickled. ended: called with each folder whose work has ended; the next process has a new one.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["dqrm.daily.pipeline"])
    draw, number, left = random.Random(15), 0, kills
    longest = inf  # the first one waits for imports
    while True:
        out, began = folder / str(number), time.monotonic()
        process = context.Process(target=work, args=(out,))
        process.start()
        process.join(draw.uniform(0, longest) if number > 1 and left else None)
        if process.is_alive():
            process.kill()
            process.join()
            left -= 1
            continue
        assert process.exitcode == 0
        ended(out)
        if not left:
            return
        longest = min(longest, time.monotonic() - began)
        number += 1


def last(run: Path) -> dict[str, Any]:
    """All tensors of a run's newest checkpoint."""
    return tensors(newest(run))


def assert_resumes(
    data: dqrm.Dataset, folder: Path, config: dqrm.Config, *calls: int, callbacks: Callable[[], Any] = tuple
) -> None:
    """A run killed at these calls of its progress and resumed is bit for bit the one that was never killed.

    Leaves both in the folder, as `cut` and `whole`; `callbacks` gives new ones to each process.
    """
    dqrm.train(data, folder / "whole", config, callbacks=callbacks())
    with pytest.raises(Killed):
        dqrm.train(data, folder / "cut", config, callbacks=callbacks(), progress=killer(calls[0]))
    for call in calls[1:]:
        with pytest.raises(Killed):
            dqrm.resume(folder / "cut", callbacks=callbacks(), progress=killer(call))
    dqrm.resume(folder / "cut", callbacks=callbacks())
    same_run(folder / "whole", folder / "cut")


def command(*arguments: Any) -> list[str]:
    """The words that run `dqrm` with these arguments in a process of its own."""
    return [sys.executable, "-m", "dqrm", *map(str, arguments)]


def wait_for_checkpoint(run: Path, process: subprocess.Popen[Any], number: int) -> None:
    """Wait until the run has a checkpoint of this step or a later one; fail if the process ends without."""
    deadline, ended = time.monotonic() + 600, False
    while time.monotonic() < deadline and not ended:
        ended = process.poll() is not None  # first: it may save and end between the two
        if any(int(path.name[5:14]) >= number for path in run.glob("checkpoints/step-*")):
            return
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint {number}: exit {process.poll()}")
