"""What we ship besides the package: the commands in the header of every configuration, the examples, the notebook."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import yaml

from cli_helpers import command
from data_helpers import content
from dqrm.config import Config
from dqrm.quant.config import QUANTIZERS
from shipped_helpers import ROOT

pytestmark = pytest.mark.long
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_of_a_shipped_configuration(path, stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(stand_ins(tmp_path))
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    shipped = [shlex.split(line) for line in header if line.startswith("dqrm ")]
    assert shipped, "no command in the header"
    assert any(f"configs/{path.name}" in arguments for arguments in shipped)
    for arguments in shipped:
        code, _, errors = command(capsys, *arguments[1:])
        assert not code, (arguments, errors)
    if path.stem != "ml1m_data":
        assert Path("runs", path.stem, "summary.json").exists()


def test_the_papers_settings_are_in_the_configurations():
    for name, dim, batch, period in (("kaggle", 16, 128, 200), ("terabyte", 64, 2048, 1000)):
        fp32, int4 = (Config.load(ROOT / "configs" / f"{name}_{kind}.yaml") for kind in ("fp32", "int4"))
        assert (fp32.quantization.effective_table_bits, fp32.quantization.effective_mlp_bits) == (32, 32)
        assert (int4.quantization.effective_table_bits, int4.quantization.effective_mlp_bits) == (4, 4)
        assert int4.quantization.scale_period == period
        assert (fp32.model, fp32.optimizer, fp32.training) == (int4.model, int4.optimizer, int4.training)
        assert (int4.model.embedding_dim, int4.training.batch_size, int4.optimizer.learning_rate) == (dim, batch, 0.1)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "ml1m_data"], ids=lambda path: path.stem)
def test_a_configuration_says_whatever_the_recipe_would_choose(path):
    """So that it means the same when the recipe's numbers change."""
    given = yaml.safe_load(path.read_text())
    assert {"optimizer", "learning_rate"} <= given["optimizer"].keys()
    assert {"epochs", "batch_size", "patience", "callbacks"} <= given["training"].keys()
    assert given["quantization"]["bits"] == 32 or {"quantizer", "scale_refresh"} <= given["quantization"].keys()
    config = Config.load(path)
    assert (config.optimizer.optimizer, config.training.patience, config.training.callbacks) == ("sgd", 0, ())


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_own_model_learns_and_packs():
    assert example("own_model")["main"]() > 0.7


def test_own_quantizer_learns_its_scale(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "learned_scale", "set by the example, removed after the test")
    before, after = example("own_quantizer")["main"]()
    assert 0 < after != before


def test_scoring_service_answers_as_the_model_does(tmp_path):
    import dqrm

    service = example("scoring_service")
    path = service["train_model"](tmp_path)
    rows = [{"user": "3", "ad": "7"}, {"user": None, "ad": "unseen"}]
    with service["serving"](path) as address:
        assert service["ask"](address, rows) == pytest.approx(dqrm.load(path).score(rows).tolist(), abs=1e-6)
        with pytest.raises(urllib.error.HTTPError) as refused:
            service["ask"](address, [{"user": "3"}])
        assert refused.value.code == 400
        assert "ad" in json.load(refused.value)["error"]
    assert len(service["main"]()) == 8


def test_onnx_elsewhere_gives_the_same_probabilities():
    pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    assert example("onnx_elsewhere")["main"]() < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrec_codec_learns():
    if importlib.util.find_spec("torchrec") is None:
        pytest.skip("the extra dqrm[torchrec] and TorchRec are not installed")
    # A process of its own: its ranks import the file again.
    command = [sys.executable, str(ROOT / "examples/torchrec_codec.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    before, after = re.fullmatch(r"loss (\S+) -> (\S+)", ended.stdout.strip().splitlines()[-1]).groups()
    assert float(after) < 0.9 * float(before)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("pyspark", "spark_parts"), ("ray", "ray_parts")])
def test_parts_of_a_cluster_are_the_rows_of_one_machine(tmp_path, package, name):
    import polars as pl

    import dqrm

    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "pyspark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    shipped = example(name)
    dataset = shipped["main"](tmp_path)
    shown, clicks, ads = (pl.read_parquet(tmp_path / f"{log}.parquet") for log in ("impressions", "clicks", "ads"))
    robots = {user for user, rows in shown["user"].value_counts().rows() if rows > 200}
    clicked, advertiser = set(clicks["id"].to_list()), dict(ads.rows())
    rows = [
        {**row, "clicked": int(row["id"] in clicked), "advertiser": advertiser[row["ad"]]}
        for row in sorted(shown.to_dicts(), key=lambda row: (row["day"], row["time"], row["id"]))
        if row["user"] not in robots
    ]
    assert 0 < len(rows) < len(shown)
    assert len(list((tmp_path / "parts").rglob("*.parquet"))) > 1
    assert content(dataset) == content(dqrm.prepare(pl.DataFrame(rows), tmp_path / "plain", shipped["CONFIG"]))


def test_the_cells_of_the_notebook_run():
    notebook = json.loads((ROOT / "examples/quick_start.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(cells):
            exec(compile(cell, f"cell {number}", "exec"), names)
    assert re.search(r"4 bits: test AUC 0\.\d+", printed.getvalue())


def test_every_example_is_in_the_gallery_and_tested():
    gallery, tests = (ROOT / "docs/gallery.md").read_text(), Path(__file__).read_text()
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"`examples/{path.name}`" in gallery
            assert path.stem in tests
