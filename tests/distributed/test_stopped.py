"""Real ranks that are stopped, killed and resumed, by as many or others, give what a run that nobody stopped gives."""

import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from conftest import tensors, tiny
from dqrm.config import ExchangeConfig
from dqrm.quant.config import QATConfig
from dqrm.training.launch import resume, train
from launch_helpers import (
    LONG,
    TIMEOUT,
    Launch,
    by_hand,
    flags,
    held_at,
    here,
    launched,
    lines,
    newest,
    no_traceback_of_ours,
    same_run,
    state,
    steps_saved,
    summary,
    torchrun,
    train_words,
    until,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def stopped(generated, work):
    """Two ranks: SIGTERM to torchrun; then resumed, SIGTERM to rank 1 alone; then resumed, and all of it killed.

    Returns how the processes of each launch ended, and a copy of the run folder after each.
    """
    run, said, copies = work / "stopped" / "run", [], []
    start, again = ["train", generated.path, "-o", run, *flags(**LONG)], ["train", "--resume", run]
    for launch, stop in (
        (
            lambda step: torchrun(work / "stopped", 2, *start, program=held_at(step)),
            lambda started: started.signal(signal.SIGTERM),
        ),
        (
            lambda step: by_hand(work / "stopped", again, again, program=[sys.executable, *held_at(step)]),
            lambda started: started.signal(signal.SIGTERM, rank=1),
        ),
        (lambda step: by_hand(work / "stopped", again, again, program=[sys.executable, *held_at(step)]), Launch.kill),
    ):
        step = (steps_saved(run) or [0])[-1] + 6
        with launch(step) as started:
            until(lambda: (steps_saved(run) or [0])[-1] >= step, started)  # noqa: B023
            stop(started)
            said.append(started.wait())
            deadline = time.monotonic() + TIMEOUT
            while started.pids() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not started.pids(), "ranks that outlived their launch"
        copies.append(shutil.copytree(run, work / f"stopped-{len(said)}"))
    return said, copies


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def learned(generated, work):
    """Learned scales on two simulated ranks: a run that nobody stops, and one killed at step 8 and saved at step 5."""

    def progress(_, done, __):
        if done == 8 * 64:
            raise Killed

    config = tiny(optimizer="adagrad", checkpoint_every=5, max_steps=30, threads=1)
    config = replace(config, quantization=QATConfig(quantizer="lsq"), exchange=ExchangeConfig(simulate_ranks=2))
    train(generated, work / "learned", config)
    with pytest.raises(Killed):
        train(generated, work / "learned cut", config, progress=progress)
    assert steps_saved(work / "learned cut") == [5]
    told = work / "learned cut" / "run.json"
    told.write_text(told.read_text().replace('"simulate_ranks": 2', '"simulate_ranks": 0'))
    return work / "learned", work / "learned cut"


@pytest.fixture(scope="module")
def resumed(generated, stopped, learned, work):
    """Two ranks: a run that nobody stops, the one that was killed resumed, and once more when it is finished; and the
    one of learned scales resumed."""
    killed = shutil.copytree(stopped[1][2], work / "killed")
    again = ["train", "--resume", killed]
    commands = {"whole": train_words(generated, **LONG), "killed": again, "finished": again}
    return launched(work / "resumed", 2, commands | {"learned": ["train", "--resume", learned[1]]})[0]


def test_sigterm_stops_all_ranks_at_one_step_and_saves(stopped):
    """To torchrun, which passes it on; and to one rank alone, which tells the others."""
    (to_all, to_one, killed), copies = stopped
    assert [ended.code for ended in to_all] == [1]
    assert [ended.code for ended in to_one] == [130, 130]
    assert [ended.code for ended in killed] == [-signal.SIGKILL] * 2
    for ended, copy in ((to_all, copies[0]), (to_one, copies[1])):
        no_traceback_of_ours(*ended)
        said = " ".join("".join(one.err for one in ended).split())
        assert said.count(f"`dqrm train --resume {copy.parent / 'stopped' / 'run'}` continues exactly here") == 1
        step = steps_saved(copy)[-1]
        assert 6 <= step < 135
        assert state(newest(copy))["step"] == step
        assert tensors(newest(copy))["exchange.safetensors/counters"][:, 7].tolist() == [step, step]
        assert not (copy / "summary.json").exists()
    assert steps_saved(copies[0])[-1] < steps_saved(copies[1])[-1]
    assert "dqrm:" not in to_one[1].err


def test_stopped_killed_and_resumed_is_as_if_never_stopped(resumed):
    """SIGTERM, SIGTERM to one rank and SIGKILL behind it, against the run that nobody stopped."""
    (whole, _), (run, probe) = resumed["whole"], resumed["killed"]
    same_run(whole, run)
    assert all(rank["weights"] == probe[0]["weights"] for rank in probe)
    assert 6 < min(map(int, probe[1]["weights"])) < 135  # it was resumed, and in the middle
    sent = [tensors(newest(one))["exchange.safetensors/counters"][:, 5] for one in (whole, run)]
    assert torch.equal(*sent)


def test_learned_scales_go_on_in_all_ranks(resumed, learned):
    """Those of linear layers too, which a rank that reads no checkpoint has from rank 0."""
    run, probe = resumed["learned"]
    same_run(learned[0], run)
    assert all(rank["weights"] == probe[0]["weights"] for rank in probe)
    assert min(map(int, probe[1]["weights"])) == 5


def test_a_finished_run_that_is_resumed_stays_as_it_is(resumed):
    run, probe = resumed["finished"]
    assert [rank["weights"] for rank in probe] == [{}, {}]
    assert [rank["refused"] for rank in probe] == [None, None]
    same_run(resumed["whole"][0], run)


@pytest.mark.slow
def test_resumed_by_four_what_two_had_begun(stopped, work, tmp_path):
    """The residuals of error compensation are reset, as rank 0 reports; the rest goes on as four simulated ranks."""
    grown = shutil.copytree(stopped[1][0], work / "grown")
    ran, ended = launched(work / "four", 4, {"grown": ["train", "--resume", grown]})
    run, probe = ran["grown"]
    assert ended.err.count("by 2 ranks and resumes with 4: the residuals of error compensation are reset") == 1
    assert min(map(int, probe[3]["weights"])) == steps_saved(stopped[1][0])[-1]
    assert summary(run)["exchange"]["ranks"] == 4
    assert state(newest(run))["train_rows"] == 5 * 1715
    other = shutil.copytree(stopped[1][0], tmp_path / "run")
    told = (other / "run.json").read_text()
    (other / "run.json").write_text(told.replace('"simulate_ranks": 0', '"simulate_ranks": 4'))
    said = []
    resume(other, log=said.append)
    assert sum("resumes with 4" in line for line in said) == 1
    same_run(run, other)


def test_resumed_by_one_what_two_had_begun(stopped, resumed, capsys, tmp_path):
    run = shutil.copytree(stopped[1][0], tmp_path / "run")
    said = " ".join(here(capsys, "train", "--resume", run).split())
    assert "was saved by 2 ranks and resumes with 1: the residuals of error compensation are reset" in said
    assert "exchange" not in summary(run)
    assert not (newest(run) / "exchange.safetensors").exists()
    assert (state(newest(run))["step"], state(newest(run))["train_rows"]) == (135, 5 * 1715)
    losses = [line["train_loss"] for line in lines(run, "evaluation")]
    expected = [line["train_loss"] for line in lines(resumed["whole"][0], "evaluation")]
    assert losses == pytest.approx(expected, rel=5e-3)  # one rank sends nothing: no rounding of gradients any more


@pytest.mark.parametrize("shuffle", ["global", "none"])
@pytest.mark.parametrize("batch_size", [64, 61])
@pytest.mark.parametrize("ranks", [0, 3])
def test_one_process_stopped_and_resumed_is_as_if_never_stopped(generated, tmp_path, batch_size, shuffle, ranks):
    def progress(_, done, __):
        if done == 8 * batch_size:
            raise Killed

    exchange = ExchangeConfig(ranks, "int4", table_exchange="all_to_all", mlp_codec="int4")
    config = tiny(batch_size=batch_size, shuffle=shuffle, checkpoint_every=5, log_every=3, max_steps=30)
    config = replace(config, exchange=exchange)
    train(generated, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train(generated, tmp_path / "cut", config, progress=progress)
    assert steps_saved(tmp_path / "cut") == [5]
    resume(tmp_path / "cut")
    same_run(tmp_path / "whole", tmp_path / "cut")
