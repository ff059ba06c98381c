"""The documentation holds: code blocks run, links and names exist, figures are those that were stored."""

import contextlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import dqrm
from cli_helpers import command
from dqrm.cli import cli
from dqrm.export import formats
from dqrm.options import build, read_yaml
from shipped_helpers import PAGES, ROOT, blocks, commands

pytestmark = pytest.mark.long
MARKDOWN = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def workspace(stand_ins, tmp_path_factory):
    """The stand-ins, and what the pages take as made: data/mine, runs/mine and mine.dqrm of the README, data/ml1m."""
    folder = stand_ins(tmp_path_factory.mktemp("workspace"))
    with contextlib.chdir(folder):
        columns = {"categorical": ("user", "ad", "site"), "dense": ("price", "age"), "cross": ("user*site",)}
        data = dqrm.prepare("clicks.csv", "data/mine", dqrm.PrepareConfig(label="clicked", **columns))
        dqrm.train(data, "runs/mine", dqrm.Config(training=dqrm.TrainingConfig(threads=1)))
        dqrm.export_run("runs/mine", "mine.dqrm")
        ml1m = build(dqrm.PrepareConfig, read_yaml("configs/ml1m_data.yaml"), "ml1m")
        dqrm.prepare("clicks.parquet", "data/ml1m", ml1m)
    return folder


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_code_of_a_page_runs(path, workspace, tmp_path, monkeypatch, capsys):
    page = blocks(path.read_text())
    if not any(block.language in ("python", "bash") for block in page):
        pytest.skip("no code on this page")
    if any("onnx" in block.text for block in page):
        pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")
    if any("dqrm.torchrec" in block.text for block in page):
        pytest.importorskip("torchrec", reason="the extra dqrm[torchrec] and TorchRec are not installed")
    if any("dqrm report" in block.text for block in page):
        pytest.importorskip("vl_convert", reason="the extra dqrm[report] is not installed")
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path, dirs_exist_ok=True))
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))  # a page registers one
    names: dict = {}
    for block in page:
        where = f"{name(path)}, line {block.line}"
        if block.language == "python":
            for output in re.findall(r'(?:prepare|train)\([^)]*?"((?:data|runs)/\w+)"', block.text):
                shutil.rmtree(output, ignore_errors=True)
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(path), "exec"), names)
        elif block.language == "bash":
            for arguments in commands(block.text):
                if block.not_run:
                    check(arguments, where)
                else:
                    run(arguments, where, capsys)


def run(arguments, where, capsys):
    """Run one command of a page; what others than dqrm do is only checked."""
    if arguments[0] != "dqrm":
        check(arguments, where)
        return
    arguments = arguments[1:]
    if "-o" in arguments:  # pages repeat each other's outputs
        output = Path(arguments[arguments.index("-o") + 1])
        shutil.rmtree(output, ignore_errors=True)
    if arguments[0] == "study":  # a few steps of one seed
        arguments += ["--seeds", "1", "--set", "training.max_steps=3", "--jobs", "2"]
    code, _, errors = command(capsys, *arguments)
    assert not code, f"{where}: dqrm {' '.join(arguments)}: {errors}"


def check(arguments, where):
    """That what a command names exists: flags, files, targets of make."""
    if arguments[0] == "torchrun":
        arguments = ["dqrm", *arguments[arguments.index("dqrm") + 1 :]]
    if arguments[0] == "dqrm":
        context, group, rest = cli.make_context("dqrm", arguments[1:]), cli, arguments[1:]
        while rest:
            _, found, rest = group.resolve_command(context, rest)
            context = found.make_context(found.name, list(rest), parent=context)
            if not hasattr(found, "resolve_command"):
                return
            group = found
    elif arguments[0] == "python":
        assert (ROOT / arguments[1]).exists(), f"{where}: {arguments[1]} does not exist"
    elif arguments[0] == "make":
        assert re.search(rf"^{arguments[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{where}: make {arguments[1]}"
    else:
        assert arguments[0] in ("git", "pip"), f"{where}: no rule for {arguments[0]}"


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_blocks_say_their_language_and_commands_are_in_blocks(path):
    text = path.read_text()
    for block in blocks(text):
        assert block.language in ("python", "bash", "text", "yaml", "json"), f"{name(path)}, line {block.line}"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    assert not re.search(r"^ {4}(dqrm|python|torchrun|make) ", outside, re.M)


def slug(heading):
    """The anchor of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower())


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_relative_links_hold(path):
    for target in LINK.findall(path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
            assert anchor in map(slug, headings), f"{name(path)} links to {target}"
        if path.is_relative_to(ROOT / "docs"):
            assert page.is_relative_to(ROOT / "docs"), f"{name(path)} links to {target}, which the site does not have"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs')}\n" in text


def test_the_reference_has_every_public_name():
    documented = re.findall(r"^::: dqrm\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(documented) == sorted(set(dqrm.__all__) - {"__version__"})


def test_the_pictures_figures_are_those_of_the_tables():
    figures = json.loads((ROOT / "docs/figures/results.json").read_text())
    for panel in figures.values():
        assert {"title", "settings", "machine", "command", "rows"} <= set(panel)
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/results.md")]
    for page in pages:
        for row in figures["quality"]["rows"]:
            assert f"| {row['mean']:.4f} ± {row['std']:.4f} |" in page
        for row in figures["size"]["rows"]:
            assert f"| {row['value']} MB |" in page
    for row in figures["table"]["rows"]:
        assert f"| {row['value']:.3f} |" in (ROOT / "docs/performance.md").read_text()


def test_the_picture_is_drawn_from_the_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra dqrm[docs] is not installed")
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/figures/draw.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures = json.loads((ROOT / "docs/figures/results.json").read_text())
    for number in range(2):
        script.draw(figures, tmp_path / f"{number}.svg")
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()
    assert (ROOT / "docs/figures/results.svg").read_text().startswith("<?xml")


def test_citation_and_change_log_know_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dqrm.__version__
    assert {reference["url"] for reference in citation["references"]} == {
        "https://arxiv.org/abs/2410.20046", "https://arxiv.org/abs/1906.00091",
    }  # fmt: skip
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == "Unreleased"
    assert dqrm.__version__ in sections


def test_the_registers_of_contributing_exist():
    rows = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith(("| a ", "| an "))]
    counts = [int(row.split("|")[4]) for row in rows]
    assert counts == [2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    for row in rows:
        for register, file in re.findall(r"`([A-Z_]+)` in `([\w/.]+)`", row):
            assert re.search(rf"^{register}\b.* = ", (ROOT / "src/dqrm" / file).read_text(), re.M), row


def test_nothing_is_pickled():
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"import (pickle|dill|joblib)|torch\.(load|save)\(|allow_pickle=True", text), name(path)
