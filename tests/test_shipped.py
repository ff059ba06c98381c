"""What we tell people to type, run on a few generated rows: the commands and the Python of the README, and the
commands in the header of every shipped configuration."""

import contextlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dqrm.cli import main
from dqrm.config import Config
from dqrm.data.synthetic import generate
from dqrm.data.synthetic_config import GenerateConfig

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text()


def commands(text):
    """The dqrm commands among the indented lines of a text, as argument lists."""
    return [shlex.split(line.strip())[1:] for line in text.splitlines() if re.match(r"\s{4,}dqrm ", line)]


@pytest.fixture
def files(stand_ins, tmp_path, monkeypatch):
    """A folder with small stand-ins for every file that the commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stand_ins, ".", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The same, made once."""
    folder = tmp_path_factory.mktemp("stand-ins")
    with contextlib.chdir(folder):
        _make_stand_ins()
    return folder


def _make_stand_ins():
    shutil.copytree(ROOT / "configs", "configs")
    generate("train.txt", GenerateConfig(rows=700))
    for day in range(3):
        generate(f"day_{day}", GenerateConfig(rows=300, seed=day))
        Path(f"day_{day}.truth.npy").unlink()  # 'day_*' would take it for a day
    random = np.random.default_rng(0)
    ml1m = ["user", "movie", "gender", "age", "occ", "zip", "year", "genres", "mpaa", "director", "actor1"]
    pl.DataFrame(
        {"label": random.integers(0, 2, 600)} | {name: random.integers(0, 40, 600).astype(str) for name in ml1m}
    ).write_parquet("clicks.parquet")
    mine = pl.DataFrame(
        {"clicked": random.integers(0, 2, 600)}
        | {name: random.integers(0, 40, 600).astype(str) for name in ("user", "ad", "site")}
        | {name: random.integers(0, 40, 600) for name in ("price", "age")}
    )
    mine[:300].write_parquet("clicks-1.parquet")
    mine[300:].write_parquet("clicks-2.parquet")
    mine.write_csv("clicks.csv")


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqrm", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code, (arguments, capsys.readouterr().err)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_of_a_shipped_configuration(path, files, monkeypatch, capsys):
    header = "\n".join(line.lstrip("#") for line in path.read_text().splitlines() if line.startswith("#"))
    found = commands(header.replace("\n  ", "\n    "))
    assert found, "no command in the header"
    assert any(f"configs/{path.name}" in arguments for arguments in found)
    for arguments in found:
        run(arguments, monkeypatch, capsys)
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


def test_the_commands_of_the_readme(files, monkeypatch, capsys):
    found = commands(README)
    assert len(found) >= 10
    for arguments in found:
        if "--resume" not in arguments:
            shutil.rmtree(arguments[arguments.index("-o") + 1], ignore_errors=True) if "-o" in arguments else None
        run(arguments, monkeypatch, capsys)


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_the_python_of_the_readme(number, files):
    block = README.split("```python\n")[number + 1].split("```")[0]
    exec(compile(block, "README.md", "exec"), {})


def test_the_python_of_the_export_page(files, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    section = README.split("## Your own data")[1].split("In Python:")[0]
    for arguments in commands(section):
        if arguments[0] in ("prepare", "train", "export") and "--resume" not in arguments:
            run(arguments, monkeypatch, capsys)
    (block,) = (part.split("```")[0] for part in (ROOT / "docs/export.md").read_text().split("```python\n")[1:])
    capsys.readouterr()
    exec(compile(block, "docs/export.md", "exec"), {})
    printed = float(re.search(r"\[([0-9.e-]+)\]", capsys.readouterr().out)[1])
    Path("one.csv").write_text("user,ad,site,price,age\n7,3,1,12,\n")
    run(["predict", "mine.dqrm", "one.csv", "-o", "one.parquet"], monkeypatch, capsys)
    assert pl.read_parquet("one.parquet")["probability"][0] == pytest.approx(printed, abs=1e-6)


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
