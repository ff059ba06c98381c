"""Ranks that fork from one process, and what the tests of failures ask of runs: commands that never end, one sentence,
resuming."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dqrm.data.dataset import Dataset
from launch_helpers import TIMEOUT, Ended, flags, free_port, no_traceback_of_ours, steps_saved

# Seconds in which ranks that were refused end, and those that are left when one died: more than a busy machine needs,
# and fewer than PATIENCE, after which they would give up in any case.
IN_TIME, PATIENCE = TIMEOUT, 3600
# After so many seconds without an answer a rank is taken to hang.
HANGS = 15
_NURSERY = """
import json, os, sys, dqrm.cli
leave, os._exit = os._exit, sys.exit
try:
    dqrm.cli.main()  # refused after everything is imported, as a rank imports it
except SystemExit:
    os._exit = leave
import {imports}
for line in sys.stdin:
    started = []
    for words, environment, file in json.loads(line):
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            for number, name in enumerate([os.devnull, file + ".out", file + ".err"]):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            sys.argv[1:] = words
            dqrm.cli.main()
            sys.exit()
        started.append(pid)
    print(json.dumps(started), flush=True)
    for _ in started:
        pid, status = os.waitpid(-1, 0)
        print(json.dumps([started.index(pid), os.waitstatus_to_exitcode(status)]), flush=True)
"""


class Nursery:
    """Ranks started by hand, and cheaply: they fork from a process in which everything is imported.

    Args:
        folder: where their output goes.
        imports: a module that they need besides.
    """

    def __init__(self, folder: Path, imports: str = "dqrm") -> None:
        self.folder, self.count, self.imports = folder, 0, imports
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *commands: Sequence[Any], port: int = 0, without: str = "", **more: Any) -> None:
        """Start a rank per command, which is what follows `dqrm`.

        Args:
            port: the ranks' MASTER_PORT; default a free one.
            without: a variable that is missing in their environment.
            more: variables in their environment besides those that connect them.
        """
        if self.process is None:
            environment = {name: value for name, value in os.environ.items() if name != "RANK"}
            environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
            program = _NURSERY.replace("{imports}", self.imports)
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "train", "data", "-o", "run"], bufsize=0, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, env=environment,
            )  # fmt: skip
        where = {"WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()} | more
        self.files = [self.folder / str(self.count + rank) for rank in range(len(commands))]
        self.count += len(commands)
        ranks = []
        for rank, words in enumerate(commands):
            variables = {"RANK": rank, "LOCAL_RANK": rank} | where
            environment = {name: str(value) for name, value in variables.items() if name != without}
            ranks.append(([str(word) for word in words], environment, str(self.files[rank])))
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ranks).encode() + b"\n")
        self.pids: list[int] = self._read(time.monotonic() + IN_TIME)

    def wait(self, timeout: float = IN_TIME, but: int | None = None) -> list[Ended]:
        """How the ranks ended, all but one that cannot: that is killed afterwards."""
        deadline, codes = time.monotonic() + timeout, {}
        while len(codes) < len(self.pids):
            if but is not None and codes.keys() == set(range(len(self.pids))) - {but}:
                os.kill(self.pids[but], signal.SIGKILL)
            rank, code = self._read(deadline)
            codes[rank] = code
        return [Ended(code, self._text(rank, "out"), self._text(rank, "err")) for rank, code in sorted(codes.items())]

    def until(self, condition: Callable[[], Any], timeout: float = IN_TIME) -> None:
        """Wait for a condition while all ranks run."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while not condition():
            ended = select.select([self.process.stdout], [], [], 0.005)[0]
            assert not ended, self._said()
            assert time.monotonic() < deadline, self._said()

    def stop(self) -> None:
        """Kill all."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def _text(self, rank: int, name: str) -> str:
        file = Path(f"{self.files[rank]}.{name}")
        return file.read_text() if file.exists() else ""

    def _said(self) -> list[str]:
        return [self._text(rank, "err") for rank in range(len(self.files))]

    def _read(self, deadline: float) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self.stop()
            raise AssertionError(f"ranks still run when time is up; they said {self._said()}")
        return json.loads(self.process.stdout.readline())


def training(data: Dataset | Path, run: Path, **fields: Any) -> list[Any]:
    """A command line that trains for hours, until something stops it, and saves every tenth step."""
    known = {"epochs": 100_000, "checkpoint_every": 10, "log_every": 0, "eval_every": 0}
    return ["train", data.path if isinstance(data, Dataset) else data, "-o", run, *flags(**(known | fields))]


_START = ("Training with ", "Tables in training: ")


def sentences(ended: Sequence[Ended]) -> list[str]:
    """What each rank said at its end: one sentence and, but for rank 0's two lines at the start, nothing else."""
    no_traceback_of_ours(*ended)
    for process in ended:
        assert process.code in (1, 2)
        said = [line for line in process.err.splitlines() if not line.startswith(_START)]
        assert "\n".join(said).strip() == process.sentence
        assert process.out == ""
    return [process.sentence for process in ended]


def finish(ranks: Nursery, run: Path, count: int = 1) -> None:
    """So many processes resume the run at its last checkpoint and end it."""
    steps = shorten(run)
    ranks.start(*[["train", "--resume", run]] * count)
    ended = ranks.wait()
    assert [each.code for each in ended] == [0] * count, [each.err for each in ended]
    assert json.loads((run / "summary.json").read_text())["steps"] == steps


def shorten(run: Path) -> int:
    """Let a run end some steps after its last checkpoint; after how many."""
    steps, told = max(steps_saved(run)) + 25, json.loads((run / "run.json").read_text())
    assert told["config"]["training"]["max_steps"] == 0
    told["config"]["training"]["max_steps"] = steps
    (run / "run.json").write_text(json.dumps(told))
    return steps
