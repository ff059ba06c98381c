"""A format that another package brings is one that `dqrm export` writes, opens, evaluates and lists."""

import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import dqrm
from cli_helpers import command
from conftest import tiny
from dqrm.cli import cli
from dqrm.export import formats

TOY = '''
"""A format of its own: the state dict of the packed model, and what made it."""

import json

from dqrm.export.formats.base import Format, beside


class ToyFormat(Format):
    suffix = ".toy"
    summary = "a state dict, for the tests"

    def write(self, model, path, metadata):
        import torch

        torch.save({"model": model, "metadata": dict(metadata)}, path)
        path.with_name(path.name + ".md").write_text("what it is")

    def open(self, path, threads=0):
        import torch

        model = torch.load(path, weights_only=False)["model"]
        return lambda batch: model(batch.dense, batch.ids, batch.bags).detach()

    def content(self, path):
        import torch

        return json.loads(torch.load(path, weights_only=False)["metadata"]["dqrm"])

    def companions(self, path):
        return beside(path, r"\\.md")
'''


@pytest.fixture(scope="module")
def trained(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    dqrm.train(generated, folder / "run", tiny(max_steps=3))
    return folder / "run"


@pytest.fixture
def toy(monkeypatch):
    """The format, registered; the register is afterwards as it was."""
    names = {}
    exec(TOY, names)
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    names["ToyFormat"].__module__ = __name__
    formats.register(names["ToyFormat"]())
    return formats.FORMATS[".toy"]


def test_a_registered_format_is_written_opened_and_evaluated(toy, trained, generated, tmp_path, capsys):
    code, out, err = command(capsys, "export", trained, "-o", tmp_path / "m.toy", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["largest_difference"] == 0
    assert result["files"] == [str(tmp_path / "m.toy"), str(tmp_path / "m.toy.md")]
    assert result["parts"]["file"] == result["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    model = dqrm.Run.open(trained).load_model()[0]
    batch = next(iter(generated.split("test").batches(50)))
    with torch.inference_mode():
        assert torch.equal(formats.score_file(tmp_path / "m.toy")(batch), model(batch.dense, batch.ids, batch.bags))
    expected = dqrm.evaluate(trained, generated)
    code, out, err = command(capsys, "eval", tmp_path / "m.toy", generated.path, "--json")
    assert (code, json.loads(out)) == (0, pytest.approx(expected)), err
    log, config = generated.path.parent / "log.txt", dqrm.PredictConfig(data=str(generated.path))
    assert dqrm.predict(tmp_path / "m.toy", log, tmp_path / "p.csv", config)["rows"] == sum(generated.rows.values())


def test_the_help_and_the_errors_list_what_is_registered(toy, trained, tmp_path, capsys):
    for verb in ("export", "quantize"):
        shown = CliRunner().invoke(cli, [verb, "--help"], terminal_width=120).output
        for known in formats.formats().values():
            assert re.search(rf"^  {re.escape(known.suffix)} +{re.escape(known.summary)}", shown, re.MULTILINE)
            assert known.extra is None or f"(needs dqrm[{known.extra}])" in shown
    for arguments, says in (
        (
            ("export", trained, "-o", tmp_path / "m.bin"),
            "should end in .dqrm, .onnx, .pt2, .pte, / or .toy, which says",
        ),
        (("export", trained, "-o", tmp_path / "m.toy", "--vocabulary", "beside"), ".toy files hold no vocabularies"),
        (("eval", tmp_path / "m.pt2", "data"), "expected a run folder, a .dqrm, a .onnx or a .toy file; torch.export"),
    ):
        code, _, err = command(capsys, *arguments)
        assert (code, says in err) == (2, True), err


def test_a_replaced_file_takes_its_companions_along(toy, trained, tmp_path):
    dqrm.export_run(trained, tmp_path / "m.toy")
    write = type(toy).write
    type(toy).write = lambda self, model, path, metadata: torch.save({"model": model, "metadata": metadata}, path)
    try:
        dqrm.export_run(trained, tmp_path / "m.toy")
    finally:
        type(toy).write = write
    assert [path.name for path in tmp_path.iterdir()] == ["m.toy"]


def test_an_installed_package_brings_a_format_by_its_entry_point(trained, tmp_path):
    (tmp_path / "toy_format.py").write_text(TOY)
    about = tmp_path / "toy_format-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dqrm.formats]\ntoy = toy_format:ToyFormat\n")

    def dqrm_export(output):
        program = f"import sys; sys.path.append({str(tmp_path)!r}); import dqrm.__main__ as program; program.main()"
        arguments = [sys.executable, "-c", program, "export", *output]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    done = dqrm_export([trained, "-o", tmp_path / "m.toy"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.toy").exists()
    assert ".toy   a state dict, for the tests" in dqrm_export(["--help"]).stdout
    (tmp_path / "toy_format.py").write_text("import nothing_of_this_name")
    done = dqrm_export([trained, "-o", tmp_path / "n.toy"])
    assert done.returncode == 2
    assert "the export format 'toy' (toy_format:ToyFormat) cannot be loaded: No module named" in done.stderr
    assert done.stderr.count("\n") == 1
