"""The number of threads of a run: chosen by what is fast now, recorded, and kept when the run is resumed."""

import json
from pathlib import Path

import pytest
import torch

from conftest import tensors, tiny
from dqrm.training import launch, threads
from dqrm.training.launch import resume, train


@pytest.fixture(autouse=True)
def _torch_on_three(monkeypatch):
    """torch's default is three threads, which nobody limits from outside; choosing takes a moment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_SECONDS", 0.006)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def recorded(run: Path) -> int:
    return json.loads((run / "run.json").read_text())["threads"]


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_number_that_takes_most_steps_in_a_second_is_taken(monkeypatch, best):
    """By a clock that runs as the number of threads says."""
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += 0.001 * (1 + abs(torch.get_num_threads() - best))

    with threads.threads_set(3):
        assert threads.fastest(step, threads.candidates(3)) == best


@pytest.mark.parametrize(
    ("most", "tried"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (6, [1, 2, 4, 5, 6]), (16, [1, 2, 4, 8, 15, 16])]
)
def test_what_is_tried(most, tried):
    assert threads.candidates(most) == tried


def test_a_run_records_the_number_and_is_resumed_with_it(generated, bags_data, tmp_path, monkeypatch):
    used = []

    class Killed(Exception):
        pass

    def progress(_, done, __):
        used.append(torch.get_num_threads())
        if done >= 3 * 64:
            raise Killed

    for number, data in ((2, generated), (1, bags_data)):
        run = tmp_path / str(number)
        monkeypatch.setattr(threads, "fastest", lambda step, numbers, number=number: (step(), number)[1])
        with pytest.raises(Killed):
            train(data, run, tiny(checkpoint_every=1, max_steps=9), progress=progress)
        assert recorded(run) == number
        monkeypatch.setattr(threads, "fastest", lambda *_: pytest.fail("resumed runs keep their number"))
        resume(run, progress=lambda *_: used.append(torch.get_num_threads()))
        assert set(used) == {number}
        used.clear()


def test_a_run_of_an_older_version_is_resumed_on_the_default(generated, tmp_path):
    train(generated, tmp_path / "run", tiny(max_steps=3))
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    del told["threads"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    (tmp_path / "run" / "summary.json").unlink()
    used = []
    resume(tmp_path / "run", progress=lambda *_: used.append(torch.get_num_threads()))
    assert set(used) <= {3}


def test_what_is_given_is_not_measured(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "fastest", lambda *_: pytest.fail("measured"))
    train(generated, tmp_path / "flag", tiny(max_steps=2, threads=2))
    assert recorded(tmp_path / "flag") == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train(generated, tmp_path / "variable", tiny(max_steps=2))
    assert recorded(tmp_path / "variable") == 3


def test_choosing_changes_no_bit(generated, tmp_path, monkeypatch):
    """Neither of the model nor of what is drawn: the same as with the number given."""
    number = launch.choose_threads
    chosen = []
    monkeypatch.setattr(launch, "choose_threads", lambda run: chosen.append(number(run)) or chosen[-1])
    train(generated, tmp_path / "chosen", tiny(max_steps=9))
    train(generated, tmp_path / "given", tiny(max_steps=9, threads=chosen[0]))
    one, two = (tensors(tmp_path / name / "checkpoints" / "step-000000009") for name in ("chosen", "given"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
