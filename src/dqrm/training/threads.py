"""The number of CPU threads of training and scoring where their configuration leaves it open.

Threads of one step wait for each other many times, so that beside a program that occupies one core all of torch's
threads are often ten times slower than one; and small models gain nothing from a second one. So candidates train a
small substitute of the model for a moment, or score the first batch a few times, and the fastest is taken. The bits of
a result depend on the number: it is kept for the whole run or file, and reported (run.json, the result of `predict`).
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from dqrm.data.batches import Batch
from dqrm.models.registry import build_model
from dqrm.training.environment import Log
from dqrm.training.run import Run
from dqrm.training.step import TrainStep

_SECONDS = 0.3  # of each candidate
_ROUNDS = 6
# The same of scoring, whose calls are longer and whose jobs are shorter.
_SCORING_SECONDS, _SCORING_ROUNDS = 0.1, 3
# Seconds of scoring on one thread below which measuring does not pay.
SHORT = 1.0
_ROWS = 1000  # of a table of the substitute, at most


def choose_threads(run: Run) -> int:
    """The number of threads on which this machine, as it is loaded now, trains the run's model fastest.

    That of the configuration or of OMP_NUM_THREADS where one of them is given, and torch's number where it is 1 or the
    run is not on a CPU. torch's number is the highest that is tried.
    """
    options, most = run.config.training, torch.get_num_threads()
    on_cpu = (options.device == "auto" and not torch.cuda.is_available()) or options.device.startswith("cpu")
    if (given := given_threads(options.threads, on_cpu)) is not None:
        return given
    columns = run.info["data"]["columns"]
    rows = [min(column["rows"], _ROWS) for column in columns]
    multi = [column["multi"] for column in columns]
    # Of one rank and without a state that other threads would change: only its time counts.
    config = replace(run.config, exchange=replace(run.config.exchange, simulate_ranks=0))
    with torch.random.fork_rng(devices=[]), threads_set(most):
        torch.manual_seed(0)
        batch = _batch(options.batch_size, len(run.info["data"]["dense"]), rows, multi)
        model = build_model(config, batch.dense.shape[1], rows, multi)
        step = TrainStep(model.train(), config)
        return fastest(lambda: step(batch, 0.0), candidates(most))


def given_threads(threads: int = 0, on_cpu: bool = True) -> int | None:
    """The number of threads where nothing is to be measured: `threads` unless it is 0, else torch's number where it is
    1, OMP_NUM_THREADS says so or the work is not done on a CPU. None where it has to be measured."""
    if threads:
        return threads
    most = torch.get_num_threads()
    return most if most == 1 or not on_cpu or os.environ.get("OMP_NUM_THREADS") else None


def threads_to_score(score: Callable[[], object], calls: int | None = None, threads: int = 0) -> int:
    """The number of threads on which this machine, as it is loaded now, scores fastest: at most torch's number.

    Args:
        score: scores one batch of those that are to be scored.
        calls: the total number of such batches; None: many. If one thread scores all in less time than measuring takes,
            it is used.
        threads: the configured number; 0: not configured.
    """
    if (given := given_threads(threads)) is not None:
        return given
    most = torch.get_num_threads()
    with threads_set(1):
        score()  # may compile kernels and reads pages of tables
        started = time.perf_counter()
        score()
        if calls is not None and calls * (time.perf_counter() - started) < SHORT:
            return 1
    with threads_set(most):
        return fastest(score, candidates(most), _SCORING_SECONDS, _SCORING_ROUNDS)


@contextmanager
def scoring_threads(
    score: Callable[[], object], calls: int | None = None, threads: int = 0, log: Log | None = None
) -> Iterator[int]:
    """Inside, torch uses `threads_to_score` threads, which `log` reports; afterwards, the number from before."""
    number = threads_to_score(score, calls, threads)
    tell_threads(number, log)
    with threads_set(number):
        yield number


def tell_threads(number: int, log: Log | None) -> None:
    """Report the number of threads."""
    if log:
        log(f"Scoring on {number} CPU thread{'s' * (number != 1)}.")


def candidates(most: int) -> list[int]:
    """Numbers of threads that are tried: powers of two, all, and all but one, which another program may hold."""
    return sorted({1, most - 1, most, *(2**power for power in range(most.bit_length()))} & set(range(1, most + 1)))


def fastest(
    step: Callable[[], object], numbers: list[int], measured: float | None = None, rounds: int = _ROUNDS
) -> int:
    """The number of threads that takes the most steps in a second; they alternate. measured: seconds of each."""
    steps, seconds = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0.0)
    part = (_SECONDS if measured is None else measured) / rounds
    for _ in range(rounds):
        for number in numbers:
            torch.set_num_threads(number)
            step()  # wakes the threads; not counted
            started = now = time.perf_counter()
            while now - started < part:
                step()
                steps[number], now = steps[number] + 1, time.perf_counter()
            seconds[number] += now - started
        if sum(seconds.values()) > 2 * part * rounds * len(numbers):
            break  # steps are so slow that one round takes longer than all rounds should
    return max(numbers, key=lambda number: steps[number] / seconds[number])


def _batch(size: int, dense: int, rows: Sequence[int], multi: Sequence[bool]) -> Batch:
    """A batch of `size` samples with random values, one id in each bag."""
    ids = (torch.rand(size, len(rows)) * torch.tensor(rows)).int()
    bags = tuple((ids[:, number].contiguous(), torch.arange(size)) for number, many in enumerate(multi) if many)
    single = [number for number, many in enumerate(multi) if not many]
    return Batch(torch.rand(size, dense), ids[:, single].contiguous(), bags, (torch.rand(size) < 0.5).float())


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Inside, torch uses this number of threads (0: unchanged); afterwards, the number from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
