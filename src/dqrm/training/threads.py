"""How many CPU threads a run computes on where its configuration leaves it open.

Threads of one step wait for each other many times, so that beside a program that holds one core all of torch's threads
are often ten times slower than one; and small models gain nothing by a second one in any case. So candidates train a
small stand-in of the model for a moment, and the fastest is taken. The bits of a result depend on the number: it
is written into run.json and kept for the whole run.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from dqrm.data.batches import Batch
from dqrm.models.dlrm import DLRM
from dqrm.training.run import Run
from dqrm.training.step import TrainStep

_SECONDS = 0.3  # of each candidate
_ROUNDS = 6
_ROWS = 1000  # of a table of the stand-in, at most


def choose_threads(run: Run) -> int:
    """The number of threads on which this machine, as it is loaded now, trains the run's model fastest.

    That of the configuration or of OMP_NUM_THREADS where one of them is given, and torch's number where it is 1 or the
    run is not on a CPU. torch's number is the highest that is tried.
    """
    options, most = run.config.training, torch.get_num_threads()
    if options.threads:
        return options.threads
    on_cpu = (options.device == "auto" and not torch.cuda.is_available()) or options.device.startswith("cpu")
    if most == 1 or not on_cpu or os.environ.get("OMP_NUM_THREADS"):
        return most
    columns = run.info["data"]["columns"]
    rows = [min(column["rows"], _ROWS) for column in columns]
    multi = [column["multi"] for column in columns]
    # Of one rank and without a state that other threads would change: only its time counts.
    config = replace(run.config, exchange=replace(run.config.exchange, simulate_ranks=0))
    with torch.random.fork_rng(devices=[]), threads_set(most):
        torch.manual_seed(0)
        batch = _batch(options.batch_size, len(run.info["data"]["dense"]), rows, multi)
        model = DLRM(
            batch.dense.shape[1], rows, multi=multi, config=config.model, qat=config.quantization,
            precision=options.precision,
            table_dtype=torch.bfloat16 if options.table_dtype == "bf16" else torch.float32,
        )  # fmt: skip
        step = TrainStep(model.train(), config)
        return fastest(lambda: step(batch, 0.0), candidates(most))


def candidates(most: int) -> list[int]:
    """Numbers of threads that are tried: powers of two, all, and all but one, which another program may hold."""
    return sorted({1, most - 1, most, *(2**power for power in range(most.bit_length()))} & set(range(1, most + 1)))


def fastest(step: Callable[[], object], numbers: list[int]) -> int:
    """The number of threads that takes the most steps in a second; they alternate."""
    steps, seconds = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0.0)
    for _ in range(_ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            step()  # wakes the threads; not counted
            started = now = time.perf_counter()
            while now - started < _SECONDS / _ROUNDS:
                step()
                steps[number], now = steps[number] + 1, time.perf_counter()
            seconds[number] += now - started
    return max(numbers, key=lambda number: steps[number] / seconds[number])


def _batch(size: int, dense: int, rows: Sequence[int], multi: Sequence[bool]) -> Batch:
    """So many samples with random values, one id in each bag."""
    ids = (torch.rand(size, len(rows)) * torch.tensor(rows)).int()
    bags = tuple((ids[:, number].contiguous(), torch.arange(size)) for number, many in enumerate(multi) if many)
    single = [number for number, many in enumerate(multi) if not many]
    return Batch(torch.rand(size, dense), ids[:, single].contiguous(), bags, (torch.rand(size) < 0.5).float())


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Inside, torch computes on so many threads (0: on as many as before); afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
