"""The endpoint: the artifact's probabilities by the protocol and by raw rows, metadata, metrics and the log."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import dqrm
from dqrm.errors import UserError
from dqrm.server.config import ServeConfig
from dqrm.server.repository import named_paths
from dqrm.server.run import Server
from serve_helpers import close, infer_body, raw_rows, running


@pytest.fixture(scope="module")
def client(served, bags_model):
    with running(served[0], bags_model) as found:
        yield found


@pytest.fixture(scope="module")
def rows(generated, served):
    """Raw rows and their probabilities."""
    given = raw_rows(generated, 24)
    return given, dqrm.load(served[0]).score(given)


def test_health_and_metadata(client, served):
    version = dqrm.Artifact.open(served[0]).container.checksum[:12]
    assert client.json("GET", "/v2/health/live") == (200, {"live": True})
    assert client.json("GET", "/v2/health/ready") == (200, {"ready": True})
    status, server = client.json("GET", "/v2")
    assert (status, server["name"], server["version"]) == (200, "dqrm", dqrm.__version__)
    for path in ("/v2/models/m1", f"/v2/models/m1/versions/{version}"):
        assert client.json("GET", f"{path}/ready") == (200, {"name": "m1", "ready": True})
        assert client.json("GET", path) == (200, {
            "name": "m1", "versions": [version], "platform": "dqrm",
            "inputs": [{"name": "dense", "datatype": "FP32", "shape": [-1, 13]},
                       {"name": "ids", "datatype": "INT64", "shape": [-1, 26]}],
            "outputs": [{"name": "probability", "datatype": "FP32", "shape": [-1]},
                        {"name": "logit", "datatype": "FP32", "shape": [-1]}],
        })  # fmt: skip
    assert [port["name"] for port in client.json("GET", "/v2/models/bags")[1]["inputs"]] == [
        "ids", "values_0", "offsets_0",
    ]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_infer_with_json(client, expected, nested):
    batch, probabilities = expected
    body = infer_body(batch) | {"id": "seven"}
    if nested:
        for given, tensor in zip(body["inputs"], (batch.dense, batch.ids)):
            given["data"] = tensor.tolist()
    status, answer = client.json("POST", "/v2/models/m1/infer", body)
    assert status == 200
    assert (answer["model_name"], answer["id"]) == ("m1", "seven")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["probability"]["shape"] == [64]
    wanted = probabilities[answer["model_version"]]
    assert close(outputs["probability"]["data"], wanted)
    logits = np.array(outputs["logit"]["data"])
    assert close(1 / (1 + np.exp(-logits)), wanted)


def test_infer_in_other_types_and_chosen_outputs(client, expected):
    batch, probabilities = expected
    body = infer_body(batch, 3) | {"outputs": [{"name": "probability"}]}
    body["inputs"][0]["datatype"], body["inputs"][1]["datatype"] = "FP64", "INT32"
    _, answer = client.json("POST", "/v2/models/m1/infer", body)
    (output,) = answer["outputs"]
    assert close(output["data"], probabilities[answer["model_version"]][3:4])


def test_tritonclient(client, expected):
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    batch, probabilities = expected
    remote = triton.InferenceServerClient(f"127.0.0.1:{client.port}")
    assert remote.is_server_live()
    assert remote.is_server_ready()
    assert remote.is_model_ready("m1")
    assert not remote.is_model_ready("other")
    assert remote.get_server_metadata()["name"] == "dqrm"
    version = remote.get_model_metadata("m1")["versions"][0]
    for binary in (True, False):
        arrays = {"dense": ("FP32", batch.dense.numpy()), "ids": ("INT64", batch.ids.numpy().astype(np.int64))}
        inputs = []
        for name, (datatype, array) in arrays.items():
            inputs.append(triton.InferInput(name, array.shape, datatype))
            inputs[-1].set_data_from_numpy(array, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probability", "logit")]
        for asked in (None, outputs):
            answer = remote.infer("m1", inputs, model_version=version, outputs=asked, request_id="7")
            assert close(answer.as_numpy("probability"), probabilities[version])
            assert answer.get_response()["id"] == "7"
    with pytest.raises(triton.InferenceServerException, match="there is no model 'other'"):
        remote.infer("other", inputs)
    remote.close()


def test_curl(client, rows):
    given, wanted = rows
    command = ["curl", "-s", f"http://127.0.0.1:{client.port}/score/m1", "-d", json.dumps(given[:3])]
    try:
        found = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("there is no curl here")
    assert close(json.loads(found.stdout)["probabilities"], wanted[:3])


def test_score_rows_together_and_one_by_one_at_once(client, rows):
    given, wanted = rows
    status, answer = client.json("POST", "/score/m1", given)
    assert status == 200
    assert close(answer["probabilities"], wanted)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda row: client.json("POST", "/score/m1", row), given))
    assert {status for status, _ in answers} == {200}
    assert close([answer["probabilities"][0] for _, answer in answers], wanted)


def test_no_request_changes_another_ones_result(served, generated):
    """Rows whose values have other types are read as if they were alone, also in one batch with others."""
    row = raw_rows(generated, 1)[0]
    odd = [row, {**row, "I1": None}, {**row, "I1": str(row["I1"] or 3)}, {**row, "C1": None},
           {**row, "I2": 2**53 + 1}, {**row, "I2": 7.0}]  # fmt: skip
    alone = [float(dqrm.load(served[0]).score(each)[0]) for each in odd]
    with running(served[0]) as client, ThreadPoolExecutor(9) as threads:
        answers = list(threads.map(lambda each: client.json("POST", "/score", each), odd * 3))
        assert close([answer["probabilities"][0] for _, answer in answers], alone * 3)


def test_multi_valued_columns(client, bags_model, bags_data):
    frame = pl.read_parquet(bags_data.path.parent / "log.parquet").drop("label")
    given = frame.to_dicts()
    wanted = dqrm.load(bags_model).score(given)
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda row: client.json("POST", "/score/bags", row), given[:16]))
    assert close([answer["probabilities"][0] for _, answer in answers], wanted[:16])
    split = bags_data.split("test")
    batch = next(iter(split.batches(20)))
    model = dqrm.load(bags_model)
    probabilities = model(batch.dense, batch.ids, batch.bags).sigmoid().detach().numpy()

    def body(at):
        values, offsets = batch.bags[0]
        end = int(offsets[at + 1]) if at + 1 < len(offsets) else len(values)
        mine = values[int(offsets[at]) : end].tolist()
        return {"inputs": [
            {"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": batch.ids[at].tolist()},
            {"name": "values_0", "shape": [len(mine)], "datatype": "INT64", "data": mine},
            {"name": "offsets_0", "shape": [1], "datatype": "INT64", "data": [0]},
        ]}  # fmt: skip

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda at: client.json("POST", "/v2/models/bags/infer", body(at)), range(20)))
    assert close([answer["outputs"][0]["data"][0] for _, answer in answers], probabilities)


def test_unknown_ids_are_row_0_and_counted(client, rows):
    row = {**rows[0][0], "C1": "0badf00d", "C2": "0badf00d"}
    _, answer = client.json("POST", "/score/m1", row)
    assert close(answer["probabilities"][0], client.json("POST", "/score/m1", {**row, "C1": None, "C2": None})[1][
        "probabilities"][0])  # fmt: skip
    text = client("GET", "/metrics")[1].decode()
    assert 'dqrm_unknown_ids_total{column="C2",model="m1"}' in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("C3"), "no column 'C3' in the rows; did you mean 'C23'?"),
        (lambda row: row.update(C33=row.pop("C3")), "did you mean 'C33'?"),
        (lambda row: row.update(I1="many"), "column I1 holds 'many', expected a whole number"),
        (lambda row: row.update(I1={"a": 1}), "column I1 holds {'a': 1} of type dict"),
        (lambda row: row.update(C1=["a"]), "column C1"),
        (lambda row: row.clear(), "no columns 'I1'"),
    ],
)
def test_rows_that_are_refused(client, rows, change, said):
    row = dict(rows[0][0])
    change(row)
    status, answer = client.json("POST", "/score/m1", row)
    assert status == 400
    assert said in answer["error"]
    # Beside a good one it is named by its number, and fails the request as a whole.
    status, answer = client.json("POST", "/score/m1", [rows[0][1], row])
    assert status == 400
    assert "row 2" in answer["error"] or "column" in answer["error"]


def test_the_log_holds_no_values(client, rows, served):
    client("POST", "/score/m1?user=secret", {**rows[0][0], "C1": "deadbeef", "C2": "secret"})
    client("GET", "/secret-path")
    client("POST", "/v2/models/secret/infer", {"id": "secret"})
    body = {"id": "secret", "inputs": [{"name": "secret"}]}
    client("POST", "/v2/models/m1/infer", body)
    with running(served[0]) as other:
        other("POST", "/score", rows[0][0])
    lines = [json.loads(line) for line in other.lines.getvalue().splitlines()]
    assert [line.get("event") for line in lines] == ["started", None, "ended"]
    assert set(lines[1]) == {"time", "route", "method", "status", "ms", "model", "bytes", "version", "rows"}
    client.server.lines._flush()
    text = client.lines.getvalue()
    assert '"route": "other"' in text
    assert "secret" not in text
    assert "deadbeef" not in text
    metrics = client("GET", "/metrics")[1].decode()
    assert "secret" not in metrics


def test_metrics(served, expected):
    with running(served[0]) as client:
        for _ in range(3):
            client("POST", "/v2/models/m1/infer", infer_body(expected[0], 0))
        client("POST", "/v2/models/m1/infer", "{")
        status, text, headers = client("GET", "/metrics")
    text = text.decode()
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'dqrm_requests_total{route="/v2/models/{model}/infer",status="200"} 3.0' in text
    assert 'dqrm_requests_total{route="/v2/models/{model}/infer",status="400"} 1.0' in text
    assert 'dqrm_rows_total{model="m1"} 3.0' in text
    assert "dqrm_batch_rows_sum 3.0" in text
    assert 'dqrm_model_info{model="m1",version="' in text


def test_the_queue_refuses_what_it_cannot_hold(served, expected, rows):
    with running(served[0], queue_rows=4) as client:
        status, answer = client.json("POST", "/score", rows[0][:5])
        assert (status, answer["error"]) == (413, "the request has 5 rows, expected at most 4")
        client.server.batcher._queue_rows, before = 0, client.server.batcher._queue_rows
        client.server.batcher.rows, client.server.batcher._queue_rows = 4, before
        status, _, headers = client("POST", "/v2/models/m1/infer", json.dumps(infer_body(expected[0], 0)))
        assert status == 429
        assert headers["retry-after"] == "1"
        client.server.batcher.rows = 0
        assert client.json("POST", "/score", rows[0][:4])[0] == 200


def test_values_too_large_for_the_model_are_refused_and_it_stays_ready(client, expected):
    body = infer_body(expected[0], 0)
    good = json.dumps(body)
    body["inputs"][0]["data"] = [3e38, -3e38] * (len(body["inputs"][0]["data"]) // 2) + [3e38]
    body["inputs"][0]["data"] = body["inputs"][0]["data"][: body["inputs"][0]["shape"][1]]
    status, answer = client.json("POST", "/v2/models/m1/infer", body)
    assert (status, answer["error"]) == (
        400,
        "these values have no finite probability: they are too large for the model",
    )
    assert client.json("GET", "/v2/health/ready")[0] == 200
    assert client.json("POST", "/v2/models/m1/infer", json.loads(good))[0] == 200


def test_a_model_without_vocabularies(served, expected, generated, tmp_path):
    config = dqrm.ExportConfig(vocabulary="none")
    dqrm.export_run(served[0].parent / "run1", tmp_path / "bare.dqrm", config)
    row = raw_rows(generated, 1)[0]
    with running(tmp_path / "bare.dqrm") as client:
        status, answer = client.json("POST", "/score", row)
        assert status == 404
        assert "bare has no vocabularies" in answer["error"]
        assert client.json("POST", "/v2/models/bare/infer", infer_body(expected[0], 0))[0] == 200
        assert client.json("GET", "/models")[1][0]["fields"] is None
    with running(tmp_path / "bare.dqrm", data=str(generated.path)) as client:
        _, answer = client.json("POST", "/score", row)
        assert close(answer["probabilities"], dqrm.load(served[0]).score(row))


def test_without_a_page(served):
    with running(served[0], page=False, access_log=False) as client:
        assert client("GET", "/")[0] == 404
        assert client("GET", "/models")[0] == 404
        assert client("GET", "/v2")[0] == 200
        client.server.lines._flush()
        assert "route" not in client.lines.getvalue()


def test_names_of_models(served, tmp_path):
    assert named_paths(["a/one.dqrm", "two=b/one.dqrm"]) == {
        "one": Path("a/one.dqrm"), "two": Path("b/one.dqrm"),
    }  # fmt: skip
    with pytest.raises(UserError, match="are both named 'one'; name one as NAME=FILE"):
        named_paths(["a/one.dqrm", "b/one.dqrm"])
    with pytest.raises(UserError, match="got the name 'a b', expected letters"):
        named_paths(["a b.dqrm"])
    for given, said in (
        ([tmp_path / "none.dqrm"], "cannot read .*none.dqrm: No such file"),
        ([served[0].parent / "run1"], "is a folder, expected a .dqrm file"),
        ([__file__], "test_serve.py"),
    ):
        with pytest.raises(UserError, match=said):
            Server([str(path) for path in given], ServeConfig(port=0))
    with pytest.raises(UserError, match="--data x is for one model; 2 are given"):
        Server([f"a={served[0]}", f"b={served[1]}"], ServeConfig(port=0, data="x"))


def test_a_port_that_is_taken(served):
    with (
        running(served[0]) as client,
        pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{client.port}: Address already in use"),
    ):
        Server([str(served[0])], ServeConfig(port=client.port))


def test_several_models_at_score(client):
    status, answer = client.json("POST", "/score", {})
    assert status == 400
    assert answer["error"] == "2 models are served, expected one of /score/m1, /score/bags"


@pytest.mark.parametrize("field", [{"port": 70000}, {"queue_rows": 0}, {"request_timeout": 0}, {"watch": -1}])
def test_values_out_of_range(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} is {next(iter(field.values()))}"):
        ServeConfig(**field)
