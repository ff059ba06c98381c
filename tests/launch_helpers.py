"""Real ranks for the tests: started by torchrun or by hand, watched with a time-out, and never left running.

Every process of a launch carries a mark in its environment, by which its workers are found (torchrun gives each a
session of its own) and killed at the end, whatever happened.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import dqrm
from conftest import tensors
from dqrm import checksums

# Seconds after which a process is taken to hang: so many that a busy machine never needs them.
TIMEOUT = 600.0
_PACKAGE = f"{Path(dqrm.__file__).parent}{os.sep}"
_PORTS = (20_000, 32_000)  # below those that Linux chooses from
_PROGRAM = str(Path(__file__).with_name("launch_programs.py"))
_MARK = "DQRM_TEST_LAUNCH"
# Of a run that is stopped or watched: so many epochs and checkpoints.
LONG = {"epochs": 5, "checkpoint_every": 3, "log_every": 5, "eval_every": 31}
_DQRM = (sys.executable, "-m", "dqrm")


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        """What dqrm said on standard error when it gave up."""
        return [line for line in self.err.splitlines() if line.startswith("dqrm: ")]

    @property
    def sentence(self) -> str:
        """The only one."""
        assert len(self.sentences) == 1, self.err
        return self.sentences[0]


class Launch:
    """Processes that run until `wait` or the end of the `with` block.

    Args:
        folder: where their output goes.
        commands: of each process, with what its environment has besides ours.
    """

    def __init__(self, folder: Path, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        self.mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"{self.mark}.{number}" for number in range(len(commands))]
        self._processes = []
        for file, (command, environment) in zip(self._files, commands):
            with open(f"{file}.out", "wb") as out, open(f"{file}.err", "wb") as err:
                self._processes.append(
                    subprocess.Popen(command, stdout=out, stderr=err, env=self._environment() | dict(environment),
                                     stdin=subprocess.DEVNULL, start_new_session=True)
                )  # fmt: skip

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _environment(self) -> dict[str, str]:
        theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in theirs}
        return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", _MARK: self.mark}

    def pids(self) -> dict[int, int]:
        """Process of each rank that runs: rank -> pid."""
        return {int(env["RANK"]): pid for pid, env in self._alive().items() if "RANK" in env}

    def _alive(self) -> dict[int, dict[str, str]]:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get(_MARK) == self.mark:
                    found[int(folder.name)] = environment
        return found

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank, or to the process that was started first (torchrun)."""
        os.kill(self._processes[0].pid if rank is None else self.pids()[rank], number)

    def wait(self, timeout: float = TIMEOUT, only: Sequence[int] | None = None) -> list[Ended]:
        """How the processes (or only these of them) ended; AssertionError if they do not in time."""
        chosen = range(len(self._processes)) if only is None else only
        deadline = time.monotonic() + timeout
        for number in chosen:
            try:
                self._processes[number].wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                said = self._ended(number).err
                raise AssertionError(f"process {number} still runs after {timeout:.0f} s; it said: {said!r}") from None
        return [self._ended(number) for number in chosen]

    def _ended(self, number: int) -> Ended:
        out, err = (Path(f"{self._files[number]}.{name}").read_text(errors="replace") for name in ("out", "err"))
        code = self._processes[number].poll()
        return Ended(-999 if code is None else code, out, err)

    def kill(self) -> None:
        """End all that still runs, workers of a torchrun that is gone included."""
        for _ in range(10):
            alive = self._alive()
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            if not alive:
                return


def torchrun(folder: Path, ranks: int, *arguments: Any, program: Sequence[str] = _DQRM[1:]) -> Launch:
    """`torchrun -m dqrm ...` with so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*launcher, f"--nproc-per-node={ranks}", *program, *map(str, arguments)]
    return Launch(folder, [(command, {})])


def held_at(step: int) -> list[str]:
    """A program as `dqrm`, but its last rank, once it saved at this step or later, waits there until it is signalled.

    So a signal finds the run in its middle, however fast the machine is and however late the signal.
    """
    return [_PROGRAM, "hold", str(step)]


def full_at(step: int, name: str) -> list[str]:
    """A program as `dqrm`, for whose checkpoint of this step the disk is full when this file of it is written."""
    return [_PROGRAM, "full", str(step), name]


def several(folder: Path, ranks: int, *commands: Sequence[Any]) -> Launch:
    """torchrun with so many ranks that run several `dqrm` commands one after the other, as one start costs seconds.

    Afterwards `probes(folder, ranks)` says what each rank did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return Launch(folder, [([*launcher, f"--nproc-per-node={ranks}", _PROGRAM, "probe", str(folder)], {})])


def probes(folder: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """For each command of `several`, per rank: 'refused', the sentence or None; 'weights', hashes by step; 'sent', a
    list of the bytes that each collective of tensors took to other ranks.
    """
    each = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return [list(ranks) for ranks in zip(*each)]


def by_hand(folder: Path, *commands: Sequence[Any], port: int = 0, program: Sequence[str] = _DQRM) -> Launch:
    """A rank per command, which is what follows `dqrm`, without torchrun."""
    port = port or free_port()
    ranks = []
    for rank, arguments in enumerate(commands):
        environment = {"RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(([*program, *map(str, arguments)], {name: str(value) for name, value in environment.items()}))
    return Launch(folder, ranks)


def alone(folder: Path, *arguments: Any) -> Launch:
    """`dqrm ...` in one process."""
    return Launch(folder, [([*_DQRM, *map(str, arguments)], {})])


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that the system gives to no connection of another test."""
    while True:
        with socket.socket() as opened, suppress(OSError):
            opened.bind(("127.0.0.1", random.randrange(*_PORTS)))
            return int(opened.getsockname()[1])


def until(condition: Callable[[], Any], launch: Launch, timeout: float = TIMEOUT) -> None:
    """Wait for a condition; AssertionError if a process ends before, or time runs out."""
    deadline = time.monotonic() + timeout
    while not condition():
        running = all(process.poll() is None for process in launch._processes)
        if not running or time.monotonic() > deadline:
            said = [launch._ended(number).err for number in range(len(launch._processes))]
            raise AssertionError(f"{'time ran out' if running else 'a process ended early'}: {said}")
        time.sleep(0.005)


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, rising."""
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-*") if path.name[5:].isdigit())


def small(**fields: Any) -> dict[str, Any]:
    """Fields of a small model's configuration, trained on one thread, with these besides."""
    known = {"embedding_dim": 4, "bottom_mlp": "8-4", "top_mlp": "8-1", "batch_size": 64, "scale_period": 3,
             "threads": 1, "device": "cpu", "eval_batch_size": 50, "optimizer": "sgd", "learning_rate": 0.1,
             "epochs": 1, "patience": 0, "callbacks": ""}  # fmt: skip
    if fields.get("scale_refresh") == "running_max":
        del known["scale_period"]
    return {name: value for name, value in (known | fields).items() if value is not None}


def flags(**fields: Any) -> list[str]:
    """`small(**fields)` as flags of the command line."""
    words = {name.replace("_", "-"): value for name, value in small(**fields).items()}
    return [f"--{word}" if value is True else f"--{word}={value}" for word, value in words.items()]


def train_words(data: Any, **fields: Any) -> list[Any]:
    """A command for `launched` that trains a small model."""
    return ["train", data.path, "-o", None, *flags(**fields)]


def launched(folder: Path, ranks: int, commands: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], Ended]:
    """`several`, by name: {name: (run folder, each rank's probe)}, and how the launch ended."""
    runs = {name: Path(words[2]) if words[1] == "--resume" else folder / name for name, words in commands.items()}
    filled = [[runs[name] if word is None else word for word in words] for name, words in commands.items()]
    with several(folder, ranks, *filled) as launch:
        (ended,) = launch.wait()
    assert ended.code == 0, ended.err
    return {name: (runs[name], probe) for name, probe in zip(commands, probes(folder, ranks))}, ended


def here(capsys: Any, *words: Any) -> str:
    """A command in this process; what it said on standard error."""
    from dqrm.cli import cli

    capsys.readouterr()
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stderr


def simulated(capsys: Any, data: Any, run: Path, ranks: int, **fields: Any) -> Path:
    """A small model trained in this process by simulated ranks: its run folder."""
    here(capsys, "train", data.path, "-o", run, *flags(simulate_ranks=ranks, **fields))
    return run


def no_traceback_of_ours(*ended: Ended) -> None:
    """torchrun prints a traceback of its own where a rank fails; none may run through dqrm's files."""
    for process in ended:
        assert f'File "{_PACKAGE}' not in process.err, process.err
        assert "terminate called" not in process.err, process.err


def lines(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, or those of one kind."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def summary(run: Path) -> dict[str, Any]:
    """The content of summary.json."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def same_tensors(one: Path, two: Path, leave_out: Sequence[str] = ()) -> None:
    """The checkpoints of two runs, step by step and bit for bit; `leave_out` names tensors that may differ.

    The exchange's counters hold times and are left out: `same_figures` compares what is reported of them.
    """
    assert steps_saved(one) == steps_saved(two)
    assert steps_saved(one)
    for step in steps_saved(one):
        a, b = (tensors(run / "checkpoints" / f"step-{step:09d}") for run in (one, two))
        assert a.keys() == b.keys()
        for name in a.keys() - {"exchange.safetensors/counters", *leave_out}:
            assert torch.equal(a[name], b[name]), f"step {step}: {name}"


def same_figures(one: Path, two: Path) -> None:
    """Everything that two runs report but times and configuration: losses, metrics, payload."""

    def without_times(line: dict[str, Any]) -> dict[str, Any]:
        exchange = {name: line.get("exchange", {}).get(name) for name in ("ranks", "payload_bytes", "payload_parts")}
        return line | {"exchange": exchange, "train_seconds": None}

    assert [without_times(line) for line in lines(one)] == [without_times(line) for line in lines(two)]
    a, b = (without_times(summary(run)) for run in (one, two))
    for name in ("best", "test", "selection", "steps", "epochs", "stored_bytes", "exchange"):
        assert a[name] == b[name], name


def newest(run: Path) -> Path:
    """The newest checkpoint of a run folder."""
    return run / "checkpoints" / f"step-{steps_saved(run)[-1]:09d}"


def state(checkpoint: Path) -> dict[str, Any]:
    """The content of its state.json."""
    found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return found


def same_run(one: Path, two: Path) -> None:
    """Two runs, of real or simulated ranks: tensors, what the ranks counted, states, and everything reported.

    Times are not compared, nor bytes sent, which a simulation does not send.
    """
    same_tensors(one, two)
    same_figures(one, two)
    for step in steps_saved(one):
        a, b = (run / "checkpoints" / f"step-{step:09d}" for run in (one, two))
        if (a / "exchange.safetensors").exists():  # of rank 0: bytes of the five parts; sent; waited; steps
            counts = [tensors(folder)["exchange.safetensors/counters"][0, [0, 1, 2, 3, 4, 7]] for folder in (a, b)]
            assert torch.equal(*counts)
        # The checksums are of files that hold times, too; what else is in them was compared above.
        times = dict.fromkeys(("train_seconds", "metrics_bytes", checksums.FILES, checksums.SEAL))
        assert state(a) | times == state(b) | times
