"""The exported page in headless Chromium, from a local static server, with every other name unreachable."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import polars as pl
import pytest

import dqrm
import web_helpers as helpers
from conftest import tiny
from dqrm.errors import UserError

pytestmark = pytest.mark.slow
pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")

_READY = 120_000  # milliseconds, on a machine that does other things
_SCORE = """async (groups) => {
  const { Model } = await import("./dqrm.js");
  const model = await Model.load();
  const found = [];
  for (const rows of groups)
    found.push(await model.score(rows).then(({ probabilities }) => [...probabilities], (error) => error.message));
  model.close();
  return found;
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """No line for each request."""


@pytest.fixture
def serve():
    """A function that serves a folder; gives its address and a function that ends the server."""
    running = []

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)

        def end():
            server.shutdown()
            server.server_close()

        return f"http://127.0.0.1:{server.server_port}/", end

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def open_page(browser):
    """A function that opens an address; a request to another one, or an error in the page, fails the test."""
    contexts, wrong = [], []

    def open_at(address, width=1280, scheme="light", wait=True):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        context.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        if wait:
            page.locator("body[data-ready]").wait_for(timeout=_READY)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert wrong == []


def exported(run, folder, calibrate="none"):
    try:
        dqrm.export_run(run, f"{folder}/", dqrm.ExportConfig(calibrate=calibrate))
    except UserError as error:
        if "npm" not in str(error):
            raise
        pytest.skip(f"onnxruntime-web is not here: {error}")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a table with all kinds of columns, whose negatives are subsampled; its folder, its artifact, its log."""
    folder = tmp_path_factory.mktemp("table")
    run = helpers.trained(folder, subsample_negatives=0.5)
    dqrm.export_run(run, folder / "m.dqrm")
    return exported(run, folder / "web"), dqrm.load(folder / "m.dqrm"), folder / "log.csv"


def rows_of(log, count=300):
    """Rows as JSON has them."""
    frame = pl.read_csv(log).drop("clicked")[:count].with_columns(pl.col("tags").fill_null(""))
    return json.loads(json.dumps(frame.to_dicts()))


def assert_scores(page, model, rows):
    many, *single = page.evaluate(_SCORE, [rows, *([row] for row in rows[:20])])
    np.testing.assert_allclose(many, model.score(rows), rtol=0, atol=1e-6)
    np.testing.assert_allclose(single, model.score(rows[:20])[:, None], rtol=0, atol=1e-6)


def test_the_same_probabilities_as_in_python(table, serve, open_page):
    folder, model, log = table
    rows = rows_of(log)
    rows[0] |= {"user": "nobody", "age": None}
    page = open_page(serve(folder)[0])
    assert_scores(page, model, rows)
    lists = [{**row, "tags": ["t1", "never seen", None]} for row in rows[:9]]
    assert_scores(page, model, lists)
    bad = [[{**rows[0], "price": "cheap"}], [{"user": 1}], []]
    assert page.evaluate(_SCORE, bad) == [
        'column price holds "cheap", expected a finite number within float32\'s range or nothing',
        "row 1 has no 'price'; a value that is missing is given as null",
        [],
    ]


@pytest.mark.parametrize("hashed", [False, True], ids=["vocabularies", "hashed"])
def test_the_same_on_criteo(generated, tmp_path, serve, open_page, hashed):
    log = generated.path.parent / "log.txt"
    data = generated
    if hashed:
        config = dqrm.PrepareConfig(layout="criteo-kaggle", vocabulary="hash", rows=500, hashes=2, cross=("C1*C2",))
        data = dqrm.prepare([log], tmp_path / "data", config)
    dqrm.train(data, tmp_path / "run", tiny(max_steps=20))
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", dqrm.ExportConfig(calibrate="platt"))
    names = [*(f"I{n}" for n in range(1, 14)), *(f"C{n}" for n in range(1, 27))]
    lines = [line.split("\t")[1:] for line in log.read_text().splitlines()[:200]]
    rows = [{name: cell or None for name, cell in zip(names, line)} for line in lines]
    folder = exported(tmp_path / "run", tmp_path / "web", "platt")
    assert_scores(open_page(serve(folder)[0]), dqrm.load(tmp_path / "m.dqrm"), rows)


def shown(page, selector):
    page.locator(selector).wait_for()
    return page.locator(selector).inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "light"), (360, "dark")])
def test_the_form_scores_a_row_and_fits_the_screen(table, serve, open_page, width, scheme):
    folder, model, _ = table
    page = open_page(serve(folder)[0], width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name, value in {"user": "7", "ad": "ad 1", "price": "12.5", "tags": "t1|t2", "site": "", "age": ""}.items():
        page.fill(f"input[name={name}]", value)
    page.fill("input[name=hour]", "3")
    page.click("button[type=submit]")
    row = {"user": 7, "ad": "ad 1", "price": 12.5, "tags": ["t1", "t2"], "site": None, "age": None, "hour": 3}
    page.locator("#result strong", has_text=f"{model.score(row)[0]:.4f}").wait_for()
    assert page.locator("#size").inner_text().startswith("The model and its runtime are 14.")
    assert all(box["height"] >= 38 for box in (each.bounding_box() for each in page.locator("input").all()))
    page.fill("input[name=price]", "cheap")
    page.click("button[type=submit]")
    assert shown(page, "#wrong").startswith('column price holds "cheap", expected')
    page.click("#scoring summary")
    page.fill("#json", json.dumps([row, row]))
    page.click("#score-json")
    assert float(shown(page, "#results").split()[0]) == pytest.approx(model.score(row)[0], abs=1e-6)


def test_loaded_once_it_opens_without_a_server(table, serve, open_page):
    address, end = serve(table[0])
    page = open_page(address)
    page.wait_for_function("caches.open('dqrm-pages').then((cache) => cache.match('page.js'))")
    page.wait_for_function("caches.open('dqrm-files').then((cache) => cache.keys()).then((keys) => keys.length === 4)")
    end()
    page.reload()
    page.locator("body[data-ready]").wait_for(timeout=_READY)
    assert page.locator("#result strong").count() == 1


def test_what_is_wrong_is_said_in_one_sentence(table, serve, open_page, tmp_path):
    folder = shutil.copytree(table[0], tmp_path / "web")
    address, _ = serve(folder)
    spec = json.loads((folder / "model.json").read_text())

    def failing(**changed):
        (folder / "model.json").write_text(json.dumps(spec | changed))
        page = open_page(address, wait=False)
        page.locator("#failed").wait_for(timeout=_READY)
        return page.locator("#failed").inner_text()

    assert failing(files={**spec["files"], "ids.bin": {"bytes": 7, "sha256": "0"}}) == (
        "The model cannot be opened: ids.bin has more than 7 bytes, expected 7"
    )
    assert failing(files={**spec["files"], "ids.bin": {"bytes": 2**46, "sha256": "0"}}).startswith(
        "This browser cannot hold the model: it takes about"
    )
    tables = bytearray((folder / "model.onnx.data").read_bytes())
    tables[0] ^= 1
    (folder / "model.onnx.data").write_bytes(tables)
    assert failing() == (
        "The model cannot be opened: model.onnx.data is not the file of this model: the folder on the server is "
        "incomplete or changing"
    )
    (folder / "model.onnx.data").unlink()
    assert failing() == "The model cannot be opened: model.onnx.data: the server answered 404"


def test_a_large_model_is_downloaded_when_the_reader_says_so(table, serve, open_page, tmp_path):
    folder = shutil.copytree(table[0], tmp_path / "web")
    spec = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(spec | {"download_bytes": 280_000_000}))
    page = open_page(serve(folder)[0], wait=False)
    page.locator("#start").wait_for()
    assert "280.0 MB to download" in page.locator("#size").inner_text()
    assert page.locator("#scoring").is_hidden()
    page.click("#start")
    page.locator("body[data-ready]").wait_for(timeout=_READY)
