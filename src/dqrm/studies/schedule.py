"""Runs in processes of their own, a given number at a time; see `worker` for what each of them does."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from statistics import mean

from dqrm.console import Bars
from dqrm.studies.worker import Task, child

Outcome = Callable[[Task, str | None, float], None]
"""Called with a task that has ended, why it failed (None: it did not), and its seconds."""

# What every run would import, in seconds.
_PRELOADED = [child.__module__, "torch._dynamo"]


@dataclass
class _Running:
    task: Task
    process: BaseProcess
    connection: Connection
    began: float
    outcome: tuple[str, str] | None = None


def perform_all(tasks: Sequence[Task], jobs: int, log_file: str, progress: Bars, ended: Outcome) -> None:
    """Perform the tasks in order, `jobs` at a time; one whose source is among them waits for it.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; runs have saved a checkpoint and ended.
    """
    _Schedule(list(tasks), jobs, log_file, progress, ended).run()


class _Schedule:
    """The state of `perform_all`."""

    def __init__(self, tasks: list[Task], jobs: int, log_file: str, progress: Bars, ended: Outcome) -> None:
        self.waiting, self.jobs, self.log_file = tasks, jobs, log_file
        self.progress, self.ended, self.total = progress, ended, len(tasks)
        self.running: list[_Running] = []
        self.done = 0
        # Forked from a process that has imported torch and started no thread; a fork of this one might have some.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self.context.set_forkserver_preload(_PRELOADED)
            _start_forkserver()

    def run(self) -> None:
        try:
            while self.waiting or self.running:
                self._fill()
                ready = wait([each.connection for each in self.running], timeout=1.0)
                for each in [one for one in self.running if one.connection in ready]:
                    self._hear(each)
        except BaseException:
            self._stop()
            raise

    def _fill(self) -> None:
        pending = {task.folder for task in (*self.waiting, *(each.task for each in self.running))}
        for task in [each for each in self.waiting if each.source not in pending]:
            if len(self.running) == self.jobs:
                return
            self.waiting.remove(task)
            receiver, sender = self.context.Pipe(duplex=False)
            process = self.context.Process(target=child, args=(task, self.log_file, sender), daemon=True)  # type: ignore[attr-defined]
            process.start()
            sender.close()
            self.running.append(_Running(task, process, receiver, time.monotonic()))

    def _hear(self, each: _Running) -> None:
        try:
            kind, content = each.connection.recv()
        except (EOFError, OSError):
            self._end(each)
            return
        if kind == "progress":
            stage, done, total = content
            share = f" {done / total:.0%}" if total else ""
            self.progress("runs", self.done, self.total)
            self.progress.describe(f"{each.task.name}: {stage}{share}")
        elif kind == "warning":
            self.progress.log(f"{each.task.name}: {content}")
        else:
            each.outcome = (kind, content)

    def _end(self, each: _Running) -> None:
        each.process.join()
        each.connection.close()
        self.running.remove(each)
        self.done += 1
        kind, why = each.outcome or ("failed", _killed(each.process.exitcode))
        self.ended(each.task, None if kind == "finished" else why or kind, time.monotonic() - each.began)

    def _stop(self) -> None:
        """Let each run save a checkpoint; a second Ctrl-C kills them."""
        try:
            for each in self.running:
                each.process.terminate()
            for each in self.running:
                each.process.join()
        except BaseException:
            for each in self.running:
                each.process.kill()
            raise


def _start_forkserver() -> None:
    """It takes seconds to import; a Ctrl-C in that time, which reaches all processes of a terminal, is this one's."""
    from multiprocessing.forkserver import ensure_running

    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def _killed(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
    return f"its process was killed by {known.get(-code, f'signal {-code}')}{hint}"


class Clock:
    """The time left of a study, from the runs that have ended."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.seconds: dict[str, list[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """A run of this kind took this long."""
        self.seconds.setdefault(kind, []).append(seconds)

    def left(self, kinds: Sequence[str]) -> float:
        """Seconds that runs of these kinds will take: as those of their kind did, else as all did on average."""
        known = {kind: mean(values) for kind, values in self.seconds.items()}
        every = mean(known.values()) if known else 0.0
        return sum(known.get(kind, every) for kind in kinds) / self.jobs
