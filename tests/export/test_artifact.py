"""The artifact: the same answers as the run, to the bit; what is in it; vocabularies; refusals; the self-check."""

import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dqrm
from conftest import tiny
from dqrm import Artifact, Config, ExportConfig, PrepareConfig, Run, UserError
from dqrm.export import pipeline
from dqrm.training.checkpoints import save_checkpoint
from kernel_helpers import on
from test_cli import run as command

VARIANTS = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 4, 8, 16, 32)},
    "mixed, FP32 MLP": {"table_bits": 4, "mlp_bits": 32}, "mixed, FP32 tables": {"table_bits": 32, "mlp_bits": 4},
    "mixed, 2 and 8": {"table_bits": 2, "mlp_bits": 8},
    "running_max": {"scale_refresh": "running_max", "scale_period": None},
    "activations": {"activation_bits": 8}, "FP32 MLP, activations": {"mlp_bits": 32, "activation_bits": 8},
    "lsq": {"quantizer": "lsq"},
    "lsq, pact": {"quantizer": "lsq", "activation_bits": 8, "activation_quantizer": "pact"},
    "per tensor": {"linear_granularity": "tensor"}, "bias": {"bias_bits": 8}, "bf16 tables": {"table_dtype": "bf16"},
    "bf16 arithmetic": {"precision": "bf16"}, "cat": {"interaction": "cat"}, "self": {"self_interaction": True},
    "small tables": {"small_table_bits": 8, "small_table_rows": 50},
    "small tables, FP32": {"table_bits": 32, "small_table_bits": 8, "small_table_rows": 50},
    "odd dim": {"embedding_dim": 5, "bottom_mlp": (8, 5)}, "mean": {"pooling": "mean"},
}  # fmt: skip


def config(**changes):
    base = tiny(max_steps=5)
    parts = {name: {key: changes[key] for key in changes if hasattr(getattr(base, name), key)} for name in vars(base)}
    return replace(base, **{name: replace(getattr(base, name), **changed) for name, changed in parts.items()})


@pytest.fixture(scope="module")
def trained(generated, tmp_path_factory):
    """A finished run in INT4 on the generated log, stopped before its best checkpoint is its last."""
    folder = tmp_path_factory.mktemp("artifact") / "run"
    dqrm.train(generated, folder, tiny(max_steps=30, eval_every=6, seed=2))
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    dqrm.export_run(trained, trained.parent / "model.dqrm")
    return trained.parent / "model.dqrm"


def logits(model, dataset, split="test"):
    with torch.inference_mode():
        return torch.cat([model(batch.dense, batch.ids, batch.bags) for batch in dataset.split(split).batches(50)])


def same_answers(run, path, dataset, which="best"):
    model, _ = Run.open(run).load_model(which)
    for split in ("test", "validation"):
        expected = logits(model, dataset, split)
        assert expected.unique().numel() > 1
        for verify in (False, True):
            assert torch.equal(logits(dqrm.load(path, verify=verify), dataset, split), expected)


@pytest.mark.parametrize(
    ("data", "variant"),
    [("generated", name) for name in VARIANTS]
    + [("bags_data", name) for name in ("2 bits", "4 bits", "32 bits", "cat", "mean", "small tables")],
)
def test_the_artifact_answers_as_the_run(data, variant, request, tmp_path):
    dataset = request.getfixturevalue(data)
    dqrm.train(dataset, tmp_path / "run", config(**VARIANTS[variant]))
    found = dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm")
    assert found["largest_difference"] == 0
    same_answers(tmp_path / "run", tmp_path / "model.dqrm", dataset)
    content = Artifact.open(tmp_path / "model.dqrm", verify=True).content
    assert [column["name"] for column in content["schema"]["columns"]] == [column.name for column in dataset.columns]


def test_the_artifact_answers_as_the_run_without_compiled_kernels(trained, exported, generated):
    native = logits(dqrm.load(exported), generated)
    with on("plain"):
        same_answers(trained, exported, generated)
        assert torch.allclose(logits(dqrm.load(exported), generated), native, atol=1e-6)


def test_eval_of_the_file_is_eval_of_the_run(trained, exported, generated, capsys):
    figures = []
    for path in (trained, exported):
        code, out, err = command(capsys, "eval", path, generated.path, "--json", "--device=cpu")
        assert code == 0, err
        figures.append(json.loads(out))
    assert figures[0]["rows"] == figures[1]["rows"] > 100
    for name, figure in figures[0].items():
        assert round(figure, 6) == round(figures[1][name], 6), name


def test_the_best_and_the_last_checkpoint(trained, generated, tmp_path):
    run = Run.open(trained)
    steps = {}
    for which in ("best", "last"):
        dqrm.export_run(trained, tmp_path / f"{which}.dqrm", ExportConfig(checkpoint=which))
        same_answers(trained, tmp_path / f"{which}.dqrm", generated, which)
        origin = Artifact.open(tmp_path / f"{which}.dqrm").content["provenance"]["run"]
        assert origin["checkpoint"] == which
        steps[which] = origin["step"]
        assert steps[which] == run.load_model(which)[1]["step"]
    assert steps["best"] < steps["last"] == 30


def test_what_export_returns_and_prints(trained, exported, tmp_path, capsys):
    found = dqrm.export_run(trained, tmp_path / "a.dqrm", ExportConfig(check_rows=50))
    assert found["compared"]["rows"] == 50
    assert found["files"] == [str(tmp_path / "a.dqrm")]
    assert (tmp_path / "a.dqrm").read_bytes() == exported.read_bytes(), "the same run gives the same file"
    parts = dict(found["parts"])
    assert parts.pop("file") == found["bytes"] == (tmp_path / "a.dqrm").stat().st_size == sum(parts.values())
    assert 4 < found["bits_per_weight"] < 4.2
    code, out, _ = command(capsys, "export", trained, "-o", tmp_path / "b.dqrm")
    assert code == 0
    for word in ("table codes", "vocabularies", "header", "bits per weight", "from the model's by at most", "b.dqrm"):
        assert word in out
    code, out, _ = command(capsys, "export", trained, "-o", tmp_path / "b.dqrm", "--json")
    assert (code, json.loads(out)["largest_difference"]) == (0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dqrm", "b.dqrm"]


def test_info_of_an_artifact(exported, generated, capsys):
    code, out, _ = command(capsys, "info", exported, "--json", "--verify")
    found = json.loads(out)
    assert (code, found["kind"], found["model"]["table_bits"], found["model"]["mlp_bits"]) == (0, "artifact", 4, 4)
    assert found["model"]["table_rows"] == list(generated.table_rows)
    assert found["schema"]["dense"] == list(generated.dense)
    assert found["provenance"]["data"]["fingerprint"] == generated.fingerprint
    assert Config.from_dict(found["provenance"]["run"]["config"]) == tiny(max_steps=30, eval_every=6, seed=2)
    assert found["provenance"]["run"]["metrics"]["validation"]["auc"] > 0
    assert found["sizes"]["file"] == exported.stat().st_size
    code, out, _ = command(capsys, "info", exported, "--verify")
    assert code == 0
    for word in ("C26", "I13", "4 bits", "table codes", generated.fingerprint[:16], "auc", "checksums match", "step"):
        assert word in out, word
    assert "checksums match" not in command(capsys, "info", exported)[1]


def test_the_file_is_plain_safetensors_with_nothing_of_this_machine(exported, generated, trained):
    data = exported.read_bytes()
    for folder in {generated.path, trained, exported.parent, Path.cwd(), Path.home(), Path(sys.prefix)}:
        assert len(str(folder)) < 4 or str(folder).encode() not in data, folder
    assert b"pickle" not in data
    with safe_open(exported, framework="pt") as file:
        names = set(file.keys())
        assert file.get_tensor("tables.codes").shape == (sum(generated.table_rows), 2)
        assert file.get_tensor("tables.scale").shape == (26,)
        assert {f"vocabulary.{number:02d}" for number in range(26)} < names
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["format_version"] == "1"
    assert set(json.loads(header["__metadata__"]["checksums"])) == names
    start = 8 + int.from_bytes(data[:8], "little")
    sizes = {"U8": 1, "F32": 4}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, f"{name} is not aligned"


def test_vocabularies_in_beside_and_left_out(trained, exported, generated, tmp_path, capsys):
    embedded = [Artifact.open(exported).vocabulary(number) for number in range(26)]
    beside, none = tmp_path / "beside.dqrm", tmp_path / "none.dqrm"
    found = dqrm.export_run(trained, beside, ExportConfig(vocabulary="beside"))
    assert len(found["files"]) == 2
    second = next(Path(file) for file in found["files"] if file != str(beside))
    assert second.parent == tmp_path
    assert found["bytes"] == beside.stat().st_size + second.stat().st_size
    assert [Artifact.open(beside).vocabulary(number) for number in range(26)] == embedded
    assert dqrm.export_run(trained, none, ExportConfig(vocabulary="none"))["parts"]["vocabularies"] == 0
    assert none.stat().st_size < exported.stat().st_size - sum(map(len, embedded)) // 2
    for path in (beside, none):
        same_answers(trained, path, generated)
        assert command(capsys, "info", path, "--verify")[0] == 0
    with pytest.raises(UserError, match="--vocabulary"):
        Artifact.open(none).vocabulary(0)
    kept = second.read_bytes()
    second.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match="checksum"):
        Artifact.open(beside).vocabulary(25)
    second.write_bytes(exported.read_bytes())
    with pytest.raises(UserError, match="vocabulary"):
        Artifact.open(beside).vocabulary(0)
    second.unlink()
    with pytest.raises(UserError, match="missing"):
        Artifact.open(beside).vocabulary(0)
    same_answers(trained, beside, generated)  # scoring rows needs none


def test_a_vocabulary_file_of_another_export_is_refused(trained, bags_data, tmp_path):
    dqrm.train(bags_data, tmp_path / "run", tiny(max_steps=2))
    for run, name in ((trained, "one"), (tmp_path / "run", "other")):
        dqrm.export_run(run, tmp_path / f"{name}.dqrm", ExportConfig(vocabulary="beside"))
    first, second = (next(tmp_path.glob(f"{name}.dqrm-vocabulary-*")) for name in ("one", "other"))
    shutil.copy(second, first)
    with pytest.raises(UserError, match="another export"):
        Artifact.open(tmp_path / "one.dqrm").vocabulary(0)


def test_a_dataset_that_has_moved(generated, bags_data, tmp_path, capsys):
    shutil.copytree(generated.path, tmp_path / "data")
    dqrm.train(dqrm.Dataset(tmp_path / "data"), tmp_path / "run", tiny(max_steps=3))
    (tmp_path / "data").rename(tmp_path / "moved")
    out = tmp_path / "m.dqrm"
    code, _, err = command(capsys, "export", tmp_path / "run", "-o", out)
    assert code == 2
    assert str(tmp_path / "data") in err
    assert "--data" in err
    assert not out.exists()
    assert command(capsys, "export", tmp_path / "run", "-o", out, "--vocabulary=none")[0] == 0
    assert Artifact.open(out).content["schema"]["columns"][25]["name"] == "C26"
    assert command(capsys, "export", tmp_path / "run", "-o", out, "--data", tmp_path / "moved")[0] == 0
    assert Artifact.open(out).vocabulary(0)
    kept = out.read_bytes()
    for arguments in (("--data", bags_data.path), ("--data", tmp_path / "no"), ("--data", tmp_path),
                      ("--data", bags_data.path, "--vocabulary=none")):  # fmt: skip
        code, _, err = command(capsys, "export", tmp_path / "run", "-o", out, *arguments)
        assert (code, str(arguments[1]) in err, "Traceback" in err) == (2, True, False), err
    shutil.copytree(bags_data.path, tmp_path / "data")  # another dataset is where the run's was
    assert command(capsys, "export", tmp_path / "run", "-o", out)[0] == 2
    assert out.read_bytes() == kept
    code, _, err = command(capsys, "eval", out, bags_data.path)
    assert (code, "is not the dataset" in err) == (2, True)


def test_what_export_refuses(trained, exported, generated, tmp_path, capsys):
    (tmp_path / "folder.dqrm").mkdir()
    (tmp_path / "file").write_text("x")
    shutil.copytree(trained, tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "checkpoints")
    (tmp_path / "without" / "checkpoints").mkdir()
    shutil.copytree(trained, tmp_path / "damaged")
    for weights in (tmp_path / "damaged").glob("checkpoints/*/weights.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    ok = tmp_path / "x.dqrm"
    before = sorted(path.name for path in tmp_path.iterdir())
    wrong = {
        (trained, tmp_path / "x.bin"): "x.bin", (trained, tmp_path / "x"): ".onnx",
        (trained, tmp_path / "no/x.dqrm"): "no",
        (trained, tmp_path / "folder.dqrm"): "folder", (trained, tmp_path / "file/x.dqrm"): "file",
        (tmp_path / "no", ok): "does not exist", (generated.path, ok): "run.json",
        (tmp_path / "without", ok): "checkpoint",
        (tmp_path / "damaged", ok): "damaged", (exported, ok): "artifact already", (tmp_path / "file", ok): "file",
        (trained, ok, "--checkpoint=newest"): "newest", (trained, ok, "--vocabulary=maybe"): "maybe",
        (trained, ok, "--check-rows=0"): "0", (trained, ok, "--bits=4"): "--bits",
    }  # fmt: skip
    for (source, output, *flags), word in wrong.items():
        code, out, err = command(capsys, "export", source, "-o", output, *flags)
        assert (code, out) == (2, ""), (source, output, err)
        assert word in err
        assert "Traceback" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == before, (source, output, "left something behind")
    (tmp_path / "file.dqrm").write_text("label\tid\n" * 20)
    for arguments in (("info", tmp_path / "file.dqrm"), ("info", tmp_path / "file", "--verify"),
                      ("eval", tmp_path / "file.dqrm", generated.path), ("eval", exported, tmp_path / "file"),
                      ("eval", exported, generated.path, "--split=tets")):  # fmt: skip
        code, out, err = command(capsys, *arguments)
        assert (code, out, "Traceback" in err, err.count("\n")) == (2, "", False, 1), (arguments, err)


@pytest.mark.parametrize("name", ["tables", "tables, not in the test split", "top", "bias"])
def test_weights_that_are_no_numbers_are_refused(name, trained, generated, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    model, state = run.load_model("last")
    seen = torch.cat([batch.ids[:, 0] for batch in generated.split("test").batches(5000)]).unique().tolist()
    unseen = next(row for row in range(generated.table_rows[0]) if row not in seen)
    with torch.no_grad():
        if name == "bias":
            model.top[0].bias[0] = float("nan")
        elif name == "top":
            model.top[0].weight[0, 0] = float("nan")
        else:
            model.tables.weight[unseen if "not" in name else seen[0], 0] = float("nan")
    shutil.rmtree(run.checkpoints)
    save_checkpoint(run.checkpoints, 30, model, [], {**state, "best": None}, set())
    with pytest.raises(UserError) as error:
        dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(checkpoint="last"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.dqrm").exists()


def spoil(path, name, data=None):
    """Overwrite the bytes of a tensor in a finished file."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + start : 8 + length + end] = data or bytes(end - start)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "nan"),
    [(name, False) for name in ("tables.codes", "tables.scale", "top.0.codes", "top.2.scale", "bottom.0.bias")]
    + [("tables.scale", True), ("top.2.scale", True), ("bottom.0.bias", True)],
)
def test_a_file_that_is_written_wrongly_is_not_kept(name, nan, trained, exported, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.dqrm"
    shutil.copy(exported, out)
    right = pipeline.write

    def wrong(path, *rest):
        found = right(path, *rest)
        with safe_open(path, framework="pt") as file:
            count = file.get_tensor(name).numel()
        spoil(path, name, struct.pack("f", float("nan")) * count if nan else None)
        return found

    monkeypatch.setattr(pipeline, "write", wrong)
    code, printed, err = command(capsys, "export", trained, "-o", out)
    assert (code, printed) == (2, "")
    assert "differ" in err or "damaged" in err
    assert out.read_bytes() == exported.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.dqrm"]


def test_a_loaded_model_goes_on_while_its_file_is_replaced(trained, generated, tmp_path):
    out = tmp_path / "m.dqrm"
    dqrm.export_run(trained, out)
    model = dqrm.load(out)
    expected = logits(dqrm.load(out), generated)
    dqrm.export_run(trained, out, ExportConfig(checkpoint="last"))
    assert torch.equal(logits(model, generated), expected)
    assert not torch.equal(logits(dqrm.load(out), generated), expected)
    out.unlink()
    assert torch.equal(logits(model, generated), expected)


def test_a_run_that_is_not_finished_can_be_exported(trained, generated, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert command(capsys, "export", tmp_path / "run", "-o", tmp_path / "m.dqrm")[0] == 0
    same_answers(trained, tmp_path / "m.dqrm", generated)
    assert Artifact.open(tmp_path / "m.dqrm").content["provenance"]["run"]["metrics"]["test"] is None
    assert command(capsys, "info", tmp_path / "m.dqrm")[0] == 0


def test_column_names_can_be_anything(tmp_path, capsys):
    import numpy as np
    import polars as pl

    random = np.random.default_rng(0)
    names = (
        "é ü",
        "a/b",
        'q"uote',
        "back\\slash",
        '"header_sha256": "' + "0" * 64,
        "x" * 300,
        "new\nline",
        "__metadata__",
    )
    frame = pl.DataFrame(
        {"label": random.integers(0, 2, 300), "d[/]": random.normal(size=300)}
        | {name: random.integers(0, 20, 300).astype(str) for name in names}
    )
    frame.write_parquet(tmp_path / "log.parquet")
    for number, (categorical, dense) in enumerate(((names, ("d[/]",)), ((), ("d[/]",)), (names[:2], ()))):
        options = PrepareConfig(layout="table", label="label", categorical=categorical, dense=dense)
        data = dqrm.prepare([tmp_path / "log.parquet"], tmp_path / f"data{number}", options)
        dqrm.train(data, tmp_path / f"run{number}", config())
        dqrm.export_run(tmp_path / f"run{number}", tmp_path / "m.dqrm")
        same_answers(tmp_path / f"run{number}", tmp_path / "m.dqrm", data)
        assert command(capsys, "info", tmp_path / "m.dqrm", "--verify")[0] == 0
