"""Reload and shutdown under load: every accepted request is answered, and by one version."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dqrm.server.config import ServeConfig
from serve_helpers import Threads, close, infer_body, process, raw_rows, running, wait_for


def replace(source, target):
    """A new file at `target` by renaming."""
    beside = target.with_name("beside")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def load(port, expected, name="live"):
    """Clients whose answers must be those of the version that they name."""
    batch, probabilities = expected
    seen = set()

    def check(number, status, answer):
        assert status == 200, answer
        seen.add(answer["model_version"])
        wanted = probabilities[answer["model_version"]][number * 8 : number * 8 + 8]
        assert close(answer["outputs"][0]["data"], wanted), "an answer of two versions"

    bodies = []
    for number in range(4):
        body = infer_body(batch)
        for each, width in zip(body["inputs"], (13, 26)):
            each["shape"], each["data"] = [8, width], each["data"][number * 8 * width : (number + 1) * 8 * width]
        bodies.append(json.dumps(body))
    return Threads(port, f"/v2/models/{name}/infer", bodies.__getitem__, check), seen


def reloads(served, expected, folder, times):
    live = folder / "live.dqrm"
    shutil.copyfile(served[0], live)
    with running(live, watch=0.02) as client:
        versions = [client.server.repository.versions["live"].id]
        threads, seen = load(client.port, expected)
        with threads:
            for turn in range(times):
                replace(served[(turn + 1) % 2], live)
                wait_for(lambda: client.server.repository.versions["live"].id != versions[-1])
                versions.append(client.server.repository.versions["live"].id)
        text = client("GET", "/metrics")[1].decode()
    assert threads.errors == []
    assert threads.lost == 0
    assert threads.answered > times
    assert seen == set(expected[1])
    assert f'dqrm_reloads_total{{model="live",outcome="loaded"}} {times}.0' in text
    assert text.count("dqrm_model_info{") == 1


def test_reloads_under_load(served, expected, tmp_path):
    reloads(served, expected, tmp_path, 4)


@pytest.mark.slow
def test_100_reloads_under_load(served, expected, tmp_path):
    reloads(served, expected, tmp_path, 100)


def test_a_file_that_cannot_be_loaded_changes_nothing(served, expected, tmp_path):
    live = tmp_path / "live.dqrm"
    shutil.copyfile(served[0], live)
    with running(live, watch=0.02, verify=True) as client:
        repository = client.server.repository
        before = repository.versions["live"]
        broken = tmp_path / "broken"
        data = bytearray(served[1].read_bytes())
        for content in (data[: len(data) // 2], b"", bytes(data[:-1]) + bytes([data[-1] ^ 1])):
            broken.write_bytes(content)
            failed = client.server.metrics.reloads.labels("live", "failed")._value
            count = failed.get()
            os.replace(broken, live)
            wait_for(lambda failed=failed, count=count: failed.get() > count)
            time.sleep(0.1)
            assert failed.get() == count + 1  # once per file
            assert repository.versions["live"] is before
        live.unlink()
        time.sleep(0.1)
        status, answer = client.json("POST", "/v2/models/live/infer", infer_body(expected[0], 0))
        assert status == 200
        assert answer["model_version"] == before.id
        replace(served[1], live)
        wait_for(lambda: repository.versions["live"] is not before)
        assert client.json("GET", "/v2/models/live/ready")[0] == 200
    assert "reload failed" in client.lines.getvalue()


def test_a_file_that_was_changed_in_place_is_refused_until_it_is_reloaded(served, expected, tmp_path):
    live = tmp_path / "live.dqrm"
    shutil.copyfile(served[0], live)
    body = infer_body(expected[0], 0)
    with running(live) as client:
        assert client.json("POST", "/v2/models/live/infer", body)[0] == 200
        time.sleep(0.02)
        with live.open("r+b") as file:
            file.write(served[0].read_bytes()[:1])
        os.utime(live)
        status, answer = client.json("POST", "/v2/models/live/infer", body)
        assert status == 503
        assert "was changed in place" in answer["error"]
        assert client.json("GET", "/v2/health/ready") == (503, {"ready": False})
        assert client.json("GET", "/v2/health/live")[0] == 200
        loop = client.server.repository
        future = __import__("asyncio").run_coroutine_threadsafe(loop.reload(), client.server.loop)
        future.result(30)
        assert client.json("POST", "/v2/models/live/infer", body)[0] == 200
        assert client.json("GET", "/v2/health/ready")[0] == 200


def terminate(served, expected, tmp_path, rounds):
    shutil.copyfile(served[0], tmp_path / "live.dqrm")
    for _ in range(rounds):
        with process(tmp_path / "live.dqrm", "--drain-seconds", "0.2") as (client, started):
            threads, _ = load(client.port, expected)
            with threads:
                wait_for(lambda threads=threads: threads.answered > 20, 60)
                started.send_signal(signal.SIGTERM)
                _, errors = started.communicate(timeout=60)
            assert started.returncode == 0, errors
            assert threads.errors == []
            assert threads.lost == 0


def test_sigterm_under_load(served, expected, tmp_path):
    terminate(served, expected, tmp_path, 1)


@pytest.mark.slow
def test_sigterm_under_load_several_times(served, expected, tmp_path):
    terminate(served, expected, tmp_path, 4)


@pytest.mark.slow
def test_sighup_reloads(served, expected, tmp_path):
    live = tmp_path / "live.dqrm"
    shutil.copyfile(served[0], live)
    with process(f"live={live}") as (client, started):
        (before,) = client.json("GET", "/v2/models/live")[1]["versions"]
        replace(served[1], live)
        started.send_signal(signal.SIGHUP)
        wait_for(lambda: client.json("GET", "/v2/models/live")[1]["versions"] != [before])
        started.send_signal(signal.SIGINT)
        out, _ = started.communicate(timeout=60)
    events = [json.loads(line).get("event") for line in out.splitlines()]
    assert [event for event in events if event] == ["reloaded", "draining", "ended"]
    assert started.returncode == 0


def test_readiness_is_refused_while_requests_are_still_answered(served, expected):
    with running(served[0], drain_seconds=1.5) as client:
        client.server.loop.call_soon_threadsafe(client.server.end)
        wait_for(lambda: client.server.repository.draining)
        assert client.json("GET", "/v2/health/ready") == (503, {"ready": False})
        assert client.json("GET", "/v2/models/m1/ready")[0] == 503
        assert client.json("POST", "/v2/models/m1/infer", infer_body(expected[0], 0))[0] == 200


def test_memory_of_versions_is_given_back(served, tmp_path):
    """What a reload leaves behind is no model."""
    import gc
    import weakref

    live = tmp_path / "live.dqrm"
    shutil.copyfile(served[0], live)
    with running(live, watch=0.02) as client:
        before = weakref.ref(client.server.repository.versions["live"])
        replace(served[1], live)
        wait_for(lambda: client.server.repository.versions["live"] is not before())
        gc.collect()
        wait_for(lambda: before() is None)


def test_without_the_extra(served):
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['dqrm', 'serve', sys.argv[1]]; "
        "from dqrm.cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", code, str(served[0])], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "serving needs the extra dqrm[serve]: pip install 'dqrm[serve]'" in found.stderr


def test_a_reader_of_the_log_that_stops_does_not_stop_the_server(served, expected):
    from dqrm.server.run import Server

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    server = Server([str(served[0])], ServeConfig(port=0, verify=False), Closed())
    server.lines.write(event="x")
    time.sleep(0.5)
    for _ in range(20_000):
        server.lines.write(event="x")
    assert len(server.lines._waiting) <= 10_000
    server.lines.close()
    server.batcher.close()
    server.repository.close()
    with contextlib.closing(server.listener):
        pass


def test_score_while_reloading(served, generated, tmp_path):
    """Raw rows keep the vocabularies of the version that they were accepted with."""
    row = raw_rows(generated, 1)[0]
    live = tmp_path / "live.dqrm"
    shutil.copyfile(served[0], live)
    with running(live, watch=0.02) as client:
        first = client.json("POST", "/score", row)[1]
        replace(served[1], live)
        wait_for(lambda: client.json("POST", "/score", row)[1]["version"] != first["version"])
        second = client.json("POST", "/score", row)[1]
        assert second["probabilities"] != first["probabilities"]
        replace(served[0], live)
        wait_for(lambda: client.json("POST", "/score", row)[1]["version"] == first["version"])
        assert close(client.json("POST", "/score", row)[1]["probabilities"], first["probabilities"])
