"""`dqrm train --tables sharded` where a rank dies, hangs, or was started otherwise than the others."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from launch_helpers import by_hand, held_at, steps_saved
from nursery import IN_TIME, PATIENCE, Nursery, finish, sentences, training

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torchrec") is None, reason="the extra dqrm[torchrec] and TorchRec are not installed"
    ),
    pytest.mark.slow,
    pytest.mark.distributed,
]
# After so many seconds without an answer a rank is taken to hang.
HANGS = 6
# The rank that SIGSTOP stops, by the number of ranks.
STOPPED = {2: 0, 3: 1}


def sharded(data, run, **fields: Any) -> list[Any]:
    return training(data, run, **({"tables": "sharded", "scale_period": None} | fields))


def nursery(tmp_path_factory) -> Nursery:
    return Nursery(tmp_path_factory.mktemp("ranks"), imports="dqrm.torchrec.placement")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Nursery]:
    found = nursery(tmp_path_factory)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def hung(generated, tmp_path_factory):
    """Three runs whose ranks wait at the same time: of 2 and of 3 ranks one is stopped, and one that waits by itself.

    Returns the run folder, and how the other ranks ended, by the number of ranks, and by 'waits'.
    """
    folder, found, started = tmp_path_factory.mktemp("hung"), {}, {}
    with ExitStack() as held:
        words = sharded(generated, folder / "waits", exchange_timeout=HANGS)
        waits = held.enter_context(by_hand(folder / "log", words, words, program=[sys.executable, *held_at(10)]))
        for count, lost in STOPPED.items():
            run, some = folder / str(count), nursery(tmp_path_factory)
            held.callback(some.stop)
            some.start(*[sharded(generated, run, exchange_timeout=HANGS)] * count)
            some.until(lambda run=run: steps_saved(run))
            os.kill(some.pids[lost], signal.SIGSTOP)
            started[count] = some, lost, run
        for count, (some, lost, run) in started.items():
            ended = some.wait(but=lost)
            found[count] = run, [each for rank, each in enumerate(ended) if rank != lost]
        found["waits"] = folder / "waits", waits.wait(IN_TIME, only=[0])
    return found


@pytest.mark.parametrize("count", STOPPED)
def test_the_others_say_which_rank_does_not_answer(hung, ranks, count):
    run, ended = hung[count]
    said = sentences(ended)
    assert len(said) == count - 1
    for sentence in said:
        assert sentence.startswith(f"dqrm: rank {STOPPED[count]} died or was stopped: ")
        assert sentence.endswith("; the last checkpoint, if there is one, can be resumed")
    if count == 3:
        finish(ranks, run, 2)


def test_a_rank_hangs_whose_heartbeat_is_alive(hung):
    run, ended = hung["waits"]
    assert sentences(ended)[0].startswith(f"dqrm: rank 1 timed out after {HANGS} seconds: it hangs")
    assert steps_saved(run)


def test_rank_0_dies(ranks, generated, tmp_path):
    ranks.start(*[sharded(generated, tmp_path / "run", exchange_timeout=PATIENCE)] * 3)
    ranks.until(lambda: steps_saved(tmp_path / "run"))
    os.kill(ranks.pids[0], signal.SIGKILL)
    one, two = sentences(ranks.wait()[1:])
    assert one == two
    assert "rank 0" in one


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tables": "replicated"}, "the ranks differ in tables: rank 0 has 'sharded', rank 1 has 'replicated'"),
        ({"table_bits": 8}, "the ranks differ in table_bits: rank 0 has None, rank 1 has 8"),
        ({"table_codec": "int4"}, "the ranks differ in table_codec: rank 0 has 'int8', rank 1 has 'int4'"),
    ],
)
def test_ranks_that_were_started_otherwise_are_refused(ranks, generated, tmp_path, fields, said):
    run = tmp_path / "run"
    ranks.start(sharded(generated, run), sharded(generated, run, **fields))
    one, two = sentences(ranks.wait())
    assert one == two
    assert said in one
    assert not run.exists()


def test_one_rank_resumes_and_the_other_begins(ranks, generated, tmp_path):
    ranks.start(*[sharded(generated, tmp_path / "run", max_steps=3)] * 2)
    assert [ended.code for ended in ranks.wait()] == [0, 0]
    (tmp_path / "run" / "summary.json").unlink()
    ranks.start(["train", "--resume", tmp_path / "run"], sharded(generated, tmp_path / "new"))
    one, two = sentences(ranks.wait())
    assert one == two
    assert not (tmp_path / "new").exists()
