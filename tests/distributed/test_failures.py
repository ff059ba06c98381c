"""What goes wrong between ranks: one dies, hangs, fails, or was started otherwise than the others.

Every rank ends in time, with one sentence that names the culprit, and what was saved can be resumed. Limits are wide:
the machine may be shared with others.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig
from launch_helpers import Ended, Launch, full_at, no_traceback_of_ours, steps_saved, torchrun, until
from nursery import HANGS, IN_TIME, PATIENCE, Nursery, finish, sentences, shorten, training

pytestmark = pytest.mark.distributed


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


@pytest.mark.slow
def test_a_disk_is_full_when_rank_0_has_a_piece_of_the_residuals_of_others(ranks, generated, tmp_path):
    run = tmp_path / "run"
    program = full_at(20, "exchange.safetensors")
    with torchrun(tmp_path / "out", 2, *training(generated, run), program=program) as launch:
        (ended,) = launch.wait(IN_TIME)
    no_traceback_of_ours(ended)
    assert len(ended.sentences) == 2
    assert sum("rank 0 ended" in sentence for sentence in ended.sentences) == 1
    assert all("No space left on device" in sentence for sentence in ended.sentences)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000010"]
    finish(ranks, run, 2)


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
