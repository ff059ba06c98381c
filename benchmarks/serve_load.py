"""Load on `dqrm serve`: 64 clients on loopback, one row a request, with batching and without.

    python benchmarks/serve_load.py --requests 200000

Starts both servers, and measures in one run, alternating: requests per second when every client sends the next request
as soon as it has its answer (saturated); then, of the server with batching, latencies when requests arrive at random
times at 70 % of that rate (counted from the arrival, so that waiting for a free connection counts), and its memory over
many requests. `--against litserve` adds the same model in LitServe, if it is installed. Prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

_LITSERVE = """
import sys
import litserve, torch
from dqrm.artifact.file import Artifact

class Api(litserve.LitAPI):
    def setup(self, device):
        torch.set_num_threads(1)
        self.model = Artifact.open(sys.argv[1]).model()
    def decode_request(self, request):
        return request["dense"], request["ids"]
    def batch(self, inputs):
        return torch.tensor([row[0] for row in inputs]), torch.tensor([row[1] for row in inputs])
    def unbatch(self, output):
        return output.tolist()
    def predict(self, inputs):
        with torch.inference_mode():
            return self.model(*inputs).sigmoid()
    def encode_response(self, output):
        return {"probability": output}

if __name__ == "__main__":
    api = Api(max_batch_size=64, batch_timeout=float(sys.argv[3]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[2]), num_api_servers=1, generate_client_file=False, log_level="error")
"""


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time."""

    def __init__(self, done: Any) -> None:
        self._done, self._data = done, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head = self._data.find(b"\r\n\r\n")
        if head < 0:
            return
        length = re.search(rb"content-length: (\d+)", self._data[:head], re.I)
        if length is None or len(self._data) < head + 4 + int(length[1]):
            return
        good, self._data = self._data[9:12] == b"200", b""
        self._done(self, good)

    def connection_lost(self, error: Any) -> None:
        self._done(None, False)


class Load:
    """64 clients of one server. requests: their bytes, which are sent in turn."""

    def __init__(self, port: int, requests: list[bytes], clients: int) -> None:
        self._port, self._requests, self._clients = port, requests, clients

    async def _connect(self, done: Any) -> list[Connection]:
        loop = asyncio.get_running_loop()
        made = [loop.create_connection(lambda: Connection(done), "127.0.0.1", self._port) for _ in range(self._clients)]
        return [connection for _, connection in await asyncio.gather(*made)]  # type: ignore[misc]

    async def saturated(self, seconds: float = 1e9, requests: int = 10**12, each: Any = None) -> dict[str, Any]:
        """Every client sends the next request when it has its answer."""
        ended, times, count, failed = asyncio.Event(), [], 0, 0
        sent: dict[Any, float] = {}
        end = time.perf_counter() + seconds

        def send(connection: Connection) -> None:
            sent[connection] = time.perf_counter()
            connection.transport.write(self._requests[count % len(self._requests)])

        def done(connection: Any, good: bool) -> None:
            nonlocal count, failed
            if ended.is_set():
                return
            now = time.perf_counter()
            failed += not good
            if connection is None:
                ended.set()
                return
            count += 1
            if len(times) < 1_000_000:
                times.append(now - sent[connection])
            if each:
                each(count)
            if now > end or count >= requests:
                ended.set()
            else:
                send(connection)

        connections = await self._connect(done)
        began = time.perf_counter()
        for connection in connections:
            send(connection)
        await ended.wait()
        took = time.perf_counter() - began
        await asyncio.sleep(0.2)  # the last answers
        for connection in connections:
            connection.transport.close()
        return {"requests": count, "failed": failed, "per_second": count / took, **_latencies(times)}

    async def arriving(self, rate: float, seconds: float) -> dict[str, Any]:
        """Requests arrive at random times, `rate` a second; one that finds no free connection waits."""
        draw, loop = random.Random(0), asyncio.get_running_loop()
        free: deque[Connection] = deque()
        waiting: deque[float] = deque()
        since: dict[Any, float] = {}
        times: list[float] = []
        failed = sent = 0

        def send(connection: Connection, arrived: float) -> None:
            nonlocal sent
            since[connection] = arrived
            connection.transport.write(self._requests[sent % len(self._requests)])
            sent += 1

        def done(connection: Any, good: bool) -> None:
            nonlocal failed
            failed += not good
            if connection is None:
                return
            times.append(loop.time() - since[connection])
            if waiting:
                send(connection, waiting.popleft())
            else:
                free.append(connection)

        free.extend(await self._connect(done))
        began = arrival = loop.time()
        while arrival < began + seconds:
            arrival += draw.expovariate(rate)
            pause = arrival - loop.time()
            if pause > 0.0005:
                await asyncio.sleep(pause)
            elif len(times) % 16 == 0:
                await asyncio.sleep(0)
            if free:
                send(free.popleft(), arrival)
            else:
                waiting.append(arrival)
        await asyncio.sleep(1)
        answered = len(times)
        for connection in free:
            connection.transport.close()
        return {"rate": rate, "sent": sent, "answered": answered, "failed": failed, **_latencies(times)}


def _latencies(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {f"p{share}_ms": ordered[int(len(ordered) * share / 100)] for share in (50, 90, 99)} if ordered else {}
    return {name: round(1e3 * seconds, 3) for name, seconds in at.items()}


def requests_of(artifact: Path, payload: str) -> list[bytes]:
    """512 requests of one random row each, as bytes."""
    import numpy as np

    from dqrm.artifact.file import Artifact
    from dqrm.export.check import generate

    batch = generate(Artifact.open(artifact).content["model"], 512)
    requests = []
    for dense, ids in zip(batch.dense.numpy(), batch.ids.numpy().astype(np.int64)):
        path, more = f"/v2/models/{artifact.stem}/infer", ""
        inputs: list[dict[str, Any]] = [
            {"name": "dense", "shape": [1, len(dense)], "datatype": "FP32"},
            {"name": "ids", "shape": [1, len(ids)], "datatype": "INT64"},
        ]
        body: Any = {"inputs": inputs, "outputs": [{"name": "probability"}]}
        tail = b""
        if payload == "json":
            inputs[0]["data"], inputs[1]["data"] = dense.tolist(), ids.tolist()
        elif payload == "binary":
            inputs[0]["parameters"], inputs[1]["parameters"] = (
                {"binary_data_size": array.nbytes} for array in (dense, ids)
            )
            body["outputs"][0]["parameters"] = {"binary_data": True}
            tail = dense.tobytes() + ids.tobytes()
        else:
            path, body = "/predict", {"dense": dense.tolist(), "ids": ids.tolist()}
        head = json.dumps(body).encode()
        if tail:
            more = f"Inference-Header-Content-Length: {len(head)}\r\n"
        lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
        lines += f"Content-Length: {len(head) + len(tail)}\r\n\r\n"
        requests.append(lines.encode() + head + tail)
    return requests


@contextlib.contextmanager
def server(command: list[str], port: int, folder: Path) -> Any:
    """A server's process, once it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{port}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            for _ in range(3000):
                with contextlib.suppress(OSError), __import__("socket").create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    raise SystemExit((folder / f"{port}.log").read_text())
                time.sleep(0.1)
            time.sleep(2)
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers; what it serves is measured, not how it ends
            process.wait()


def resident_mb(process: int) -> float:
    """Memory of a process that no other shares, and that is no page of a file: a mapped table is none."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return round(int(found[1]) * 1024 / 1e6, 2) if found else 0.0


def run(coroutine: Any) -> Any:
    """On uvloop where it is installed: the client should cost little."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def measure(artifact: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one payload."""
    ports = {"on": options.port, "off": options.port + 1}
    requests = requests_of(artifact, options.payload)
    found: dict[str, Any] = {"payload": options.payload, "clients": options.clients}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, port in ports.items():
            command = [sys.executable, "-m", "dqrm", "serve", str(artifact), "--port", str(port)]
            command += [] if name == "on" else ["--no-batching"]
            processes[name] = stack.enter_context(server(command, port, folder))
        loads = {name: Load(port, requests, options.clients) for name, port in ports.items()}
        if options.against:
            code = folder / "litserve_api.py"
            code.write_text(_LITSERVE)
            command = [
                options.against_python or sys.executable,
                str(code),
                str(artifact),
                str(options.port + 2),
                "0.002",
            ]
            stack.enter_context(server(command, options.port + 2, folder))
            time.sleep(10)  # its worker loads the model after the port is open
            loads["litserve"] = Load(options.port + 2, requests_of(artifact, "litserve"), options.clients)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in loads}
        for load in loads.values():
            run(load.saturated(options.seconds / 2))
        for _ in range(options.rounds):
            for name, load in loads.items():
                rounds[name].append(run(load.saturated(options.seconds)))
        rates = {name: [each["per_second"] for each in many] for name, many in rounds.items()}
        found["saturated"] = {
            name: {"per_second": round(statistics.median(rates[name]), 1),
                   "all": [round(rate, 1) for rate in rates[name]],
                   "p99_ms": statistics.median(each["p99_ms"] for each in many),
                   "failed": sum(each["failed"] for each in many)}
            for name, many in rounds.items()
        }  # fmt: skip
        for name in loads:
            if name != "on":
                ratios = [on / other for on, other in zip(rates["on"], rates[name])]
                found[f"times_{name}"] = round(statistics.median(ratios), 2)
        for name, load in loads.items():
            if name != "off":
                rate = options.share * statistics.median(rates[name])
                found[f"at_{options.share:g}_{name}"] = run(load.arriving(rate, 2 * options.seconds))
        if options.requests:
            memory: list[tuple[int, float]] = []
            step, process = max(1, options.requests // 10), processes["on"].pid

            def note(count: int) -> None:
                if count % step == 0:
                    memory.append((count, resident_mb(process)))

            result = run(loads["on"].saturated(requests=options.requests, each=note))
            found["long"] = {**result, "anonymous_mb": memory}
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a .dqrm file; default: random weights of the paper's Kaggle size")
    parser.add_argument("--payload", choices=["json", "binary"], default="json")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--share", type=float, default=0.7, help="of the saturated rate, for the latencies")
    parser.add_argument("--requests", type=int, default=0, help="of the measurement of memory; 0: none")
    parser.add_argument("--against", choices=["litserve"], help="measure it beside")
    parser.add_argument("--against-python", help="the interpreter that has it")
    parser.add_argument("--port", type=int, default=8300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        artifact = Path(options.model) if options.model else folder / "kaggle.dqrm"
        if not options.model:
            from dqrm.bench.config import ARCHITECTURES, BenchInferenceConfig
            from dqrm.bench.random_model import write_artifact

            write_artifact(artifact, BenchInferenceConfig(), ARCHITECTURES["kaggle"].table_rows)
        load_average = os.getloadavg()
        print(json.dumps({"load_average_before": load_average, **measure(artifact, options, folder)}, indent=1))


if __name__ == "__main__":
    main()
