"""The command line: quick help, one JSON object, and one sentence with exit code 2 for what the user got wrong."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from statistics import median
from time import perf_counter

import click
import pytest
from click.testing import CliRunner

from dqrm.cli import cli, main
from dqrm.config import SECTIONS
from dqrm.data.config import PrepareConfig
from dqrm.data.synthetic_config import GenerateConfig

TINY = ["--embedding-dim=4", "--bottom-mlp=8-4", "--top-mlp=8-1", "--device=cpu"]


def run(capsys, *arguments):
    """Exit code, standard output and standard error of a command, run in this process."""
    code = 0
    old = sys.argv
    sys.argv = ["dqrm", *map(str, arguments)]
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys, dqrm.cli; print([m for m in ('torch', 'numpy', 'polars', 'sklearn', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.skipif(
    not os.environ.get("DQRM_TIMINGS"), reason="a timing; set DQRM_TIMINGS=1 to run it on a quiet machine"
)
def test_help_takes_under_half_a_second():
    times = []
    for _ in range(5):
        started = perf_counter()
        subprocess.run([sys.executable, "-m", "dqrm", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(perf_counter() - started)
    assert median(times) < 0.5


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_flag_of_every_verb_has_help(name):
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.opts
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0


@pytest.mark.parametrize(
    ("verb", "classes"), [("train", SECTIONS.values()), ("prepare", [PrepareConfig]), ("generate", [GenerateConfig])]
)
def test_every_field_is_a_flag_of_the_same_name(verb, classes):
    flags = {option for parameter in cli.commands[verb].params for option in parameter.opts}
    for cls in classes:
        for field in fields(cls):
            assert "--" + field.name.replace("_", "-") in flags


def test_from_a_raw_log_to_figures(capsys, tmp_path):
    log, data, out = tmp_path / "log.txt", tmp_path / "data", tmp_path / "run"
    assert run(capsys, "generate", "-o", log, "--rows=1500")[0] == 0
    code, text, _ = run(capsys, "prepare", log, "--layout", "criteo-kaggle", "-o", data, "--json")
    assert code == 0
    assert json.loads(text)["rows"] == {"train": 1286, "validation": 107, "test": 107}
    code, text, _ = run(capsys, "train", data, "-o", out, *TINY, "--bits=4", "--json")
    summary = json.loads(text)
    assert code == 0
    code, text, _ = run(capsys, "eval", out, data, "--split", "test", "--json")
    metrics = json.loads(text)
    assert code == 0
    assert list(metrics) == ["rows", "auc", "log_loss", "accuracy", "ne", "calibration"]
    assert metrics == summary["test"]
    for path, kind in ((data, "dataset"), (out, "run")):
        assert json.loads(run(capsys, "info", path, "--json")[1])["kind"] == kind
        code, text, _ = run(capsys, "info", path)
        assert code == 0
        assert str(path) in text.replace("\n", "")
    code, text, _ = run(capsys, "eval", out, data, "--checkpoint", "last", "--split", "validation")
    assert code == 0
    assert "calibration" in text
    assert run(capsys, "train", "--resume", out)[0] == 0


def test_what_the_user_got_wrong_is_one_sentence(capsys, generated, bags_data, tmp_path):
    out, data = tmp_path / "run", generated.path
    assert run(capsys, "train", data, "-o", out, *TINY)[0] == 0
    config = tmp_path / "c.yaml"
    config.write_text("training:\n  epohcs: 3\n")
    wrong = {
        ("train", data, "-o", out): "exists and is not empty",
        ("train", tmp_path / "no", "-o", tmp_path / "x"): "is not a folder",
        ("train", data): "train needs a dataset folder and a run folder",
        ("train", data, "-o", tmp_path / "x", "--bits=5"): "bits is 5",
        ("train", data, "-o", tmp_path / "x", "--batch-size=big"): "batch_size: got 'big'",
        ("train", data, "-o", tmp_path / "x", "--config", config): "did you mean 'epochs'",
        ("train", data, "-o", tmp_path / "x", "--config", "no.yaml"): "cannot read the configuration no.yaml",
        ("train", "--resume", out, "--epochs=3"): "it takes no --epochs",
        ("train", "--resume", tmp_path / "no"): "does not exist",
        ("eval", out, bags_data.path): "is not the dataset that",
        ("eval", out, data, "--split", "tset"): "did you mean 'test'",
        ("eval", data, data): "expected a run folder",
        ("info", tmp_path / "no"): "does not exist",
        ("info", tmp_path): "is neither a dataset folder nor a run folder",
        ("prepare", "no.txt", "-o", tmp_path / "x"): "no.txt",
        ("generate", "-o", tmp_path / "x.txt", "--rows=0"): "rows",
        ("train", data, "-o", out, "--epoch=3"): "--epoch",
    }
    for arguments, message in wrong.items():
        code, text, err = run(capsys, *arguments)
        assert code == 2, (arguments, err)
        assert message in err, (arguments, err)
        assert "Traceback" not in err
        assert text == ""
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.txt").exists()


def test_python_minus_m_and_the_version():
    text = subprocess.check_output([sys.executable, "-m", "dqrm", "--version"], text=True)
    assert text.startswith("dqrm ")
