"""Runs with each quantizer and option of quantization: resumed bit for bit, and exported as they were evaluated."""

import json
import re
from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm.artifact.file import Artifact
from dqrm.info import print_description
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.packing import joined
from dqrm.training.launch import train
from dqrm.training.run import Run
from launch_helpers import same_run
from run_helpers import assert_resumes
from test_cli import run as command

pytestmark = pytest.mark.long
OPTIONS = {
    "small tables": {"small_table_bits": 8, "small_table_rows": 50},
    "small tables, periodic": {"small_table_bits": 16, "small_table_rows": 50, "scale_refresh": "periodic"},
    "mse": {"quantizer": "mse", "scale_period": 7},
    "percentile, rescanned": {"quantizer": "percentile", "percentile": 99, "scale_refresh": "running_max"},
    "mse, stochastic, small tables": {
        "quantizer": "mse",
        "scale_period": 7,
        "forward_rounding": "stochastic",
        "small_table_bits": 8,
        "small_table_rows": 50,
    },
    "naive": {"quantizer": "naive"},
    "row": {"table_granularity": "row"},
    "row, periodic, stochastic": {
        "table_granularity": "row",
        "scale_period": 7,
        "forward_rounding": "stochastic",
    },
    "block": {"table_granularity": "block:8"},
    "block, periodic": {"table_granularity": "block:32", "scale_period": 7},
    "affine": {"table_qscheme": "affine"},
    "affine, block": {"table_qscheme": "affine", "table_granularity": "block:8"},
    "affine, row, periodic": {"table_qscheme": "affine", "table_granularity": "row", "scale_period": 7},
    "stochastic": {"forward_rounding": "stochastic"},
    "stochastic, small tables": {"forward_rounding": "stochastic", "small_table_bits": 8, "small_table_rows": 50},
}
CASES = pytest.mark.parametrize("name", OPTIONS)


def config(name, **training):
    base = tiny(optimizer="rowwise_adagrad", max_steps=30, **training)
    options = OPTIONS[name]
    periodic = "scale_period" in options or options.get("scale_refresh") == "periodic"
    return replace(base, quantization=dqrm.QATConfig(**({} if periodic else {"rescan_period": 7}), **options))


@CASES
def test_killed_and_resumed_is_as_if_never_killed(generated, tmp_path, name):
    chosen = config(name, checkpoint_every=4, eval_every=11, log_every=5)
    assert_resumes(generated, tmp_path, chosen, 14)


@CASES
def test_two_simulated_ranks_give_the_codes_of_one_and_the_same_bits_each_time(generated, tmp_path, name):
    """At learning rate 0: each rank uses the same values of a weight."""
    base, exchange = config(name), dqrm.ExchangeConfig(simulate_ranks=2, table_codec="fp32", mlp_codec="fp32")
    still = replace(
        base, optimizer=replace(base.optimizer, learning_rate=0.0), training=replace(base.training, max_steps=5)
    )
    losses = [
        train(generated, tmp_path / which, chosen)["best"]["metrics"]["log_loss"]
        for which, chosen in (("one", still), ("two", replace(still, exchange=exchange)))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    found = [
        json.loads((tmp_path / which / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]
        for which in ("one", "two")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    moved = replace(base, exchange=replace(exchange, table_codec="int8", mlp_codec="int8"))
    for which in ("a", "b"):
        train(generated, tmp_path / which, moved)
    same_run(tmp_path / "a", tmp_path / "b")


@CASES
def test_the_artifact_gives_the_figures_of_the_checkpoint_to_six_digits(generated, tmp_path, capsys, name):
    train(generated, tmp_path / "run", config(name))
    found = dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm")
    assert found["largest_difference"] == 0
    figures = []
    for path in (tmp_path / "run", tmp_path / "model.dqrm"):
        code, out, err = command(capsys, "eval", path, generated.path, "--json", "--device=cpu")
        assert code == 0, err
        figures.append(json.loads(out))
    assert {key: round(value, 6) for key, value in figures[0].items()} == {
        key: round(value, 6) for key, value in figures[1].items()
    }


def test_the_file_says_the_bits_of_each_table_and_so_does_info(generated, tmp_path, capsys):
    summary = train(generated, tmp_path / "run", config("small tables"))
    dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm")
    opened = Artifact.open(tmp_path / "model.dqrm", verify=True)
    bits = [8 if rows < 50 else 4 for rows in generated.table_rows]
    assert opened.content["model"]["table_bits"] == bits
    assert set(bits) == {4, 8}
    assert opened.container.version == 2
    sizes = opened.sizes()
    assert sizes["table codes"] == sum(rows * 4 * each // 8 for rows, each in zip(generated.table_rows, bits))
    assert summary["stored_bytes"]["tables"] == sizes["table codes"] + sizes["table scales"]
    capsys.readouterr()
    print_description(str(tmp_path / "model.dqrm"))
    out = capsys.readouterr().out
    assert f"tables 4 ({bits.count(4)} of 26) and 8 ({bits.count(8)} of 26) bits" in " ".join(out.split())
    print_description(str(tmp_path / "run"))
    assert "Tables 4 bits (8 below 50 rows)" in " ".join(capsys.readouterr().out.split())
    uniform = train(generated, tmp_path / "uniform", tiny(max_steps=3))
    assert uniform["stored_bytes"]["tables"] < summary["stored_bytes"]["tables"]
    dqrm.export_run(tmp_path / "uniform", tmp_path / "uniform.dqrm")
    assert Artifact.open(tmp_path / "uniform.dqrm").container.version == 1  # which an older dqrm reads


@pytest.mark.parametrize(
    ("name", "version", "granularity", "qscheme"),
    [("row", 1, "row", "symmetric"), ("block", 3, "block:8", "symmetric"), ("affine", 3, "table", "affine"),
     ("affine, block", 3, "block:8", "affine")],
)  # fmt: skip
def test_the_file_says_granularity_and_zero_points_and_info_the_bits_per_weight(
    generated, tmp_path, capsys, name, version, granularity, qscheme
):
    summary = train(generated, tmp_path / "run", config(name))
    dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm")
    opened = Artifact.open(tmp_path / "model.dqrm", verify=True)
    assert opened.container.version == version
    model = opened.content["model"]
    assert (model["table_granularity"], model["table_qscheme"]) == (granularity, qscheme)
    rows_of = {"table": 1 << 30, "row": 1, "block:8": 8}[granularity]
    groups, weights = sum(-(-rows // rows_of) for rows in generated.table_rows), 4 * sum(generated.table_rows)
    sizes = opened.sizes()
    assert sizes["table scales"] == groups * (8 if qscheme == "affine" else 4)
    assert summary["stored_bytes"]["tables"] == sizes["table codes"] + sizes["table scales"]
    bits = 8 * (sizes["table codes"] + sizes["table scales"]) / weights
    assert opened.describe()["table_bits_per_weight"] == pytest.approx(bits, abs=1e-4)
    assert bits == pytest.approx(4 + 8 * sizes["table scales"] / weights)
    capsys.readouterr()
    told = []
    for path in ("model.dqrm", "run"):
        print_description(str(tmp_path / path))
        told.append(" ".join(capsys.readouterr().out.split()))
        (figure,) = re.findall(r"(\S+) bits per weight of the tables", told[-1])
        assert float(figure.strip("(")) == pytest.approx(bits, abs=1e-3)
        assert ("zero point" in told[-1]) == (qscheme == "affine")
    scales = f" per {granularity}" if granularity != "block:8" else " per 8 rows"
    assert all(scales in text for text in told)
    dqrm.export_run(tmp_path / "model.dqrm", tmp_path / "model.onnx")
    dqrm.export_run(tmp_path / "run", tmp_path / "model.pt2")


@pytest.mark.parametrize("granularity", ["table", "row"])
def test_quantization_after_training_has_bits_by_size_too(generated, tmp_path, granularity):
    train(generated, tmp_path / "run", tiny(32, max_steps=10))
    options = dqrm.PTQConfig(small_table_bits=8, small_table_rows=50, granularity=granularity)
    found = dqrm.export_run(tmp_path / "run", tmp_path / "model.dqrm", ptq=options)
    assert found["largest_difference"] < 1e-6
    four = dqrm.export_run(tmp_path / "run", tmp_path / "four.dqrm", ptq=dqrm.PTQConfig(granularity=granularity))
    assert found["largest_difference_from_fp32"] < four["largest_difference_from_fp32"] + 1e-3
    assert found["bits_per_weight"] > four["bits_per_weight"]
    dqrm.export_run(tmp_path / "model.dqrm", tmp_path / "model.onnx")
    loaded = dqrm.load(tmp_path / "model.dqrm")
    for number, rows in enumerate(generated.table_rows):
        width = {8: 4, 4: 2}[8 if rows < 50 else 4]
        part = loaded.tables.parts[0 if width == 2 else 1]
        assert part.codes.shape[1] == width
        assert number in loaded.tables.members[width * 2]


@pytest.mark.parametrize("options", [
    {"granularity": "block:4"}, {"qscheme": "affine", "clip": "none"},
    {"granularity": "row", "qscheme": "affine", "clip": "none"}, {"granularity": "block:16", "clip": "none"},
])  # fmt: skip
def test_quantization_after_training_knows_the_scales_of_training(generated, tmp_path, options):
    """Without clipping, they are those that training's quantizers derive from the same weights."""
    base = tiny(max_steps=5)
    dqrm.train(generated, tmp_path / "run", replace(base, quantization=dqrm.QATConfig(bits=32)))
    exported = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(**options))
    assert exported["largest_difference"] < 1e-5
    packed = dqrm.load(tmp_path / "m.dqrm").tables
    model, _ = Run.open(tmp_path / "run").load_model()
    qat = dqrm.QATConfig(
        table_granularity=options.get("granularity", "table"), table_qscheme=options.get("qscheme", "symmetric")
    )
    tables = QuantEmbeddingBagCollection(
        model.tables.table_rows, 4, multi=model.tables.multi, qat=qat, _weight=model.tables.weight.detach()
    )
    expected = joined(tables.eval().weight_fake_quantizer.table_scales(tables.weight))
    assert packed.scale.shape == expected["scale"].shape
    if options.get("clip") == "none":
        assert torch.equal(packed.scale, expected["scale"])
        assert expected["zero_point"] is None or torch.equal(packed.zero_point, expected["zero_point"])


@pytest.mark.parametrize(("options", "sentence"), [
    ({"granularity": "block:3"}, "granularity is 'block:3', expected 'table', 'row', or 'block:N'"),
    ({"qscheme": "affine"}, "qscheme is 'affine', but clip is 'mse': .*; use clip 'none'"),
    ({"granularity": "block:4", "small_table_bits": 8}, "granularity is 'block:4', but small_table_bits is 8"),
    ({"qscheme": "affine", "clip": "none", "table_bits": 32}, "qscheme is 'affine', but table_bits is 32"),
])  # fmt: skip
def test_impossible_quantization_after_training_is_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        dqrm.PTQConfig(**options)


def test_a_command_line_in_32_bits_takes_the_files_small_tables_with_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("quantization:\n  bits: 4\n  small_table_bits: 8\n  small_table_rows: 7\n")
    assert dqrm.Config.load(path).quantization.bits_of_table(6) == 8
    found = dqrm.Config.load(path, {"bits": 32}).quantization
    assert (found.small_table_bits, found.bits_of_table(6)) == (None, 32)
    path.write_text("quantization:\n  bits: 4\n  table_granularity: row\n  table_qscheme: affine\n")
    assert dqrm.Config.load(path).quantization.small_table_bits is None
    assert dqrm.Config.load(path, {"bits": 2}).quantization.table_granularity == "row"
    assert dqrm.Config.load(path, {"bits": 32}).quantization == dqrm.QATConfig(bits=32)
