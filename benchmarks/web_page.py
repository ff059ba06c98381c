"""Time until an exported page is ready, and of a row, in headless Chromium on loopback; prints JSON.

    dqrm export model.dqrm -o web/
    python benchmarks/web_page.py web

The folder is served by Python's static server. `first`: nothing is cached; `again`: a later visit of the same browser,
which has the files. A row is scored CALLS times after the page is ready, its encoding included. Needs Chromium and
Playwright (dqrm[dev]).
"""

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

CALLS = 200
_WAIT = 600_000  # milliseconds
_ROW = """async (calls) => {
  const { Model } = await import("./dqrm.js");
  const model = await Model.load();
  const row = Object.fromEntries([...document.querySelectorAll("#fields input")].map(
    ({ name, value }) => [name, value === "" ? null : value]));
  const found = [];
  for (let call = 0; call < calls; call++) found.push((await model.score([row])).milliseconds);
  model.close();
  return { ready: model.milliseconds.all, rows: found };
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """No line for each request."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on a static server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def visit(page: Page, address: str) -> float:
    """Seconds until the model is ready, as the page tells; a reader's question about the size is answered."""
    page.goto(address)
    page.locator("#start:visible, body[data-ready]").first.wait_for(timeout=_WAIT, state="attached")
    if page.locator("#start").is_visible():
        page.locator("#start").click()
    page.locator("body[data-ready]").wait_for(timeout=_WAIT, state="attached")
    return float(page.locator("#size").inner_text().split("ready in ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="what `dqrm export MODEL -o web/` wrote")
    parser.add_argument("--visits", type=int, default=3, help="browsers that open it, one after the other")
    options = parser.parse_args()
    if not (options.folder / "model.json").is_file():
        sys.exit(f"{options.folder} is no folder that `dqrm export MODEL -o web/` wrote: it has no model.json")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    sizes = {file.name: file.stat().st_size for file in sorted(options.folder.iterdir())}
    found: dict[str, Any] = {"bytes": sizes, "total_bytes": sum(sizes.values()), "first": [], "again": []}
    with served(options.folder) as address, sync_playwright() as running:
        for _ in range(options.visits):
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            context = browser.new_context()
            found["first"].append(visit(context.new_page(), address))
            page = context.new_page()
            found["again"].append(visit(page, address))
            rows = sorted(page.evaluate(_ROW, CALLS)["rows"])
            found["row_ms"] = {"median": statistics.median(rows), "p99": rows[int(0.99 * CALLS)]}
            found["browser"] = browser.version
            browser.close()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
