"""The queue: who shares a batch, who waits, and what an invalid request does to the others."""

import asyncio
import threading

import pytest

from dqrm.errors import UserError
from dqrm.server.batching import Batcher
from dqrm.server.errors import Refusal


class Group:
    """Doubles numbers; records its batches; waits for `gate` if there is one."""

    def __init__(self, key="a", gate=None):
        self.key, self.batches, self.gate, self.running = key, [], gate, threading.Event()

    def run(self, payloads):
        self.running.set()
        if self.gate:
            assert self.gate.wait(20)
        if -1 in payloads:
            raise UserError("got -1, expected more")
        if -2 in payloads:
            raise ZeroDivisionError
        self.batches.append(list(payloads))
        return [2 * payload for payload in payloads]


def run(work, *arguments, **named):
    batcher = Batcher(*arguments, **named)
    try:
        return asyncio.run(work(batcher))
    finally:
        batcher.close()


async def while_busy(batcher, group):
    """Submit a request that keeps the worker busy until its gate opens."""
    first = batcher.submit(group, 0, 1)
    await asyncio.get_running_loop().run_in_executor(None, group.running.wait)
    return first


def test_a_lone_request_runs_at_once_and_the_queue_is_the_next_batch():
    gate, seen = threading.Event(), []
    group = Group(gate=gate)

    async def work(batcher):
        works = [await while_busy(batcher, group)]
        works += [batcher.submit(group, number, 1) for number in range(1, 6)]
        assert batcher.rows == 5
        gate.set()
        assert [await each.future for each in works] == [0, 2, 4, 6, 8, 10]
        assert batcher.rows == 0
        assert all(each.waited >= 0 and each.took > 0 for each in works)

    run(work, 100, 100, observe=seen.append)
    assert group.batches == [[0], [1, 2, 3, 4, 5]]
    assert seen == [1, 5]


@pytest.mark.parametrize(
    ("batching", "batches"), [(True, [[0], [1, 2], [3, 4], [5]]), (False, [[0], [1], [2], [3], [4], [5]])]
)
def test_batches_have_a_size(batching, batches):
    gate = threading.Event()
    group = Group(gate=gate)

    async def work(batcher):
        works = [await while_busy(batcher, group)]
        works += [batcher.submit(group, number, 2) for number in range(1, 6)]
        gate.set()
        await asyncio.gather(*(each.future for each in works))

    run(work, 5, 100, batching)
    assert group.batches == batches


def test_groups_take_turns_and_do_not_mix():
    gate = threading.Event()
    first, second = Group("a", gate), Group("b")

    async def work(batcher):
        works = [await while_busy(batcher, first)]
        for number in range(1, 5):
            works.append(batcher.submit(first if number % 2 else second, number, 1))
        gate.set()
        assert [await each.future for each in works] == [0, 2, 4, 6, 8]

    run(work, 100, 100)
    assert first.batches == [[0], [1, 3]]
    assert second.batches == [[2, 4]]


def test_the_queue_is_bounded():
    gate = threading.Event()
    group = Group(gate=gate)

    async def work(batcher):
        first = await while_busy(batcher, group)
        waiting = batcher.submit(group, 1, 3)
        with pytest.raises(Refusal, match="3 rows wait already, of at most 4") as full:
            batcher.submit(group, 2, 2)
        assert full.value.status == 429
        with pytest.raises(Refusal, match="has 5 rows, expected at most 4") as large:
            batcher.submit(group, 2, 5)
        assert large.value.status == 413
        gate.set()
        assert await first.future == 0
        assert await waiting.future == 2
        assert await batcher.submit(group, 2, 4).future == 4

    run(work, 100, 4)


def test_an_invalid_request_fails_alone():
    gate = threading.Event()
    group = Group(gate=gate)

    async def work(batcher):
        works = [await while_busy(batcher, group)]
        works += [batcher.submit(group, number, 1) for number in (1, -1, 3)]
        gate.set()
        found = await asyncio.gather(*(each.future for each in works), return_exceptions=True)
        assert [found[0], found[1], found[3]] == [0, 2, 6]
        assert isinstance(found[2], UserError)
        with pytest.raises(ZeroDivisionError):
            await batcher.submit(group, -2, 1).future
        assert await batcher.submit(group, 4, 1).future == 8  # the worker lives on

    run(work, 100, 100)


def test_closing_finishes_what_waits():
    gate = threading.Event()
    group = Group(gate=gate)
    batcher = Batcher(100, 100)

    async def work():
        works = [await while_busy(batcher, group), batcher.submit(group, 1, 1)]
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        gate.set()
        await closing
        return [await each.future for each in works]

    assert asyncio.run(work()) == [0, 2]
