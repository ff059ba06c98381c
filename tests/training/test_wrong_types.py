"""Values of the wrong type in the JSON files of runs and datasets: one sentence with file, key, value and what is
expected; and metrics that lost their end."""

import json
import shutil

import pytest

from conftest import tiny
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.export.pipeline import export_run
from dqrm.files import COUNT, TEXT, problem
from dqrm.info import describe
from dqrm.training.launch import resume, train
from dqrm.training.run import Run
from run_helpers import Killed, killer


@pytest.fixture(scope="module")
def run(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(generated, folder, tiny(max_steps=6, log_every=2, checkpoint_every=3))
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def put(file, keys, value):
    """Write another value under a path of keys; without checksums, as an older dqrm would have written it."""
    content = json.loads(file.read_text())
    content = {key: part for key, part in content.items() if key not in ("files", "sha256")}
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def sentence(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


STATE = {
    "step": (["step"], "six"), "batch": (["batch"], 1.5), "negative": (["epoch"], -1), "loss": (["loss_sum"], "NaN"),
    "best": (["best"], [1]), "best.step": (["best", "step"], None), "metrics": (["best", "metrics", "auc"], "high"),
    "finished": (["finished"], 1), "bytes": (["metrics_bytes"], True), "rate": (["rate_factor"], {}),
    "rows": (["train_rows"], "7"), "without": (["without_better"], None),
}  # fmt: skip


@pytest.mark.parametrize("case", STATE)
def test_state(copy, case):
    keys, value = STATE[case]
    (copy / "summary.json").unlink()
    file = copy / "checkpoints" / "step-000000006" / "state.json"
    put(file, keys, value)
    said = sentence(resume, copy)
    assert all(part in said for part in (str(file), ".".join(keys), json.dumps(value), "expected"))


def test_state_of_another_version_or_place(copy):
    (copy / "summary.json").unlink()
    file = copy / "checkpoints" / "step-000000006" / "state.json"
    put(file, ["novelty"], 1)
    assert "unknown key 'novelty'" in sentence(resume, copy)
    put(file, ["step"], 7)
    assert "step = 7" in sentence(resume, copy)


RUN = {
    "config": (["config"], []), "section": (["config", "training"], 3), "data": (["data"], "here"),
    "dense": (["data", "dense"], "I1"), "dense names": (["data", "dense"], [1]), "columns": (["data", "columns"], None),
    "rows of a table": (["data", "columns", 0, "rows"], "9"), "none": (["data", "columns", 0, "rows"], 0),
    "multi": (["data", "columns", 0, "multi"], "no"), "fingerprint": (["data", "fingerprint"], 5),
    "path": (["data", "path"], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN)
def test_run(copy, case):
    keys, value = RUN[case]
    put(copy / "run.json", keys, value)
    for call in (Run.open, resume, describe):
        said = sentence(call, str(copy))
        assert all(part in said for part in (str(copy / "run.json"), str(keys[-1] if keys[-1] != 0 else "path")))
        assert "expected" in said


SUMMARY = {
    "best": (["best"], 3), "step": (["best", "step"], "x"), "test": (["test"], []), "auc": (["test", "auc"], "?"),
    "bytes": (["stored_bytes"], 3), "total": (["stored_bytes", "total"], None), "config": (["config"], None),
}  # fmt: skip


@pytest.mark.parametrize("case", SUMMARY)
def test_summary(copy, case, tmp_path):
    keys, value = SUMMARY[case]
    put(copy / "summary.json", keys, value)
    for call in ((describe, str(copy)), (resume, copy), (export_run, copy, tmp_path / "m.dqrm")):
        said = sentence(*call)
        assert all(part in said for part in ("summary.json", keys[-1], json.dumps(value), "expected"))


DATASET = {
    "rows": (["rows", "train"], "many"), "schema": (["schema"], []), "dense": (["schema", "dense"], {}),
    "column": (["schema", "columns", 0], "C1"), "table": (["schema", "columns", 0, "rows"], 1.5),
    "vocabulary": (["schema", "columns", 0, "vocabulary"], None), "clicks": (["clicks", "test"], -1),
    "fingerprint": (["fingerprint"], 1), "options": (["options"], 1),
    "share": (["options", "subsample_negatives"], "x"), "all dropped": (["options", "subsample_negatives"], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", DATASET)
def test_dataset(generated, tmp_path, case):
    keys, value = DATASET[case]
    folder = shutil.copytree(generated.path, tmp_path / "data")
    put(folder / "dataset.json", keys, value)
    said = sentence(Dataset, folder)
    assert all(part in said for part in (str(folder), "dataset.json", json.dumps(value), "expected"))


def test_paths_of_keys_and_names_that_look_like_patterns():
    shape = {"a": [{"b": (COUNT, None)}], "c?": TEXT, "d": {"*": COUNT}}
    assert problem({"a": [{"b": 1}, {"b": None}], "d": {"x": 1, "*": 2}}, shape) is None
    assert (
        problem({"a": [{"b": 1}, {"b": "x"}], "d": {}}, shape) == 'has a[1].b = "x", expected a whole number, 0 or more'
    )
    assert problem({"a": [{}], "d": {}}, shape) == "lacks 'a[0].b'"
    assert problem({"a": [], "d": {"*": "x"}}, shape).startswith('has d.* = "x"')
    assert problem({"a": [], "c": 3, "d": {}}, shape) == "has c = 3, expected text"
    assert problem([], shape) == "has [], expected an object"


@pytest.mark.parametrize("cut", ["inside a line", "after a line", "all", "gone"])
def test_metrics_that_lost_their_end_are_not_filled_up(generated, tmp_path, cut):
    with pytest.raises(Killed):
        train(generated, tmp_path / "run", tiny(log_every=2, checkpoint_every=4), progress=killer(13))
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    kept = {"inside a line": b"".join(lines[:2]) + lines[2][:9], "after a line": b"".join(lines[:2]), "all": b""}
    file.write_bytes(kept[cut]) if cut in kept else file.unlink()
    said = []
    resume(tmp_path / "run", log=said.append)
    assert sum("metrics.jsonl" in line and "lost" in line for line in said) == 1
    written = file.read_bytes()
    assert b"\0" not in written
    assert all(json.loads(line)["step"] for line in written.splitlines())
    assert written.startswith(b"".join(lines[:2]) if "line" in cut else b"{")
