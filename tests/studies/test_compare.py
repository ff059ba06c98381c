"""`dqrm compare`: runs and studies in the terminal, whatever their names and however far they are."""

import json
import shutil

import pytest

from cli_helpers import command
from conftest import tiny
from dqrm.errors import UserError
from dqrm.studies.compare import compare
from dqrm.studies.folder import Folder, Result, results_csv
from dqrm.studies.tables import markdown, summarize
from dqrm.training.launch import train
from run_helpers import Killed, killer


@pytest.fixture(scope="module")
def runs(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for bits in (32, 4):
        train(generated, folder / f"b{bits}", tiny(bits, epochs=3, seed=bits))
    with pytest.raises(Killed):
        train(generated, folder / "killed", tiny(), progress=killer(20))
    return folder


def test_runs_are_compared_with_the_first(runs, capsys):
    paths = [str(runs / name) for name in ("b32", "b4", "killed")]
    code, shown, _ = command(capsys, "compare", *paths, "--json")
    found = json.loads(shown)
    assert code == 0
    assert list(found["variants"]) == paths
    test = [json.loads((runs / name / "summary.json").read_text())["test"] for name in ("b32", "b4")]
    assert found["variants"][paths[1]]["difference"]["auc"]["mean"] == test[1]["auc"] - test[0]["auc"]
    assert found["variants"][paths[1]]["seeds"] == [4]
    assert len(found["variants"][paths[1]]["validation_auc"]) == 3
    assert found["variants"][paths[2]]["test"] == {}
    code, shown, _ = command(capsys, "compare", *paths)
    assert f"{test[1]['auc'] - test[0]['auc']:+.5f}" in shown
    assert "do not compare" not in shown


def test_runs_of_different_data_do_not_compare(runs, bags_data, tmp_path, capsys):
    train(bags_data, tmp_path / "other", tiny(epochs=1, max_steps=2))
    assert "different data" in command(capsys, "compare", runs / "b4", tmp_path / "other")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "metrics.jsonl, line 1 is not a JSON object"),
        ("[1]\n", "metrics.jsonl, line 1 is not a JSON object"),
        ("\xff\xfe\n", "metrics.jsonl, line 1 is not a JSON object"),
        ('{"kind": "evaluation", "epoch": 1, "step": 3, "auc": NaN}\n{"kind": "evalu', None),
        ('{"kind": "evaluation", "epoch": 1, "step": 3, "auc": "<b>"}\n', None),
        ('{"kind": "evaluation"}\n', None),
        ("", None),
        (None, None),
    ],
)
def test_hostile_metrics_are_refused_or_no_figures(runs, tmp_path, capsys, text, message):
    run = shutil.copytree(runs / "killed", tmp_path / "run")
    (run / "metrics.jsonl").unlink(missing_ok=True)
    if text is not None:
        (run / "metrics.jsonl").write_text(text, encoding="latin-1")
    code, shown, errors = command(capsys, "compare", run)
    assert code == (2 if message else 0)
    assert (message or "") in errors
    assert "Traceback" not in errors
    if not message:
        assert "▁" not in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": 3}, "test = 3, expected an object"),
        ({"stored_bytes": {}}, "lacks 'stored_bytes.total'"),
        ({"exchange": []}, "exchange = [], expected an object"),
        ({"samples_per_second": "fast"}, 'samples_per_second = "fast", expected a finite number'),
        ({"best": None, "test": None}, None),
        ({"test": {"auc": float("nan"), "log_loss": "x"}}, None),
    ],
)
def test_hostile_summaries(runs, tmp_path, capsys, change, message):
    run = shutil.copytree(runs / "b4", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | change))
    code, shown, errors = command(capsys, "compare", run)
    assert (code, (message or "") in errors) == (2 if message else 0, True)
    assert "nan" not in shown.lower()


def test_what_is_no_run_and_no_study(runs, tmp_path, capsys):
    assert "expected a run folder" in command(capsys, "compare", tmp_path)[2]
    (tmp_path / "study.json").write_text('{"format_version": 1, "name": 3}')
    assert "has name = 3, expected text" in command(capsys, "compare", tmp_path)[2]
    with pytest.raises(UserError, match="is a study, which is compared alone"):
        compare([str(runs / "b4"), str(tmp_path)])


def test_names_and_titles_cannot_break_the_page(runs, tmp_path):
    """`dqrm study` refuses such names; a study.json may come from a stranger."""
    name = "<script>x</script>|`a`\n[b](c)"
    variants = [{"name": name, "source": None, "ptq": None, "config": None}]
    folder = Folder(
        tmp_path,
        "n",
        "# <b>",
        name,
        [1],
        {"path": "d", "fingerprint": "f" * 64},
        variants,
        [{"variant": name, "seed": 1, "error": "<i>"}],
    )
    study = {name: {1: Result.read(runs / "b4")}}
    page = markdown(folder, study)
    assert "<script>" not in page
    assert "<i>" not in page
    rows = [line for line in page.splitlines() if line.startswith("| \\<script")]
    assert len(rows) == 2
    assert all("\\|" in row and "\\`a\\`" in row for row in rows)
    assert results_csv(study, [1]).count("script") == 8  # two in each of the four rows: quoted, whole
    assert summarize(study, name)[name]["difference"] == {}
