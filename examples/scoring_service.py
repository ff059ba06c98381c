"""A scoring service of the standard library around one loaded model: `python examples/scoring_service.py`.

POST a JSON list of rows to /score, get a list of probabilities. One model serves all threads. Trains a small model on
generated clicks first, starts the service on a free port, asks it from several threads, and stops it.
"""

import json
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import dqrm


def train_model(folder: Path) -> Path:
    """A packed model of generated clicks."""
    random = np.random.default_rng(0)
    users, ads = random.integers(0, 200, 4000), random.integers(0, 30, 4000)
    clicked = random.random(4000) < 1 / (1 + np.exp(-(users % 5 - 2.0) * (ads % 3 - 1.0)))
    log = pl.DataFrame({"clicked": clicked, "user": users.astype(str), "ad": ads.astype(str)})
    data = dqrm.prepare(log, folder / "data", dqrm.PrepareConfig(label="clicked", categorical=("user", "ad")))
    config = dqrm.Config(
        model=dqrm.ModelConfig(embedding_dim=8, bottom_mlp=(8,), top_mlp=(16, 1)),
        training=dqrm.TrainingConfig(epochs=2, threads=1),
    )
    dqrm.train(data, folder / "run", config)
    dqrm.export_run(folder / "run", folder / "model.dqrm")
    return folder / "model.dqrm"


def handler(model: Any) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests with this model."""

    class Score(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, answer = 200, model.score(json.loads(body)).tolist()
            except (dqrm.UserError, ValueError) as error:  # a missing column, a value that is no number, no JSON
                status, answer = 400, {"error": str(error)}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Keep the console quiet."""

    return Score


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """The service's address while inside."""
    torch.set_num_threads(1)  # requests run side by side already
    model = dqrm.load(path)
    model.score([{"user": "0", "ad": "0"}])  # the first call reads the vocabularies
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(model))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(address: str, rows: Any) -> Any:
    """What the service answers."""
    request = urllib.request.Request(address, json.dumps(rows).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def main() -> list[list[float]]:
    """Ask for scores from four threads; returns the answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = train_model(Path(folder))
        requests = [[{"user": str(user), "ad": str(ad)} for ad in range(3)] for user in range(8)]
        with serving(path) as address, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda rows: ask(address, rows), requests))
        print(f"{len(answers)} requests, the first: {[round(score, 4) for score in answers[0]]}")
        return answers


if __name__ == "__main__":
    main()
