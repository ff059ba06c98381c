"""The number of threads of a run, or of what scores: chosen by what is fast now, told, and kept to the end."""

import json
from pathlib import Path

import pytest
import torch

import dqrm
from cli_helpers import command
from conftest import tensors, tiny
from dqrm import ExportConfig, PredictConfig
from dqrm.export.formats.onnx import OnnxFormat
from dqrm.serving import evaluation
from dqrm.serving.evaluation import evaluate
from dqrm.training import launch, threads
from dqrm.training.launch import resume, train
from run_helpers import Killed


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


@pytest.fixture(scope="module")
def shipped(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    train(generated, folder / "run", tiny(max_steps=3))
    dqrm.export_run(folder / "run", folder / "m.dqrm", ExportConfig())
    return folder


@pytest.fixture
def log(generated):
    return generated.path.parent / "log.txt"


def scored_on(monkeypatch, module, name):
    """The numbers of threads on which a function of a module was called."""
    used, original = [], getattr(module, name)

    def noting(*arguments, **more):
        used.append(torch.get_num_threads())
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, noting)
    return used


def evaluate_run(shipped, generated, log, tmp_path, **threads):
    dqrm.evaluate(dqrm.Run.open(shipped / "run").load_model()[0], generated, "train", 64, **threads)


def evaluate_artifact(shipped, generated, log, tmp_path, **threads):
    evaluate(shipped / "m.dqrm", generated.path, "train", 64, **threads)


def predict(shipped, generated, log, tmp_path, **threads):
    found = dqrm.predict(shipped / "m.dqrm", log, tmp_path / "p.csv", PredictConfig(batch_size=64, **threads))
    assert found["threads"] in (1, 2, 3)


SCORING = [evaluate_run, evaluate_artifact, predict]


@pytest.mark.parametrize("verb", SCORING)
@pytest.mark.parametrize("number", [1, 2])
def test_scoring_takes_the_fastest_number_and_gives_it_back(
    verb, number, shipped, generated, log, tmp_path, monkeypatch
):
    used = scored_on(monkeypatch, dqrm.DLRM, "sampled_logits")
    monkeypatch.setattr(threads, "SHORT", 0.0)
    monkeypatch.setattr(threads, "fastest", lambda score, numbers, *_: (used.clear(), number)[1])
    verb(shipped, generated, log, tmp_path)
    assert set(used) == {number}
    assert len(used) > 20
    assert torch.get_num_threads() == 3  # of the process, which may be the user's own


@pytest.mark.parametrize("verb", SCORING)
def test_what_is_given_is_not_measured_in_scoring(verb, shipped, generated, log, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "SHORT", 0.0)
    monkeypatch.setattr(threads, "fastest", lambda *_: pytest.fail("measured"))
    used = scored_on(monkeypatch, dqrm.DLRM, "sampled_logits")
    verb(shipped, generated, log, tmp_path, threads=2)
    assert set(used) == {2}
    used.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    verb(shipped, generated, log, tmp_path)
    assert set(used) == {3}


@pytest.mark.parametrize("verb", SCORING)
def test_a_moment_of_scoring_is_not_measured(verb, shipped, generated, log, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "SHORT", 1e9)
    monkeypatch.setattr(threads, "fastest", lambda *_: pytest.fail("measured"))
    used = scored_on(monkeypatch, dqrm.DLRM, "sampled_logits")
    verb(shipped, generated, log, tmp_path)
    assert set(used) == {1}


@pytest.mark.parametrize("best", [1, 2, 3])
def test_scoring_is_measured_by_what_it_takes(monkeypatch, best):
    """By a clock that runs as the number of threads says."""
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def score():
        clock[0] += 0.01 * (1 + abs(torch.get_num_threads() - best))

    few = threads.threads_to_score(score, calls=5)
    assert (few, threads.threads_to_score(score, calls=5000)) == (1, best)
    assert threads.threads_to_score(score) == best
    assert clock[0] < 5  # seconds of its own


def test_measuring_changes_no_figure(shipped, generated, monkeypatch):
    """Nor is the first batch counted twice."""
    monkeypatch.setattr(threads, "SHORT", 0.0)
    model, _ = dqrm.Run.open(shipped / "run").load_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen, lines = dqrm.evaluate(model, generated, "test", 33), []
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for number in (1, 2, 3):
        found = dqrm.evaluate(model, generated, "test", 33, threads=number, log=lines.append)
        assert found == pytest.approx(chosen, rel=1e-6)
    assert lines == ["Scoring on 1 CPU thread.", "Scoring on 2 CPU threads.", "Scoring on 3 CPU threads."]


@pytest.mark.parametrize("best", [1, 3])
def test_onnx_is_evaluated_on_the_faster_of_one_thread_and_all(shipped, generated, tmp_path, monkeypatch, best):
    pytest.importorskip("onnxruntime")
    dqrm.export_run(shipped / "m.dqrm", tmp_path / "m.onnx")
    opened, original, clock = [], OnnxFormat.open, [0.0]
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])

    def open_on(self, path, number):
        opened.append(number)
        score = original(self, path, number)

        def timed(batch):
            clock[0] += 1 if number == best else 2
            return score(batch)

        return timed

    monkeypatch.setattr(OnnxFormat, "open", open_on)
    evaluate(tmp_path / "m.onnx", generated.path, "train", 64)
    assert opened == [1, 3, best]
    opened.clear()
    evaluate(tmp_path / "m.onnx", generated.path, "train", 64, threads=2)
    monkeypatch.setattr(evaluation, "SHORT", 1e9)
    evaluate(tmp_path / "m.onnx", generated.path, "train", 64)
    assert opened == [2, 1, 1]


def test_a_loaded_model_leaves_the_threads_of_the_process_alone(shipped, generated, monkeypatch):
    wanted = [f"I{n}" for n in range(1, 14)] + [f"C{n}" for n in range(1, 27)]
    row = {name: 1 if name[0] == "I" else "05db9164" for name in wanted}
    with monkeypatch.context() as patched:
        patched.setattr(torch, "set_num_threads", lambda number: pytest.fail(f"set to {number}"))
        assert dqrm.load(shipped / "m.dqrm").score([row] * 40).shape == (40,)


@pytest.mark.parametrize("model", ["run", "m.dqrm"])
def test_eval_says_on_how_many_threads(shipped, generated, capsys, model):
    wanted = ["eval", shipped / model, generated.path, "--threads", 2]
    _, out, err = command(capsys, *wanted)
    assert "auc" in out
    assert "Scoring on 2 CPU threads." in err
    _, out, err = command(capsys, *wanted, "--json")
    assert json.loads(out)["rows"]
    assert err == ""
    code, out, err = command(capsys, *wanted[:-1], 5000)
    assert code
    assert "5000" in err
