"""What goes wrong between ranks: one dies, hangs, fails, or was started otherwise than the others.

Every rank ends in time, with one sentence that names the culprit, and what was saved can be resumed. Limits are wide:
the machine may be shared with others.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig
from launch_helpers import TIMEOUT, Ended, Launch, flags, free_port, no_traceback_of_ours, steps_saved, torchrun, until

pytestmark = pytest.mark.distributed
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
    """Ranks started by hand, and cheaply: they fork from a process in which everything is imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
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
            self.process = subprocess.Popen(
                [sys.executable, "-c", _NURSERY, "train", "data", "-o", "run"], bufsize=0, stdin=subprocess.PIPE,
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Nursery]:
    found = Nursery(tmp_path_factory.mktemp("ranks"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    generate(folder / "log.txt", GenerateConfig(rows=2000, seed=77))
    return prepare([folder / "log.txt"], folder / "data", PrepareConfig(layout="criteo-kaggle"))


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


def finish(ranks: Nursery, run: Path) -> None:
    """One process resumes the run at its last checkpoint and ends it."""
    steps = shorten(run)
    ranks.start(["train", "--resume", run], WORLD_SIZE=1)
    (ended,) = ranks.wait()
    assert ended.code == 0, ended.err
    assert json.loads((run / "summary.json").read_text())["steps"] == steps


def shorten(run: Path) -> int:
    """Let a run end some steps after its last checkpoint; after how many."""
    steps, told = max(steps_saved(run)) + 25, json.loads((run / "run.json").read_text())
    assert told["config"]["training"]["max_steps"] == 0
    told["config"]["training"]["max_steps"] = steps
    (run / "run.json").write_text(json.dumps(told))
    return steps


# What does not fit together is refused at start.


def refusals(data, other, folder: Path) -> dict[str, tuple[list[Any], list[Any], list[str]]]:
    """Commands of rank 0 and rank 1, and what both must say."""
    plain, full = training(data, folder / "run"), folder / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")

    def both(*words: str, **fields: Any) -> tuple[list[Any], list[Any], list[str]]:
        return training(data, folder / "run", **fields), training(data, folder / "run", **fields), list(words)

    return {
        "data": (plain, training(other, folder / "run"), ["fingerprint", "rank 1", data.fingerprint]),
        "rate": (plain, training(data, folder / "run", learning_rate=0.25), ["learning_rate", "rank 1", "0.25"]),
        "codec": (plain, training(data, folder / "run", mlp_codec="int4"), ["mlp_codec", "rank 1", "int4", "int8"]),
        "patience": (training(data, folder / "run", exchange_timeout=9), plain, ["exchange_timeout", "9", "rank 1"]),
        "no data": (plain, training(folder / "nowhere", folder / "run"), ["rank 1", str(folder / "nowhere")]),
        "no data anywhere": (*[training(folder / "nowhere", folder / "run")] * 2, [str(folder / "nowhere")]),
        "no config file": (plain, [*plain, "--config", folder / "no.yaml"], ["rank 1", str(folder / "no.yaml")]),
        "small batch": both("2 ranks", "batch_size", "1", batch_size=1),
        "simulated": both("simulate_ranks", "2 real ranks", simulate_ranks=2),
        "activations": both("activation_bits", "8", activation_bits=8),
        "folder in use": (*[training(data, full)] * 2, [str(full), "not empty"]),
        "no run": (*[["train", "--resume", full]] * 2, [str(full), "run.json"]),
        "no such run": (*[["train", "--resume", folder / "nowhere"]] * 2, [str(folder / "nowhere"), "does not exist"]),
        "no configuration": both("learning_rate", "-1", learning_rate=-1),
        "no run on one": (plain, ["train", "--resume", full], ["rank 1"]),
    }


@pytest.mark.parametrize("case", [
    "data", "rate", "codec", "patience", "no data", "no data anywhere", "no config file", "small batch", "simulated",
    "activations", "folder in use", "no run", "no such run", "no configuration", "no run on one",
])  # fmt: skip
def test_refused_at_start_on_every_rank(ranks, generated, other_data, tmp_path, case):
    *commands, words = refusals(generated, other_data, tmp_path)[case]
    ranks.start(*commands)
    one, two = sentences(ranks.wait())
    assert one == two
    for word in words:
        assert word in one
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_resumed_by_one_rank_and_begun_by_the_other(ranks, generated, tmp_path):
    ranks.start(training(generated, tmp_path / "run", max_steps=3), WORLD_SIZE=1)
    assert ranks.wait()[0].code == 0
    (tmp_path / "run" / "summary.json").unlink()
    ranks.start(["train", "--resume", tmp_path / "run"], training(generated, tmp_path / "new"))
    one, two = sentences(ranks.wait())
    assert one == two
    assert not (tmp_path / "new").exists()


def test_without_rank_in_the_environment(ranks, generated, tmp_path):
    ranks.start(*[training(generated, tmp_path / "run")] * 2, without="RANK")
    for sentence in sentences(ranks.wait()):
        assert "RANK is not set" in sentence
        assert "torchrun" in sentence


def test_a_port_in_use(ranks, generated, tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        ranks.start(*[training(generated, tmp_path / "run", exchange_timeout=3)] * 2, port=port)
        one, two = sentences(ranks.wait())
    assert f"127.0.0.1:{port} is in use" in one
    assert f"127.0.0.1:{port}" in two


def test_a_rank_that_was_never_started(ranks, generated, tmp_path):
    ranks.start(training(generated, tmp_path / "run", exchange_timeout=3), WORLD_SIZE=2)
    [sentence] = sentences(ranks.wait())
    assert "rank 0 of 2" in sentence
    assert "were all ranks started?" in sentence


def test_torchrun_shows_a_refusal_of_every_rank(generated, tmp_path):
    with torchrun(tmp_path / "out", 2, *training(generated, tmp_path / "run", batch_size=1)) as launch:
        (ended,) = launch.wait()
    assert ended.code == 1
    no_traceback_of_ours(ended)
    assert len(ended.sentences) == 2
    assert all("2 ranks share a batch of 1" in sentence for sentence in ended.sentences)


# A rank that ends with an error of its own takes the others along.


@pytest.mark.parametrize(("rate", "steps"), [(1e12, 1), (1e30, 3), (1e30, 200)])
def test_divergence_is_said_by_all(ranks, generated, tmp_path, rate, steps):
    ranks.start(*[training(generated, tmp_path / "run", learning_rate=rate, max_steps=steps)] * 2)
    one, two = sentences(ranks.wait())
    assert one == two
    assert "diverged" in one
    assert not steps_saved(tmp_path / "run")


def spoil(run: Path) -> None:
    """From now on nothing can be written to the run's checkpoints (root may write where it may not)."""
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").write_text("")


def test_rank_0_cannot_save(ranks, generated, tmp_path):
    run = tmp_path / "run"
    ranks.start(*[training(generated, run)] * 3)
    ranks.until(lambda: steps_saved(run))
    spoil(run)
    ended = ranks.wait()
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")
    finish(ranks, run)
    first, *others = sentences(ended)
    assert "cannot save the checkpoint" in first
    assert str(run) in first
    for sentence in others:
        assert "rank 0" in sentence
        assert "cannot save the checkpoint" in sentence


@pytest.mark.slow
def test_rank_0_cannot_save_under_torchrun(generated, tmp_path):
    run = tmp_path / "run"
    with torchrun(tmp_path / "out", 2, *training(generated, run)) as launch:
        until(lambda: steps_saved(run), launch)
        spoil(run)
        (ended,) = launch.wait(IN_TIME)
    no_traceback_of_ours(ended)
    assert len(ended.sentences) == 2
    assert sum("rank 0 ended" in sentence for sentence in ended.sentences) == 1
    assert all("cannot save the checkpoint" in sentence for sentence in ended.sentences)


# A rank dies or hangs.


def others_gone(launch: Launch, lost: int) -> str:
    """Wait until only the lost rank is left, if any; what was said."""
    deadline = time.monotonic() + IN_TIME
    while set(launch.pids()) - {lost}:
        assert time.monotonic() < deadline, launch._ended(0).err
        time.sleep(0.1)
    return launch._ended(0).err


def test_a_rank_dies_under_torchrun(generated, tmp_path):
    run = tmp_path / "run"
    with torchrun(tmp_path / "out", 3, *training(generated, run)) as launch:
        until(lambda: steps_saved(run), launch)
        launch.signal(signal.SIGKILL, 1)
        others_gone(launch, 1)
        (ended,) = launch.wait()
    no_traceback_of_ours(ended)
    assert len(ended.sentences) == 2
    assert all("rank 1 died" in sentence for sentence in ended.sentences)
    steps = shorten(run)
    with torchrun(tmp_path / "out", 2, "train", "--resume", run) as launch:
        (resumed,) = launch.wait()
    assert resumed.code == 0, resumed.err
    assert json.loads((run / "summary.json").read_text())["steps"] == steps
    # torchrun tells the others by SIGTERM; nobody asked for it, and nothing is saved.
    assert "saving" not in ended.err


@pytest.mark.slow
def test_a_rank_hangs_under_torchrun(ranks, generated, tmp_path):
    run = tmp_path / "run"
    with torchrun(tmp_path / "out", 2, *training(generated, run, exchange_timeout=HANGS)) as launch:
        until(lambda: steps_saved(run), launch)
        launch.signal(signal.SIGSTOP, 0)
        ended = Ended(0, "", others_gone(launch, 0))  # torchrun itself waits 30 seconds for it
    no_traceback_of_ours(ended)
    assert "rank 0 died or was stopped" in ended.sentence
    finish(ranks, run)


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        (signal.SIGSTOP, 2),
    ],
)
def test_a_rank_that_was_started_by_hand_dies_or_hangs(ranks, generated, tmp_path, number, lost):
    run, hangs = tmp_path / "run", number == signal.SIGSTOP
    ranks.start(*[training(generated, run, exchange_timeout=HANGS if hangs else PATIENCE)] * 3)
    ranks.until(lambda: steps_saved(run))
    os.kill(ranks.pids[lost], number)
    ended = ranks.wait(but=lost if hangs else None)
    for sentence in sentences([process for rank, process in enumerate(ended) if rank != lost]):
        assert f"rank {lost}" in sentence
