"""`dqrm bench inference`: what its JSON holds, that all variants are the same model, and what it refuses."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import dqrm
from cli_helpers import command
from dqrm.artifact.file import Artifact
from dqrm.bench import inference
from dqrm.bench.config import ARCHITECTURES, INFERENCE_VARIANTS, BenchInferenceConfig
from dqrm.bench.data import write_split
from dqrm.bench.inference import fp32_model, measure, run_inference, write_artifact
from dqrm.cli import cli
from dqrm.errors import UserError
from dqrm.export.check import compare, generate

SMALL = {"rows_scale": 0.00001, "repeats": 4, "warmup": 1, "batch_size": (3,), "threads": (1,)}
FLAGS = ["--rows-scale=0.00001", "--repeats=2", "--warmup=1"]
FIGURES = {
    "name", "variant", "batch_size", "threads", "calls", "median_ms", "p10_ms", "p90_ms", "p99_ms", "mean_ms",
    "per_second", "ratio_to_fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Fewer processes, data and pauses; torch's threads as they were."""
    for name, value in {"PROCESSES": 1, "_SAMPLES": 512, "_PAUSE_SECONDS": 0.0}.items():
        monkeypatch.setattr(inference, name, value)
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def without_processes(monkeypatch):
    """Leave out the fresh processes, each of which imports torch."""
    nothing = dict.fromkeys(("load_seconds", "libraries_mb", "loaded_mb", "scored_mb", "anonymous_mb"))
    monkeypatch.setattr(inference, "_in_processes", lambda *_: nothing)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_onnx_is_skipped_with_a_reason_where_it_is_missing(capsys, monkeypatch, name):
    without_processes(monkeypatch)
    monkeypatch.setitem(sys.modules, name, None)
    flags = [*FLAGS, "--batch-size=2", "--threads=1"]
    code, out, err = command(capsys, "bench", "inference", *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["skipped"] == {"onnx": f"{name} is not installed"}
    assert [variant["variant"] for variant in found["variants"]] == ["packed", "fp32"]
    assert found["onnx_bytes"] is None
    assert set(found["load"]) == {"packed", "fp32"}
    assert "packed_warm" in found["memory"]["processes"]
    code, out, _ = command(capsys, "bench", "inference", *flags)
    assert code == 0
    assert f"onnx skipped: {name} is not installed" in out
    assert "packed artifact" in out


def test_figures_as_json(capsys, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    flags = [*FLAGS, "--batch-size=3-130", "--threads=1-2", f"--folder={tmp_path}"]
    code, out, err = command(capsys, "bench", "inference", *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {
        "variants", "machine", "settings", "skipped", "memory", "load", "artifact_bytes", "onnx_bytes",
        "largest_difference",
    }  # fmt: skip
    assert [(v["threads"], v["batch_size"], v["variant"]) for v in found["variants"]] == [
        (threads, size, name) for threads in (1, 2) for size in (3, 130) for name in INFERENCE_VARIANTS
    ]
    for variant in found["variants"]:
        assert set(variant) == FIGURES
        assert variant["calls"] == (20 if variant["batch_size"] == 3 else 2)
        assert 0 < variant["p10_ms"] <= variant["median_ms"] <= variant["p90_ms"] <= variant["p99_ms"]
        assert variant["ratio_to_fp32"] > 0
        assert variant["ratio_to_fp32"] == 1 or variant["variant"] != "fp32"
    assert found["skipped"] == {}
    assert 0 <= found["largest_difference"] <= 1e-5
    assert found["load"]["packed"] > 0
    assert found["load"]["onnx"] > 0
    assert found["load"]["fp32"] is None
    processes = found["memory"]["processes"]
    assert {"packed_warm", "onnx_warm"} <= set(processes) <= {"packed_warm", "packed_cold", "onnx_warm", "onnx_cold"}
    for memory in processes.values():
        assert memory["load_seconds"] > 0
        assert 10 < memory["anonymous_mb"] < memory["scored_mb"]
        assert 10 < memory["libraries_mb"] <= memory["loaded_mb"] <= memory["scored_mb"] + 5
    rows = ARCHITECTURES["kaggle"].scaled(0.00001)
    assert found["memory"]["fp32_tables_mb"] == round(sum(rows) * 64 / 1e6, 1)
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert found["artifact_bytes"] == files[".dqrm"].stat().st_size > sum(rows) * 8
    assert found["onnx_bytes"] == files[".onnx"].stat().st_size > sum(rows) * 8
    # What stays in the folder is an artifact like any other.
    batch = generate(Artifact.open(files[".dqrm"], verify=True).content["model"], 4)
    assert dqrm.load(files[".dqrm"])(batch.dense, batch.ids).shape == (4,)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_fp32_model_has_the_values_of_the_artifact(tmp_path, bits):
    options = BenchInferenceConfig(**{**SMALL, "rows_scale": 0.001}, bits=bits)
    rows = ARCHITECTURES["kaggle"].scaled(options.rows_scale)
    write_artifact(tmp_path / "a.dqrm", options, rows)
    opened = Artifact.open(tmp_path / "a.dqrm")
    packed = opened.model()
    plain = fp32_model(packed)
    assert (plain.tables.bits, plain.top[0].bits, plain.tables.weight.dtype) == (32, 32, torch.float32)
    for number, count in enumerate(rows):
        values = plain.tables.table(number)
        highest = 2 ** (bits - 1) - 1
        assert float(values.abs().max()) <= (1 + 1 / highest) * count**-0.5 * 1.001
        assert count < 100 or float(values.abs().max()) > 0.9 * count**-0.5
    batch = generate(opened.content["model"], 50)
    with torch.inference_mode():
        assert torch.equal(packed.tables(batch.ids), plain.tables(batch.ids))
        found, expected = packed(batch.dense, batch.ids), plain(batch.dense, batch.ids)
    assert compare(found, expected) < 1e-6
    assert expected.std() > 0.01


def test_different_models_are_not_compared(monkeypatch):
    without_processes(monkeypatch)
    original = inference.fp32_model

    def changed(packed):
        model = original(packed)
        model.top[-1].bias.data += 0.1
        return model

    monkeypatch.setattr(inference, "fp32_model", changed)
    with pytest.raises(
        UserError, match=r"the probabilities of packed and fp32 differ by up to 0\.0\d+, more than 1e-05"
    ):
        run_inference(BenchInferenceConfig(**SMALL, variants=("packed", "fp32")))


def test_one_variant_alone_has_no_ratio(monkeypatch, tmp_path):
    without_processes(monkeypatch)
    for name in ("packed", "fp32"):
        found = run_inference(BenchInferenceConfig(**SMALL, variants=(name,), folder=str(tmp_path)))
        assert [variant["variant"] for variant in found["variants"]] == [name]
        assert found["variants"][0]["ratio_to_fp32"] == (1 if name == "fp32" else None)
    assert [path.name for path in tmp_path.iterdir()] == ["bench-kaggle-int4.dqrm"]


def test_variants_alternate_in_blocks_on_batches_of_their_own(tmp_path):
    split = write_split(tmp_path, 600, 13, (1000, 5), seed=1)
    seen: list[tuple[str, torch.Tensor]] = []
    scores = {name: (lambda batch, name=name: seen.append((name, batch.ids))) for name in ("packed", "fp32")}
    times = measure(scores, split, 5, BenchInferenceConfig(**SMALL), lambda *_: None)
    assert {name: len(taken) for name, taken in times.items()} == {"packed": 40, "fp32": 40}
    names = [name for name, _ in seen[2 * SMALL["warmup"] :]]
    rounds = []
    while names:
        block = next((at for at, name in enumerate(names) if name != names[0]), len(names))
        rounds.append(names[0])
        names = names[block:]
    assert len(rounds) > inference._BLOCKS
    first = {name: next(ids for seen_name, ids in seen if seen_name == name) for name in scores}
    assert not torch.equal(first["packed"], first["fp32"])


def test_temporary_files_are_removed(monkeypatch, tmp_path):
    without_processes(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_inference(BenchInferenceConfig(**SMALL, variants=("packed",)))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(UserError, match=r"the process that loads nothing\.dqrm failed: .*nothing\.dqrm"):
        inference._in_processes("packed", tmp_path / "nothing.dqrm", tmp_path / "nothing.dqrm", 1)


def test_tables_that_do_not_fit_are_refused(monkeypatch):
    def refuse(needed, device):
        raise UserError(f"{needed} bytes")

    monkeypatch.setattr(inference, "require_memory", refuse)
    values = sum(ARCHITECTURES["kaggle"].table_rows) * 16
    with pytest.raises(UserError, match=f"^{4 * values + values // 2} bytes"):
        run_inference(BenchInferenceConfig(variants=("packed", "fp32")))


def test_every_field_is_a_flag_with_help():
    command = cli.commands["bench"].commands["inference"]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    for field in fields(BenchInferenceConfig):
        assert len(options["--" + field.name.replace("_", "-")].help) > 20


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--variants=oonx", "variants has 'oonx'; did you mean 'onnx'?"),
        ("--variants=", "variants is empty; known are packed, onnx, fp32"),
        ("--bits=3", "bits: got '3', expected one of 2, 4, 8"),
        ("--rows-scale=2", "rows_scale is 2.0, expected above 0 and at most 1"),
        ("--batch-size=0", "batch_size is '0', expected sizes of 1 or more"),
        ("--batch-size=", "batch_size is '', expected sizes of 1 or more"),
        ("--threads=0-2", "threads is '0-2', expected numbers from 1 to 1024"),
        ("--threads=5000", "threads is '5000', expected numbers from 1 to 1024"),
        ("--repeats=0", "repeats is 0, expected 1 or more"),
        ("--arch=criteo", "arch: got 'criteo', expected one of kaggle, terabyte"),
        ("--folder=/nowhere/at/all", "there is no folder /nowhere/at/all"),
    ],
)
def test_impossible_flags_are_refused_in_one_sentence(capsys, monkeypatch, flag, message):
    code, out, err = command(capsys, "bench", "inference", flag)
    assert (code, out) == (2, "")
    assert f"bench inference: {message}" in err
    assert err.count("\n") == 1
    assert not Path("/nowhere").exists()
