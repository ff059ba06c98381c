"""`examples/serve`: the clients against a server, and the files for containers by what they name."""

import json
import re
import runpy
import subprocess

import numpy as np
import pytest
import yaml

from dqrm.cli import cli
from serve_helpers import raw_rows, running
from shipped_helpers import ROOT

FOLDER = ROOT / "examples/serve"


def test_the_python_client(served):
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    example = runpy.run_path(str(FOLDER / "client.py"))
    with running(served[0]) as client:
        found = example["infer"](f"127.0.0.1:{client.port}", "m1", rows=4)
    assert found.shape == (4,)
    assert ((found > 0) & (found < 1)).all()
    assert found.dtype == np.float32


def test_the_curl_client(served, generated):
    row = json.dumps(raw_rows(generated, 1)[0])
    with running(served[0]) as client:
        command = ["sh", str(FOLDER / "requests.sh"), f"http://127.0.0.1:{client.port}", "m1"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin",
                                   "ROW": row})  # fmt: skip
        except FileNotFoundError:
            pytest.skip("there is no sh here")
    if "curl: not found" in found.stderr:
        pytest.skip("there is no curl here")
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert lines[0] == {"live": True}
    assert lines[2]["name"] == "m1"
    assert len(lines[3]["probabilities"]) == 1


def arguments_hold(arguments):
    context = cli.make_context("dqrm", ["serve", *map(str, arguments)])
    _, command, rest = cli.resolve_command(context, ["serve", *map(str, arguments)])
    command.make_context("serve", list(rest), parent=context)


def test_the_container():
    text = (FOLDER / "Dockerfile").read_text()
    arguments_hold(json.loads(re.search(r"^CMD (.+)$", text, re.M)[1]))
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for name in line.split():
            assert (ROOT / name).exists(), name


def test_the_manifest():
    manifest = yaml.safe_load((FOLDER / "kserve.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (container,) = manifest["spec"]["predictor"]["containers"]
    arguments_hold(container["args"])
    paths = [container[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")]
    assert paths == ["/v2/health/ready", "/v2/health/live"]
    assert str(container["ports"][0]["containerPort"]) in container["args"]
