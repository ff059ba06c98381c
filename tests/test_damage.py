"""Damage to a dataset folder, a checkpoint or a vocabulary is refused by whatever uses it, in a sentence that names the
file; folders without checksums still open."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import dqrm
from conftest import tiny
from dqrm import checksums
from dqrm.data.dataset import Dataset
from dqrm.data.vocabulary import Vocabulary
from dqrm.errors import NotVerified, UserError
from dqrm.info import describe, print_description
from dqrm.serving.evaluation import evaluate
from dqrm.training.checkpoints import save_checkpoint, verify_checkpoint
from dqrm.training.launch import resume, train
from dqrm.training.run import Run


def flip(file: Path, at: int = -1) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def refused(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def made(bags_data, tmp_path_factory):
    """A dataset with all kinds of files and a run on it that is not finished."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(bags_data.path, folder / "data")
    train(folder / "data", folder / "run", tiny(max_steps=3))
    dqrm.export_run(folder / "run", folder / "m.dqrm")
    (folder / "run" / "summary.json").unlink()
    return folder


@pytest.fixture
def copy(made, tmp_path):
    for entry in made.iterdir():
        (shutil.copytree if entry.is_dir() else shutil.copy)(entry, tmp_path / entry.name)
    return tmp_path


def files_of(folder: Path, kind: str) -> list[str]:
    listed = json.loads((folder / "data" / "dataset.json").read_text())["files"]
    return [name for name in listed if name.startswith(kind)]


def test_every_file_of_a_dataset_is_listed(made):
    listed = json.loads((made / "data" / "dataset.json").read_text())["files"]
    on_disk = {str(path.relative_to(made / "data")) for path in (made / "data").rglob("*") if path.is_file()}
    assert set(listed) == on_disk - {"dataset.json"}


@pytest.mark.parametrize("kind", ["train/label", "train/ids", "validation/01.values", "test/01.off", "vocabulary/00"])
def test_a_flipped_bit_of_a_dataset_is_not_trained_on(copy, kind):
    (name,) = files_of(copy, kind)
    flip(copy / "data" / name)
    assert f"{name} is damaged" in refused(train, copy / "data", copy / "new", tiny())
    assert not (copy / "new").exists()
    assert f"{name} is damaged" in refused(resume, copy / "run", copy / "data")
    assert f"{name} is damaged" in refused(describe, str(copy / "data"), verify=True)


def test_what_is_read_is_compared_and_nothing_else(copy):
    model, _ = Run.open(copy / "run").load_model()
    flip(copy / "data" / "train" / "label.u8")
    dqrm.evaluate(model, copy / "data", "test")
    config = dqrm.ExportConfig(data=str(copy / "data"))
    dqrm.export_run(copy / "run", copy / "again.dqrm", config)
    flip(copy / "data" / "test" / "label.u8")
    for call in (
        lambda: dqrm.evaluate(model, copy / "data", "test"),
        lambda: evaluate(copy / "m.dqrm", copy / "data"),
        lambda: dqrm.export_run(copy / "run", copy / "new.dqrm", config),
    ):
        assert "test/label.u8 is damaged" in refused(call)
    assert not (copy / "new.dqrm").exists()
    dqrm.evaluate(model, copy / "data", "test", verify=False)
    dqrm.export_run(copy / "run", copy / "new.dqrm", dqrm.ExportConfig(data=str(copy / "data"), verify=False))


def test_damage_by_values_that_make_sense(copy):
    """Two ids swapped, a key renamed: valid arrays and Parquet, and yet other data."""
    ids = np.fromfile(copy / "data" / "train" / "ids.i32", "<i4")
    (vocabulary,) = files_of(copy, "vocabulary/00")
    frame = pl.read_parquet(copy / "data" / vocabulary)
    frame.with_columns(pl.col("row").reverse()).write_parquet(copy / "data" / vocabulary)
    assert vocabulary in refused(dqrm.export_run, copy / "run", copy / "n.dqrm", dqrm.ExportConfig(data=copy / "data"))
    np.roll(ids, 1).tofile(copy / "data" / "train" / "ids.i32")
    assert "train/ids.i32" in refused(train, copy / "data", copy / "new", tiny())


@pytest.mark.parametrize("key", ["rows", "fingerprint", "files", "sha256", "clicks"])
def test_the_description_is_compared_with_its_own_checksum(copy, key):
    file = copy / "data" / "dataset.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "dense_seen": 1}))
    assert "does not match its own checksum" in refused(Dataset, copy / "data")
    file.write_text(json.dumps({k: v for k, v in info.items() if k != key}))
    assert "dataset.json" in refused(Dataset, copy / "data")
    file.write_text(json.dumps(info))  # otherwise laid out, but the same
    Dataset(copy / "data").verify()


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_not_used(copy, name):
    file = copy / "run" / "checkpoints" / "step-000000003" / name
    if name == "state.json":
        file.write_text(file.read_text().replace('"batch": 3', '"batch": 2'))
    else:
        data = bytearray(file.read_bytes())
        data[-64:] = bytes(64) if any(data[-64:]) else b"\1" * 64
        file.write_bytes(data)
    assert str(file) in refused(resume, copy / "run", copy / "data")
    assert str(file) in refused(describe, str(copy / "run"), verify=True)
    if name == "optimizer.safetensors":  # a model needs none
        Run.open(copy / "run").load_model()
        return
    assert str(file) in refused(Run.open(copy / "run").load_model)
    for config in (None, dqrm.PTQConfig()):
        options = dqrm.ExportConfig(data=str(copy / "data"))
        assert str(file) in refused(dqrm.export_run, copy / "run", copy / "new.dqrm", options, config)
    assert not (copy / "new.dqrm").exists()


def test_what_is_said_to_do_about_a_damaged_checkpoint_helps(copy):
    """Deleting the newest leaves one to continue from; of a damaged best one, the newest can be taken instead."""
    checkpoints = copy / "run" / "checkpoints"
    (checkpoints / "step-000000009.partial").mkdir()
    flip(checkpoints / "step-000000003" / "weights.safetensors")
    assert "this run cannot be continued, and --no-verify" in refused(resume, copy / "run", copy / "data")
    shutil.rmtree(copy / "run")
    train(copy / "data", copy / "run", tiny(max_steps=6, checkpoint_every=3))
    (copy / "run" / "summary.json").unlink()
    state = json.loads((checkpoints / "step-000000006" / "state.json").read_text())
    model, _ = Run.open(copy / "run").load_model()
    save_checkpoint(checkpoints, 5, model, [], {**state, "step": 5}, {6})
    flip(checkpoints / "step-000000006" / "weights.safetensors")
    assert "leaves step-000000005 to continue from" in refused(resume, copy / "run", copy / "data")
    flip(checkpoints / "step-000000006" / "weights.safetensors")
    flip(checkpoints / "step-000000005" / "weights.safetensors")
    said = refused(verify_checkpoint, checkpoints / "step-000000005")
    assert "`--checkpoint last` of eval and export takes the newest" in said
    Run.open(copy / "run").load_model("last")


def test_the_file_that_was_compared_is_the_one_that_is_evaluated(copy, monkeypatch):
    other = copy / "other.dqrm"
    shutil.copy(copy / "m.dqrm", other)
    validate = Dataset.validate

    def replaced(self, *names):
        other.replace(copy / "m.dqrm")
        validate(self, *names)

    monkeypatch.setattr(Dataset, "validate", replaced)
    assert "was replaced while it was being read" in refused(evaluate, copy / "m.dqrm", copy / "data")


def test_an_artifact_with_other_codes_is_not_evaluated_and_scores_nothing(copy):
    data = bytearray((copy / "m.dqrm").read_bytes())
    opened = dqrm.Artifact.open(copy / "m.dqrm").container
    data[opened.header_bytes + opened.entries["tables.codes"]["data_offsets"][0]] ^= 1
    (copy / "m.dqrm").write_bytes(data)
    assert "tables.codes" in refused(evaluate, copy / "m.dqrm", copy / "data")
    pl.DataFrame({"user": ["1"], "tags": [["t1"]]}).write_parquet(copy / "log.parquet")
    assert "tables.codes" in refused(dqrm.predict, copy / "m.dqrm", copy / "log.parquet", copy / "p.csv")
    evaluate(copy / "m.dqrm", copy / "data", verify=False)


def test_folders_without_checksums_open_and_say_so_once(copy):
    for file in (copy / "data" / "dataset.json", copy / "run" / "checkpoints" / "step-000000003" / "state.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in content.items() if k not in ("files", "sha256")}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resume(copy / "run", copy / "data")
        train(copy / "data", copy / "new", tiny(max_steps=2))
        Run.open(copy / "run").load_model()
    sentences = [str(each.message) for each in said if issubclass(each.category, NotVerified)]
    assert len(sentences) == 2
    assert sum(str(copy / "data") in sentence for sentence in sentences) == 1


@pytest.mark.parametrize(("folder", "sealed"), [("data", "dataset.json"), ("run", "state.json")])
def test_info_says_that_a_folder_was_verified(copy, capsys, folder, sealed):
    print_description(str(copy / folder))
    assert "checksums" not in capsys.readouterr().out
    print_description(str(copy / folder), verify=True)
    assert f"{copy / folder}: checksums match" in unwrapped(capsys.readouterr().out)
    assert describe(str(copy / folder), verify=True)["verified"] is True
    for file in (copy / folder).rglob(sealed):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in content.items() if key not in ("files", "sha256")}))
    with pytest.warns(NotVerified, match="written without checksums"):
        print_description(str(copy / folder), verify=True)
    assert f"{copy / folder}: not verified, no checksums" in unwrapped(capsys.readouterr().out)
    assert describe(str(copy / folder), verify=True)["verified"] is False


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_nothing_is_hashed_twice_while_it_does_not_change(copy, monkeypatch):
    dataset = Dataset(copy / "data")
    dataset.verify()
    hashed = []
    real = checksums.hashlib.sha256
    monkeypatch.setattr(checksums.hashlib, "sha256", lambda *data: hashed.append(data) or real(*data))
    Dataset(copy / "data").verify("train", "vocabulary")
    assert len(hashed) == 1  # of dataset.json itself
    flip(copy / "data" / "train" / "label.u8")
    assert "train/label.u8" in refused(dataset.verify, "train")


def test_the_artifacts_own_vocabularies_are_asked(copy, monkeypatch):
    """What is shipped gives two keys each other's rows, and all its checksums match: only looking keys up finds it."""
    real = Vocabulary.to_bytes

    def swapped(self):
        rows = self.table_rows.copy()
        rows[:2] = rows[1::-1]
        return real(Vocabulary(self.keys, rows, self.counts))

    monkeypatch.setattr(Vocabulary, "to_bytes", swapped)
    for mode in ("embed", "beside"):
        options = dqrm.ExportConfig(data=str(copy / "data"), vocabulary=mode)
        sentence = refused(dqrm.export_run, copy / "run", copy / "new.dqrm", options)
        assert "exported vocabulary of column user" in sentence
    assert not list(copy.glob("new.dqrm*"))


def test_checksums_are_those_of_other_programs(made, tmp_path):
    import hashlib

    for file, content in (
        (made / "data" / "dataset.json", made / "data"),
        (*made.glob("run/checkpoints/*/state.json"), made / "run" / "checkpoints" / "step-000000003"),
    ):
        for name, listed in json.loads(file.read_text())["files"].items():
            data = (content / name).read_bytes()
            assert listed == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_all_dtypes_are_written_as_safetensors_reads_them(tmp_path):
    import torch
    from safetensors.torch import load_file

    from dqrm.training import checkpoints, tensor_files

    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in tensor_files._DTYPES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "turned": torch.arange(6.0).view(2, 3).t()}
    files = {}
    tensor_files.save_file(tensors, tmp_path / "x.safetensors", files)
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert save_checkpoint is checkpoints.save_checkpoint
