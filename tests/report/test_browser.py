"""Pages in headless Chromium, opened from disk with the network off: drawn, readable, and broken by nothing."""

import json

import pytest

from dqrm.report.page import write_report
from report_helpers import HOSTILE, evaluation, histogram, write_run, write_study

pytestmark = pytest.mark.slow

_MARKS = ", ".join(f".mark-{kind}.role-mark > *" for kind in ("symbol", "line", "area", "rule"))


@pytest.fixture
def opened(browser):
    """A function that opens a page; whatever the console says or the page asks the network for fails the test."""
    said, contexts = [], []

    def open_page(file, width=1280, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def written(folder, count, *more):
    """A page of runs with plots in all sections but lookups."""
    runs = [write_run(folder / f"run-{at}", 0.7 + at / 200, *more) for at in range(count)]
    parts = {"data": 0.1, "lookup": 0.5, "forward": 1.0, "backward": 1.5, "update": 0.4}
    variants = [{"name": name, "batch_size": 128, "parts": parts} for name in ("fp32", "int4")]
    (folder / "step.json").write_text(json.dumps({"variants": variants, "machine": {"threads": 1}}))
    write_report(runs, folder / "report.html", bench=str(folder / "step.json"))
    return folder / "report.html"


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    return written(tmp_path_factory.mktemp("three"), 3)


def draw_all(page):
    """Scroll through the page; the number of its plots, each of which has drawn marks within its width."""
    figures = page.locator("figure").all()
    for figure in figures:
        figure.scroll_into_view_if_needed()
        figure.locator(".plot[data-drawn]").wait_for(state="attached")
        assert figure.locator(_MARKS).count() > 0, figure.locator("figcaption").inner_text()
        assert figure.locator("svg").bounding_box()["width"] <= figure.bounding_box()["width"]
    assert page.locator("#failed").is_hidden()
    return len(figures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_runs_are_drawn_and_fit_the_screen(three_runs, opened, width, scheme):
    page = opened(three_runs, width, scheme)
    assert draw_all(page) == 4 + 1 + 3 + 1 + 1
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ink = page.evaluate("getComputedStyle(document.body).color")
    labels = page.locator("#steps-0 .role-axis-label text").first.get_attribute("fill")
    assert (ink, labels) == {
        "light": ("rgb(28, 34, 48)", "#59637a"),
        "dark": ("rgb(230, 233, 240)", "#a3adc2"),
    }[scheme]


def test_a_reader_who_turns_to_dark_gets_dark_plots(three_runs, opened):
    page = opened(three_runs)
    page.locator("#steps-0").scroll_into_view_if_needed()
    page.locator("#steps-0[data-drawn]").wait_for(state="attached")
    page.emulate_media(color_scheme="dark")
    page.locator("#steps-0 .role-axis-label text[fill='#a3adc2']").first.wait_for(state="attached")


def test_every_plot_has_words_and_a_table(three_runs, opened):
    page = opened(three_runs)
    for figure in page.locator("figure").all():
        assert len(figure.locator("[role=img]").first.get_attribute("aria-label")) > 40
        figure.locator("summary").click()
        assert figure.locator("table").is_visible()
        assert figure.locator("tbody tr").count() > 0
    assert page.locator("h1").count() == 1


def test_without_scripts_the_tables_are_there(three_runs, opened):
    page = opened(three_runs, java_script_enabled=False)
    assert page.locator("noscript").inner_text().startswith("The plots need JavaScript")
    page.locator("#steps summary").first.click()
    assert page.locator("#steps table").first.is_visible()


def test_ten_runs_are_one_page_that_draws_what_is_seen(tmp_path, opened):
    file = written(tmp_path, 10, 60, ("C1", "C2", "C3"))
    assert file.stat().st_size < 6e6
    page = opened(file)
    page.locator("#steps-0").scroll_into_view_if_needed()
    page.locator("#steps-0[data-drawn]").wait_for(state="attached")
    assert page.locator("figure").count() == 4 + 1 + 30 + 1 + 1
    assert page.locator(".plot[data-drawn]").count() < 37
    assert page.locator("#steps-0 .mark-line.role-mark path").count() == 10


def test_a_study_is_drawn_with_bands(tmp_path, opened):
    write_report([write_study(tmp_path / "s", {"fp32": [0.75, 0.77], "int4": [0.74, 0.75]})], tmp_path / "r.html")
    page = opened(tmp_path / "r.html", 360)
    draw_all(page)
    assert page.locator("#steps-0 .mark-area.role-mark path").count() == 2


def test_hostile_names_are_shown_as_text(tmp_path, opened):
    folder = write_run(tmp_path / HOSTILE.replace("/", "∕"), config={HOSTILE: {HOSTILE: HOSTILE}})
    lines = [evaluation(10, **{HOSTILE: 0.3}), evaluation(20, **{HOSTILE: 0.4}), histogram(20, HOSTILE)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_report([folder, write_run(tmp_path / "plain")], tmp_path / "r.html")
    page = opened(tmp_path / "r.html", 360)
    draw_all(page)
    assert "broken" not in page.title().split(" ")[0]
    assert page.locator("img[src]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    shown = page.locator("#steps-0 .role-legend-label text").first.text_content()
    assert shown.startswith("<∕script><script>")
