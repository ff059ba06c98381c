"""Files that change while they are in use: a sentence, or the old content, but never a mixture or a dead process."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dqrm
import dqrm.export.weights
from conftest import tiny
from dqrm import Artifact, ExportConfig, PTQConfig, UserError
from dqrm.training.checkpoints import WEIGHTS

CHANGED = "was changed in place under the loaded model; load it again"


@pytest.fixture(scope="module")
def shipped(generated, tmp_path_factory):
    """Two models of the same size, and one with a scale per row."""
    folder = tmp_path_factory.mktemp("in_use")
    for name, seed in (("one", 1), ("two", 2)):
        dqrm.train(generated, folder / name, tiny(max_steps=6, seed=seed))
        dqrm.export_run(folder / name, folder / f"{name}.dqrm", ExportConfig(vocabulary="none"))
    dqrm.train(generated, folder / "fp32", tiny(32, max_steps=2))
    dqrm.export_run(
        folder / "fp32", folder / "rows.dqrm", ExportConfig(vocabulary="none"), PTQConfig(granularity="row")
    )
    return folder


@pytest.fixture
def batch(generated):
    return next(iter(generated.split("test").batches(40)))


def score(model, batch):
    with torch.inference_mode():
        return model(batch.dense, batch.ids, batch.bags)


def overwrite(path, data):
    """In place, as `cp new model.dqrm` does, and at another time than the file was written."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def copied(source, folder):
    return Path(shutil.copy(source, folder / "m.dqrm"))


@pytest.mark.parametrize("name", ["one.dqrm", "rows.dqrm"])
def test_a_file_changed_in_place_is_refused_by_every_model_of_it(shipped, batch, tmp_path, name):
    path = copied(shipped / name, tmp_path)
    model = dqrm.load(path)
    wanted = score(model, batch)
    overwrite(path, (shipped / "two.dqrm").read_bytes())
    for _ in range(2):
        with pytest.raises(UserError, match=CHANGED):
            score(model, batch)
    with pytest.raises(UserError, match=CHANGED):
        model.tables(batch.ids)
    assert score(dqrm.load(path), batch).equal(score(dqrm.load(shipped / "two.dqrm"), batch))
    assert not score(dqrm.load(path), batch).equal(wanted)


def test_a_change_during_a_lookup_is_seen_after_it(shipped, batch, tmp_path, monkeypatch):
    path = copied(shipped / "one.dqrm", tmp_path)
    model = dqrm.load(path)
    look_up = model.tables._values

    def changing(*arguments):
        overwrite(path, (shipped / "two.dqrm").read_bytes())
        return look_up(*arguments)

    monkeypatch.setattr(model.tables, "_values", changing)
    with pytest.raises(UserError, match=CHANGED):
        score(model, batch)


def test_a_file_cut_short_kills_nobody(shipped, tmp_path):
    """In a process of its own, which SIGBUS would end."""
    path = copied(shipped / "one.dqrm", tmp_path)
    code = (
        "import os, sys, torch, dqrm\n"
        "model = dqrm.load(sys.argv[1])\n"
        "os.truncate(sys.argv[1], 4096)\n"
        "try:\n"
        "    model(torch.zeros(2, 13), torch.zeros(2, 26, dtype=torch.long))\n"
        "except dqrm.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert CHANGED in done.stdout


def test_a_file_renamed_over_leaves_the_loaded_model_as_it_was(shipped, batch, tmp_path):
    path = copied(shipped / "one.dqrm", tmp_path)
    model = dqrm.load(path)
    wanted = score(model, batch)
    fresh = Path(shutil.copy(shipped / "two.dqrm", tmp_path / "new"))
    os.replace(fresh, path)
    assert score(model, batch).equal(wanted)
    assert not score(dqrm.load(path), batch).equal(wanted)
    path.unlink()
    assert score(model, batch).equal(wanted)


def test_an_export_replaces_a_file_in_use(shipped, batch, tmp_path):
    path = copied(shipped / "one.dqrm", tmp_path)
    model = dqrm.load(path)
    wanted = score(model, batch)
    dqrm.export_run(shipped / "two", path)
    assert score(model, batch).equal(wanted)


@pytest.mark.parametrize("own", [lambda path: dqrm.load(path, in_memory=True),
                                 lambda path: copy.deepcopy(dqrm.load(path)),
                                 lambda path: pickle.loads(pickle.dumps(dqrm.load(path)))])  # fmt: skip
def test_a_model_in_memory_needs_no_file(shipped, batch, tmp_path, own):
    path = copied(shipped / "one.dqrm", tmp_path)
    model = own(path)
    overwrite(path, b"")
    assert score(model, batch).equal(score(dqrm.load(shipped / "one.dqrm"), batch))


def test_all_but_the_tables_is_in_memory(shipped, tmp_path):
    path = copied(shipped / "one.dqrm", tmp_path)
    model = dqrm.load(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "tables.codes"}
    overwrite(path, bytes(path.stat().st_size))
    for name, tensor in before.items():
        assert model.state_dict()[name].equal(tensor), name


def test_predict_in_memory_gives_the_same(generated, shipped, tmp_path):
    log, results = generated.path.parent / "log.txt", []
    for in_memory in (False, True):
        config = dqrm.PredictConfig(data=str(generated.path), in_memory=in_memory)
        dqrm.predict(shipped / "one.dqrm", log, tmp_path / "p.csv", config)
        results.append((tmp_path / "p.csv").read_bytes())
    assert results[0] == results[1]


def test_a_vocabulary_is_compared_as_it_is_read(generated, shipped, tmp_path):
    path = tmp_path / "m.dqrm"
    dqrm.export_run(shipped / "one", path)
    opened = Artifact.open(path)
    assert opened.vocabulary(0)
    overwrite(path, path.read_bytes())
    with pytest.raises(UserError, match="replaced while it was being read"):
        opened.vocabulary(0)


def test_a_checkpoint_changed_during_its_export(shipped, tmp_path, monkeypatch):
    shutil.copytree(shipped / "one", tmp_path / "run")
    weights = next((tmp_path / "run" / "checkpoints").glob(f"*/{WEIGHTS}"))
    encode, done = dqrm.export.weights.encode, []

    def changing(*arguments):
        if not done:
            done.append(overwrite(weights, weights.read_bytes()))
        return encode(*arguments)

    monkeypatch.setattr(dqrm.export.weights, "encode", changing)
    with pytest.raises(UserError, match="changed in place under the export"):
        dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(vocabulary="none"))
    assert done
    assert not (tmp_path / "m.dqrm").exists()


@pytest.mark.parametrize("file", ["ids.i32", "dense.f32", "label.u8"])
def test_a_dataset_cut_short_while_it_is_mapped(generated, tmp_path, file):
    shutil.copytree(generated.path, tmp_path / "data")
    split = dqrm.Dataset(tmp_path / "data").split("test")
    batches = split.batches(8)
    os.truncate(tmp_path / "data" / "test" / file, 5)
    with pytest.raises(UserError, match=f"{file} was changed while it was in use: it has 5 bytes"):
        next(batches)
    with pytest.raises(UserError, match="damaged"):
        dqrm.Dataset(tmp_path / "data")
