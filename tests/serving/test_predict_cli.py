"""`dqrm predict` and its neighbours as a user types them: the whole way from a log to probabilities."""

import csv
import json
import shutil

import polars as pl
import pytest

import dqrm
from cli_helpers import command
from conftest import tiny
from dqrm import PredictConfig, PrepareConfig, UserError

ROWS = [
    {"click": n % 2, "user": n % 7, "on": n % 3 == 0, "price": n / 4, "tags": "a|b" if n % 2 else "c"}
    for n in range(60)
]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A dataset, a run and an artifact of a Parquet log with numbers, booleans and a multi-valued column."""
    folder = tmp_path_factory.mktemp("shipped")
    pl.DataFrame(ROWS).write_parquet(folder / "log.parquet")
    config = PrepareConfig(label="click", categorical=("user", "on", "tags"), multi=("tags",), dense=("price",))
    dataset = dqrm.prepare(folder / "log.parquet", folder / "data", config)
    dqrm.train(dataset, folder / "run", tiny(max_steps=3))
    dqrm.export_run(folder / "run", folder / "m.dqrm")
    return folder


def probabilities(shipped, log, output, *options, capsys):
    code, _, err = command(capsys, "predict", shipped / "m.dqrm", log, "-o", output, *options)
    assert code == 0, err
    return pl.read_parquet(output)["probability"].to_list(), err


def test_the_same_ids_in_floats_and_in_text(shipped, tmp_path, capsys):
    ways = {"capsys": capsys}
    wanted, _ = probabilities(shipped, shipped / "log.parquet", tmp_path / "p.parquet", **ways)
    frame = pl.DataFrame(ROWS).drop("click")
    frame.with_columns(pl.col("user").cast(pl.Float64)).write_parquet(tmp_path / "floats.parquet")
    assert probabilities(shipped, tmp_path / "floats.parquet", tmp_path / "p.parquet", **ways)[0] == wanted
    text = frame.with_columns(pl.col("tags").str.replace_all("|", ";", literal=True))
    text.select("price", "tags", "on", "user").write_csv(tmp_path / "text.csv", separator=";", quote_style="always")
    options = ("--delimiter", ";", "--multi-separator", ";")
    assert probabilities(shipped, tmp_path / "text.csv", tmp_path / "p.parquet", *options, **ways)[0] == wanted


def test_a_column_whose_ids_are_all_unknown_is_warned_of(shipped, tmp_path, capsys):
    with (tmp_path / "python.csv").open("w", newline="") as file:  # Python writes True where Parquet's text is true
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    ways = {"capsys": capsys}
    _, err = probabilities(shipped, tmp_path / "python.csv", tmp_path / "p.parquet", **ways)
    assert "100.0% of the ids in on are unknown" in err
    assert "in user" not in err
    assert dqrm.predict(shipped / "m.dqrm", tmp_path / "python.csv", tmp_path / "p.parquet")["unseen"] == {
        "user": 0.0, "on": 1.0, "tags": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("predict", "m.dqrm", "log.parquet", "-o", "p.csv", "--keep", "user", "--keep", "on"), "--keep user,on"),
        (("predict", "m.dqrm", "log.parquet", "-o", "p.txt"), "p.txt"),
        (("predict", "nothing", "log.parquet", "-o", "p.csv"), "nothing does not exist, expected a run folder"),
        (("predict", "data", "log.parquet", "-o", "p.csv"), "expected a run folder"),
        (("predict", "m.pt2", "log.parquet", "-o", "p.csv"), "m.pt2 cannot be scored, expected a run folder"),
        (("eval", "m.pt2", "data"), "a .dqrm or a .onnx file; torch.export.load can run code"),
        (("export", "run", "-o", "m.bin"), "should end in .dqrm, .onnx, .pt2, .pte or /, which says what to write"),
        (("export", "m.dqrm", "-o", "n.dqrm"), "name an output that ends in .onnx, .pt2, .pte or /"),
        (("predict", "m.dqrm", "log.parquet", "-o", "p.csv", "--batch-size", "0"), "batch_size is 0"),
        (
            ("prepare", "log.parquet", "-o", "d", "--label", "click", "--dense", "price", "--dense", "user"),
            "price,user",
        ),
        (("eval", "m.dqrm", "data", "--checkpoint", "last"), "--checkpoint last"),
        (("eval", "none.dqrm", "data"), "none.dqrm"),
        (("export", "run", "-o", "m.onnx", "--vocabulary", "beside"), "vocabulary beside"),
        (("quantize", "run", "-o", "q.dqrm"), "trained in 4 bits"),
        (("quantize", "run", "-o", "q.dqrm", "--bits", "5"), "5"),
    ],
)
def test_what_is_refused(arguments, says, shipped, capsys, monkeypatch):
    monkeypatch.chdir(shipped)
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_verify_reads_vocabularies_in_the_second_file_too(shipped, tmp_path, capsys):
    dqrm.export_run(shipped / "run", tmp_path / "b.dqrm", dqrm.ExportConfig(vocabulary="beside"))
    assert command(capsys, "info", tmp_path / "b.dqrm", "--verify")[0] == 0
    second = next(tmp_path.glob("b.dqrm-vocabulary-*"))
    content = bytearray(second.read_bytes())
    content[-20] ^= 1
    second.write_bytes(content)
    code, _, err = command(capsys, "info", tmp_path / "b.dqrm", "--verify")
    assert (code, second.name in err) == (2, True)
    second.unlink()
    code, _, err = command(capsys, "info", tmp_path / "b.dqrm", "--verify")
    assert (code, "is missing" in err) == (2, True)


def test_the_sizes_of_another_format_are_its_own(shipped, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    found = dqrm.export_run(shipped / "m.dqrm", tmp_path / "m.onnx")
    assert found["parts"]["file"] == found["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert sum(found["parts"].values()) == 2 * found["bytes"]


def test_evaluate_takes_a_folder(shipped):
    model = dqrm.load(shipped / "m.dqrm")
    assert dqrm.evaluate(model, shipped / "data", "test") == dqrm.evaluate(
        model, dqrm.Dataset(shipped / "data"), "test"
    )
    with pytest.raises(UserError):
        dqrm.evaluate(model, shipped / "nothing", "test")


def in_order(path):
    return pl.read_parquet(path)["probability"].to_list()


@pytest.fixture(scope="module")
def wanted(shipped, tmp_path_factory):
    """What the artifact predicts for the log."""
    output = tmp_path_factory.mktemp("wanted") / "p.parquet"
    dqrm.predict(shipped / "m.dqrm", shipped / "log.parquet", output)
    return in_order(output)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_folder_predicts_as_its_artifact_does(shipped, wanted, tmp_path, in_memory):
    before = sorted(path.name for path in shipped.rglob("*"))
    config = PredictConfig(in_memory=in_memory)
    result = dqrm.predict(shipped / "run", shipped / "log.parquet", tmp_path / "p.parquet", config)
    assert in_order(tmp_path / "p.parquet") == wanted
    assert result["subsampling"] == {"subsample_negatives": 0.0, "corrected": False}
    assert sorted(path.name for path in shipped.rglob("*")) == before


def test_a_run_folder_on_the_command_line(shipped, wanted, tmp_path, capsys):
    code, _, err = command(capsys, "predict", shipped / "run", shipped / "log.parquet", "-o", tmp_path / "p.parquet")
    assert (code, in_order(tmp_path / "p.parquet")) == (0, wanted), err
    shutil.copytree(shipped, tmp_path / "moved")
    info = json.loads((tmp_path / "moved" / "run" / "run.json").read_text())
    info["data"]["path"] = str(tmp_path / "gone")
    (tmp_path / "moved" / "run" / "run.json").write_text(json.dumps(info))
    arguments = ("predict", tmp_path / "moved" / "run", shipped / "log.parquet", "-o", tmp_path / "q.parquet")
    code, _, err = command(capsys, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not exist; name it with --data\n" in err
    assert command(capsys, *arguments, "--data", tmp_path / "moved" / "data")[0] == 0
    assert in_order(tmp_path / "q.parquet") == wanted


def test_models_in_memory_predict(shipped, wanted, tmp_path):
    model, data = dqrm.Run.open(shipped / "run").load_model()[0].train(), PredictConfig(data=str(shipped / "data"))
    for given, config in ((model, data), (dqrm.load(shipped / "m.dqrm"), PredictConfig())):
        dqrm.predict(given, shipped / "log.parquet", tmp_path / "p.parquet", config)
        assert in_order(tmp_path / "p.parquet") == wanted
    assert model.training
    with pytest.raises(UserError, match="a DLRM in memory has no vocabularies"):
        dqrm.predict(model, shipped / "log.parquet", tmp_path / "p.parquet")
    other = dqrm.DLRM(1, [3, 4, 5])
    with pytest.raises(UserError, match=r"but the model's are \[3, 4, 5\]"):
        dqrm.predict(other, shipped / "log.parquet", tmp_path / "p.parquet", data)


def test_an_onnx_file_predicts_with_the_dataset_folder(shipped, wanted, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    dqrm.export_run(shipped / "run", tmp_path / "m.onnx")
    config = PredictConfig(data=str(shipped / "data"), threads=1)
    result = dqrm.predict(tmp_path / "m.onnx", shipped / "log.parquet", tmp_path / "p.parquet", config)
    assert in_order(tmp_path / "p.parquet") == pytest.approx(wanted, abs=1e-6)
    assert result["threads"] == 1
    with pytest.raises(UserError, match=r"m\.onnx holds no vocabularies; name the dataset folder"):
        dqrm.predict(tmp_path / "m.onnx", shipped / "log.parquet", tmp_path / "p.parquet")


def test_runs_files_and_models_are_evaluated_alike(shipped):
    model = dqrm.Run.open(shipped / "run").load_model()[0]
    expected = dqrm.evaluate(model, shipped / "data")
    for given in (shipped / "run", str(shipped / "run"), shipped / "m.dqrm", dqrm.load(shipped / "m.dqrm")):
        assert dqrm.evaluate(given, dqrm.Dataset(shipped / "data")) == expected
    assert dqrm.evaluate(shipped / "run", shipped / "data", checkpoint="last")["rows"] == expected["rows"]
    for given in (shipped / "m.dqrm", model):
        with pytest.raises(UserError, match="--checkpoint last is for run folders"):
            dqrm.evaluate(given, shipped / "data", checkpoint="last")
        with pytest.raises(UserError, match="--device cuda is for run folders"):
            dqrm.evaluate(given, shipped / "data", device="cuda")


@pytest.mark.parametrize("output", ["run/run.json", "data/dataset.json"])
def test_what_a_run_reads_is_not_overwritten(shipped, tmp_path, output):
    shutil.copytree(shipped, tmp_path / "copy")
    info = json.loads((tmp_path / "copy" / "run" / "run.json").read_text())
    info["data"]["path"] = str(tmp_path / "copy" / "data")
    (tmp_path / "copy" / "run" / "run.json").write_text(json.dumps(info))
    (tmp_path / "p.csv").symlink_to(tmp_path / "copy" / output)
    with pytest.raises(UserError, match="is read for scoring and would be overwritten"):
        dqrm.predict(tmp_path / "copy" / "run", shipped / "log.parquet", tmp_path / "p.csv")
