"""A server of `dqrm serve` in a thread of the tests, or in a process, and clients of it."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np

NAMES = ["label", *(f"I{number}" for number in range(1, 14)), *(f"C{number}" for number in range(1, 27))]


class Client:
    """Requests to one server, each on a connection of its own unless `keep`."""

    def __init__(self, port, server=None, lines=None):
        self.port, self.server, self.lines = port, server, lines

    def __call__(self, method, path, body=None, headers=None):
        """Status, body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if isinstance(body, (dict, list)):
                body = json.dumps(body)
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def json(self, method, path, body=None, headers=None):
        """Status and the value of the JSON in the answer."""
        status, data, _ = self(method, path, body, headers)
        return status, json.loads(data)

    def raw(self, data, timeout=30):
        """The whole answer to bytes as they are; the connection is closed by the server."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    answer += piece
            return answer


@contextlib.contextmanager
def running(*models, **options):
    """A client of a server in a thread."""
    from dqrm.server.config import ServeConfig
    from dqrm.server.run import Server

    stream, started = io.StringIO(), threading.Event()
    config = ServeConfig(port=0, **{"drain_seconds": 0, "verify": False, **options})
    server = Server([str(model) for model in models], config, stream, lambda address: started.set())
    thread = threading.Thread(target=server.serve_all)
    port = server.listener.getsockname()[1]
    thread.start()
    try:
        assert started.wait(30)
        yield Client(port, server, stream)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(*arguments):
    """A client of `dqrm serve` in a process of its own, and the process."""
    command = [sys.executable, "-m", "dqrm", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as started:
        try:
            first = json.loads(started.stdout.readline() or started.stderr.read())
            yield Client(int(first["address"].rpartition(":")[2])), started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGKILL)


def raw_rows(dataset, count=200):
    """Rows of the log that a generated dataset was made of, as dicts."""
    rows = []
    for line in (dataset.path.parent / "log.txt").read_text().splitlines()[:count]:
        cells = dict(zip(NAMES, line.split("\t")))
        rows.append({name: (int(cell) if name[0] == "I" else cell) if cell else None
                     for name, cell in cells.items() if name != "label"})  # fmt: skip
    return rows


def infer_body(batch, row=None):
    """An inference request in JSON of a batch, or of one row of it."""
    dense, ids = batch.dense.numpy(), batch.ids.numpy()
    if row is not None:
        dense, ids = dense[row : row + 1], ids[row : row + 1]
    return {
        "inputs": [
            {"name": "dense", "shape": list(dense.shape), "datatype": "FP32", "data": dense.ravel().tolist()},
            {"name": "ids", "shape": list(ids.shape), "datatype": "INT64", "data": ids.ravel().tolist()},
        ]
    }


class Threads:
    """Clients that send requests until `stop`; each keeps its connection.

    make: the body of a request of client n. check: given n and the answer's status and JSON. lost: requests whose
    connection ended before an answer, if it had been used before. answered: of all.
    """

    def __init__(self, port, path, make, check, clients=4):
        self.answered, self.lost, self.errors = 0, 0, []
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._port, self._path, self._make, self._check = port, path, make, check
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _work(self, number):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.connect()
        while not self._stop.is_set():
            try:
                connection.request("POST", self._path, self._make(number))
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.lost += 1
                    self.errors.append(repr(error))
                break
            with self._lock:
                self.answered += 1
                try:
                    self._check(number, answer.status, json.loads(data))
                except AssertionError as error:
                    self.errors.append(str(error))
            if answer.getheader("connection") == "close":
                break
        connection.close()


def wait_for(condition, seconds=120):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def close(found, wanted):
    """Whether probabilities are equal to 1e-6."""
    return np.allclose(found, wanted, rtol=0, atol=1e-6)
