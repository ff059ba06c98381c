"""Signals that stop a run."""

import os
import signal

import pytest

from dqrm.distributed.world import RankLost
from dqrm.training.environment import stop_signals


@pytest.fixture
def heard():
    """How many SIGTERM came through to whoever handled them before."""
    count = []
    before = signal.signal(signal.SIGTERM, lambda number, _: count.append(number))
    yield count
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_signal_stops_the_run_and_the_second_ends_it(heard):
    with stop_signals(quiet=True) as stopped:
        terminate()
        assert stopped.is_set()
        assert not heard
        terminate()
        assert len(heard) == 1


def test_handlers_are_as_before_afterwards(heard):
    with pytest.raises(ValueError, match="wrong"), stop_signals(quiet=True):
        raise ValueError("wrong")
    terminate()
    assert len(heard) == 1


@pytest.mark.parametrize("signals", [0, 1])
def test_a_rank_that_lost_another_has_time_to_say_so(heard, signals):
    """torchrun terminates it, as the other rank has ended."""

    def lose():
        with stop_signals(quiet=True):
            for _ in range(signals):
                terminate()
            raise RankLost("rank 0 ended")

    with pytest.raises(RankLost):
        lose()
    terminate()
    assert not heard
    terminate()
    assert len(heard) == 1
