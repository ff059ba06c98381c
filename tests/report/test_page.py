"""What a page says of runs and studies, and that nothing in their files can break it."""

import html
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli_helpers import command
from conftest import tiny
from dqrm.errors import UserError
from dqrm.report import page
from dqrm.report.costs import count_lookups
from dqrm.report.page import write_report
from dqrm.report.records import number, read
from dqrm.training.launch import train
from report_helpers import HOSTILE, evaluation, histogram, plots, rows, summary, write_run, write_study


@pytest.fixture(autouse=True)
def small_bundle(monkeypatch):
    """The drawing library takes seconds to bundle; the browser's tests use the real one."""
    monkeypatch.setattr(page, "_bundle", lambda: "window.vegaEmbed = null;")


def reported(tmp_path, *folders, **options):
    """The page's text, and what could not be read."""
    notes = write_report(folders, tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(), notes


class Tags(HTMLParser):
    """Counts elements and finds handlers of events."""

    def __init__(self, text):
        super().__init__()
        self.counts, self.handlers = {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_runs_and_their_differences(tmp_path):
    text, notes = reported(tmp_path, write_run(tmp_path / "fp32", 0.75), write_run(tmp_path / "int4", 0.74))
    assert notes == []
    header, first, second = rows(text, "Test, at the checkpoint that validation chose")
    assert header[:3] == ["", "epoch", "auc"]
    assert first[:3] == ["fp32", "2", "0.75000"]
    assert second[header.index("Δ auc")] == "-0.01000"
    drawn = plots(tmp_path / "report.html")
    assert set(drawn) == {
        "steps-0",
        "steps-1",
        "steps-2",
        "steps-3",
        "calibration-0",
        "weights-0",
        "weights-1",
        "sizes-0",
    }
    values = drawn["steps-0"]["data"]["values"]
    assert [each["x"] for each in values if each["series"] == "int4"] == [50, 100, 150, 200, 250, 300]
    assert values[-1]["y"] == pytest.approx(0.74 - 0.1 / 6)
    assert text.count("<figure>") == len(drawn)
    assert text.count('role="img" aria-label="') == len(drawn)
    assert text.count("<details>") >= len(drawn)  # the data of each plot, and the configuration
    assert "Not measured: <code>dqrm bench step --json &gt; step.json</code>, then <code>dqrm report" in text
    assert "`" not in text.split("<script")[0]
    assert "<code>--data DATA</code> names it" in text


def test_a_study_has_means_spreads_and_paired_differences(tmp_path):
    failed = [{"variant": "broken", "seed": 2, "error": "training diverged"}]
    study = write_study(tmp_path / "s", {"fp32": [0.75, 0.77], "int4": [0.74, 0.75], "lost": []}, failures=failed)
    text, _ = reported(tmp_path, study)
    header, fp32, int4 = rows(text, "Test, mean ± standard deviation over seeds")
    assert fp32[2] == "0.76000 ± 0.01414"
    assert int4[header.index("Δ auc")] == "-0.01500 ± 0.00500"
    values = plots(tmp_path / "report.html")["steps-0"]["data"]["values"]
    last = [each for each in values if each["series"] == "fp32"][-1]
    assert last["y"] == pytest.approx(0.76 - 0.1 / 6)
    assert last["high"] - last["y"] == pytest.approx(0.014142, rel=1e-3)
    assert "training diverged" in text
    assert "no run was found" in text


def test_post_training_quantization_has_a_summary_alone(tmp_path):
    study = write_study(tmp_path / "s", {"fp32": [0.75], "ptq": [0.7]})
    folder = study / "runs" / "ptq" / "seed-1"
    (folder / "summary.json").write_text(json.dumps(summary(0.7) | {"ptq": {"bits": 4}}))
    for name in ("run.json", "metrics.jsonl"):
        (folder / name).unlink()
    text, notes = reported(tmp_path, study)
    assert rows(text, "Test, mean ± standard deviation over seeds")[2][0] == "ptq"
    assert notes == []


def test_names_are_text_wherever_they_stand(tmp_path):
    folder = write_run(tmp_path / HOSTILE.replace("/", "∕"), columns=3, config={HOSTILE: {HOSTILE: HOSTILE}})
    lines = [evaluation(10, **{HOSTILE: 0.3}), evaluation(20, **{HOSTILE: 0.4}), histogram(20, HOSTILE)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    bench = tmp_path / "step.json"
    bench.write_text(json.dumps({"variants": [{"name": HOSTILE, "batch_size": 1, "parts": {HOSTILE: 2.0}}]}))
    text, _ = reported(tmp_path, folder, bench=str(bench))
    tags = Tags(text)
    assert tags.counts["script"] == 3
    assert "img" not in tags.counts
    assert tags.handlers == []
    assert html.escape(HOSTILE[:40], quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert "{{7*7}}" in text
    for spec in plots(tmp_path / "report.html").values():
        assert HOSTILE not in json.dumps([spec.get("encoding"), spec.get("transform")])


@pytest.mark.parametrize(
    "damage",
    [
        '{"kind": "evaluation", "step": 20, "epoch": 1, "auc": NaN, "log_loss": Infinity, "train_loss": -Infinity}\n',
        '{"kind": "evaluation", "step": 20, "epo',
        "[]\n3\nnull\n" + "[" * 5000 + "\n",
        '{"kind": "evaluation", "step": "x", "auc": "0.7"}\n{"kind": "evaluation", "step": -1}\n',
        f'{{"kind": "evaluation", "step": 20, "epoch": {"9" * 400}, "auc": {"9" * 400}}}\n',
        '{"kind": ["a"], "step": 3}\n{"kind": "histogram", "step": 1, "master": {"counts": ["x", -1, NaN]}}\n',
        '{"kind": "calibration", "step": 1, "rows": [1, 0], "predicted": 3, "clicked": [NaN]}\n',
        '{"kind": "histogram", "step": 1, "master": {"low": 1, "high": 1, "counts": [1]}, "quantized": 7}\n',
        json.dumps({"kind": "evaluation", "step": 30, "epoch": 1e300, "auc": -1e308}) + "\n",
        json.dumps(
            {"kind": "histogram", "table": {}, "step": 1, "master": {"low": -1e308, "high": 1e308, "counts": [1]}}
        )
        + "\n",
        "\x00\udc80".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_damaged_metrics_break_nothing(tmp_path, damage):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(damage)
    text, _ = reported(tmp_path, folder)
    assert plots(tmp_path / "report.html")["steps-0"]["data"]["values"]
    assert "NaN" not in json.dumps(plots(tmp_path / "report.html"))
    assert rows(text, "Test, at the checkpoint that validation chose")[1][2] == "0.70000"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"test": 3, "best": "x", "stored_bytes": [], "epochs": "many"}', None]
)
@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
def test_a_missing_or_damaged_file_is_said(tmp_path, file, content):
    folder = write_run(tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    text, notes = reported(tmp_path, folder)
    assert ("No run has" in text) == (file == "summary.json" or "No run has an evaluation" in text)
    if content in ("", "{", None):
        assert notes
        assert html.escape(notes[0]).replace("&#x27;", "&#39;") in text


def test_a_run_without_evaluations_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", evaluations=0, tables=())
    (folder / "summary.json").write_text(json.dumps(summary() | {"best": None, "test": None, "test_calibration": None}))
    text, notes = reported(tmp_path, folder)
    assert notes == ["run: metrics.jsonl has no evaluation"]
    assert "No run has figures on test" in text
    assert "<code>dqrm train --record-histograms largest</code> records them" in text


@pytest.mark.parametrize(
    "more",
    [
        {"variants": [{"name": "a"}, {"name": None}, {"name": "../a"}, 7, {"name": "\x00"}, {"name": "b" * 5000}]},
        {"failures": {"a": 1}, "baseline": [1], "title": {"x": HOSTILE}},
        {"failures": [{"variant": HOSTILE, "error": HOSTILE}, 3], "seeds": "none"},
    ],
)
def test_a_hostile_study_has_a_page(tmp_path, more):
    text, _ = reported(tmp_path, write_study(tmp_path / "s", {"a": [0.7, 0.8]}, **more))
    assert Tags(text).counts["script"] == 3
    assert rows(text, "Test, mean ± standard deviation over seeds")[1][2].startswith("0.75000")


def test_a_damaged_run_of_a_study_is_said(tmp_path):
    study = write_study(tmp_path / "s", {"a": [0.7], "b": [0.6]})
    (study / "runs" / "b" / "seed-1" / "run.json").write_text("[")
    _, notes = reported(tmp_path, study)
    assert len(notes) == 1
    assert notes[0].startswith("b, seed-1: run.json could not be read")


def test_what_is_no_run_is_refused(tmp_path):
    run_folder, study = write_run(tmp_path / "run"), write_study(tmp_path / "study", {"a": [0.7]})
    for folders, message in (
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path], r"holds no run\.json"),
        ([run_folder, study], "is a study, expected it alone"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(folders, tmp_path / "report.html")
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UserError, match="has no parts of a step"):
        write_report([run_folder], tmp_path / "report.html", bench=str(tmp_path / "bench.json"))
    with pytest.raises(UserError, match="is a folder"):
        write_report([run_folder], run_folder)
    assert not (tmp_path / "report.html").exists()
    (study / "study.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        write_report([study], tmp_path / "report.html")


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"pip install 'dqrm\[report\]'"):
        write_report([write_run(tmp_path / "run")], tmp_path / "report.html")


def test_the_same_names_stay_apart(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert read([one, two]).names == ["a/run", "b/run"]
    assert read([one, one]).names[0] != read([one, one]).names[1]


def test_a_long_log_is_thinned_and_keeps_its_end(tmp_path):
    folder = write_run(tmp_path / "run", tables=())
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"kind": "train", "step": step, "loss": 0.5}) + "\n" for step in range(301, 6001))
    reported(tmp_path, folder)
    values = plots(tmp_path / "report.html")["steps-3"]["data"]["values"]
    assert len(values) <= 402
    assert values[-1]["x"] == 6000


def test_a_trained_run_shows_everything(generated, tmp_path):
    config = tiny(epochs=2, log_every=10, record_histograms=("C1", "largest"))
    train(generated, tmp_path / "run", config)
    text, notes = reported(tmp_path, tmp_path / "run")
    assert notes == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tables = {line["table"] for line in lines if line["kind"] == "histogram"}
    assert len(tables) == 4
    assert "lookups-0" in plots(tmp_path / "report.html")
    lookups = rows(text, "Share of lookups")
    assert lookups[1][:2] == ["all tables", f"{sum(generated.table_rows):,}"]
    counts = count_lookups(generated, lambda *_: None)
    assert sum(each.sum() for each in counts.values()) == 26 * generated.rows["train"]


def test_multi_valued_columns_are_counted(bags_data):
    counts = count_lookups(bags_data, lambda *_: None)
    bags = list(bags_data.split("train").batches(1 << 20))
    assert counts["tags"].sum() == sum(len(values) for batch in bags for values, _ in batch.bags)
    assert counts["user"].sum() == bags_data.rows["train"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("one"))
    shutil.copytree("one", "two")
    Path("two/summary.json").write_text("{")
    code, _, told = command(capsys, "report", "one", "two", "-o", "page.html")
    assert code == 0
    assert "Warning: two: summary.json could not be read" in told
    assert "page.html: 0." in told
    assert len(plots(Path("page.html"))) > 5


def test_what_is_between_backticks_is_code():
    code = page._with_code
    assert str(code("run `a < b` or `c`")) == "run <code>a &lt; b</code> or <code>c</code>"
    assert str(code("a`b <")) == "a`b &lt;"


def test_numbers():
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), float("inf"), 10**400, [])] == [
        1.0, 2.5, None, None, None, None, None, None, None,
    ]  # fmt: skip
