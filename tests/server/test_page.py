"""The page at /: what it is told, what it may do, and in a browser."""

import shutil

import pytest

import dqrm
from conftest import tiny
from dqrm.server import page
from serve_helpers import close, raw_rows, running


def test_what_the_page_shows(served, bags_model, generated):
    with running(served[0], bags_model) as client:
        status, html, headers = client("GET", "/")
        found, other = client.json("GET", "/models")[1]
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    # Nothing is loaded from elsewhere, and only what is in the page may run.
    assert b"http" not in html.replace(b"/score/", b"")
    assert headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self';")
    assert headers["content-security-policy"].count("'sha256-") == 2
    assert (found["name"], found["model"], found["bits"]["table_bits"]) == ("m1", "DLRM", 4)
    assert found["columns"][0] == {"name": "C1", "rows": generated.table_rows[0], "multi": False}
    assert found["sizes"]["file"] == served[0].stat().st_size
    assert found["provenance"]["dataset"] == generated.fingerprint[:16]
    assert [field["name"] for field in found["fields"]] == list(raw_rows(generated, 1)[0])
    assert [field["lists"] for field in other["fields"]] == [False, True]


def test_examples_are_ids_that_the_model_knows(served, generated):
    with running(served[0]) as client:
        (found,) = client.json("GET", "/models")[1]
        row = {field["name"]: field["examples"][0] if field["examples"] else 1 for field in found["fields"]}
        status, answer = client.json("POST", "/score", row)
        assert status == 200
        assert close(answer["probabilities"], dqrm.load(served[0]).score(row))
        assert "dqrm_unknown_ids_total{" not in client("GET", "/metrics")[1].decode()
    first = next(line["C3"] for line in raw_rows(generated) if line["C3"])
    assert next(field for field in found["fields"] if field["name"] == "C3")["examples"][0] == first


def test_ids_that_are_hashed_have_no_examples(tmp_path):
    import polars as pl

    log = pl.DataFrame({"click": [0, 1] * 50, "user": [f"u{number}" for number in range(100)], "ad": ["a", "b"] * 50})
    config = dqrm.PrepareConfig(label="click", categorical=("user", "ad"), vocabulary="hash", rows=16)
    data = dqrm.prepare(log, tmp_path / "data", config)
    dqrm.train(data, tmp_path / "run", tiny(max_steps=1, threads=1))
    dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")
    with running(tmp_path / "m.dqrm") as client:
        assert client.json("GET", "/models")[1][0]["fields"] == [
            {"name": name, "number": False, "lists": False, "examples": []} for name in ("user", "ad")
        ]
        _, answer = client.json("POST", "/score", {"user": "u3", "ad": "a"})
        assert close(answer["probabilities"], dqrm.load(tmp_path / "m.dqrm").score([{"user": "u3", "ad": "a"}]))


def test_the_policy_is_of_the_page():
    assert page.POLICY[1] == page._policy()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(served, scheme):
    """It scores a row, on a phone's width, without a request to another host or an error."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: dqrm[dev]")
    with running(served[0]) as client, playwright.sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = {"width": 360, "height": 740}
        tab = started.new_context(viewport=view, color_scheme=scheme).new_page()
        asked, errors = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(f"http://127.0.0.1:{client.port}/")
        tab.get_by_role("heading", name="m1").wait_for()
        tab.get_by_role("button", name="Score", exact=True).click()
        tab.locator("#result strong").wait_for()
        shown = float(tab.locator("#result strong").inner_text().rstrip(" %")) / 100
        (found,) = client.json("GET", "/models")[1]
        row = {field["name"]: field["examples"][0] if field["examples"] else 1 for field in found["fields"]}
        assert shown == pytest.approx(float(dqrm.load(served[0]).score(row)[0]), abs=1e-5)
        # No part is wider than the screen.
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert all(url.startswith(f"http://127.0.0.1:{client.port}/") for url in asked)
        assert errors == []
        tab.locator("#field0").fill("many")
        tab.get_by_role("button", name="Score", exact=True).click()
        tab.locator("#result .bad").wait_for()
        assert "column I1 holds 'many'" in tab.locator("#result .bad").inner_text()
        started.close()
