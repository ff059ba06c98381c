"""Malformed requests: a status of 4xx and one sentence; never a 500, never a hang, and the server goes on."""

import json
import random
import socket
import struct

import numpy as np
import pytest

from serve_helpers import close, infer_body, raw_rows, running

INFER, SCORE = "/v2/models/m1/infer", "/score"


@pytest.fixture(scope="module")
def client(served):
    with running(served[0], max_request_bytes=200_000, request_timeout=0.6) as found:
        yield found


def refused(client, path, body, headers=None, status=400):
    found, data, _ = client("POST", path, body, headers)
    sentence = json.loads(data)["error"]
    assert found == status, sentence
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


def dense_input(**fields):
    return {"name": "dense", "shape": [1, 13], "datatype": "FP32", "data": [0.5] * 13, **fields}


def ids_input(**fields):
    return {"name": "ids", "shape": [1, 26], "datatype": "INT64", "data": [0] * 26, **fields}


def body(dense=None, ids=None, **more):
    return {"inputs": [dense_input(**(dense or {})), ids_input(**(ids or {}))], **more}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "it is empty"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe{}", "it is not UTF-8"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 30_000, "it is nested too deeply"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("1" * 50_000, "thousands of digits"),
        ("{} {}", "Extra data"),
    ],
)
@pytest.mark.parametrize("path", [INFER, SCORE])
def test_what_is_no_json(client, path, data, said):
    assert said in refused(client, path, data)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "is not a JSON object"),
        ({}, "'inputs' is None, expected a list"),
        ({"inputs": [1]}, "'inputs' is [1], expected a list of objects"),
        ({"inputs": []}, "input 'dense' is missing, expected dense, ids"),
        (body(id=7), "'id' is 7, expected text"),
        (body({"name": "dens"}), "m1 has no input 'dens'; did you mean 'dense'?"),
        (body({"name": None}), "m1 has no input None"),
        (body({"name": "ids", "shape": [1, 26], "datatype": "INT64", "data": [0] * 26}), "'ids' is given twice"),
        (body({"shape": [1, 12]}), "input 'dense' has shape [1, 12], expected [-1, 13]"),
        (body({"shape": [13]}), "has shape [13], expected [-1, 13]"),
        (body({"shape": [-1, 13]}), "has shape [-1, 13], expected"),
        (body({"shape": [2**62, 13]}), "has shape [4611686018427387904, 13]"),
        (body({"shape": [True, 13]}), "has shape [True, 13]"),
        (body({"shape": "1x13"}), "has shape '1x13'"),
        (body({"datatype": "INT64"}), "input 'dense' has datatype 'INT64', expected FP32 or FP64"),
        (body(None, {"datatype": "FP32"}), "input 'ids' has datatype 'FP32', expected INT64 or INT32"),
        (body(None, {"datatype": "BYTES", "data": ["a"] * 26}), "input 'ids' has datatype 'BYTES'"),
        (body(None, {"datatype": []}), "input 'ids' has datatype []"),
        (body({"data": [0.5] * 12}), "input 'dense' has 12 values, expected 13"),
        (body({"data": None}), "input 'dense' has data None, expected a list"),
        (body({"data": ["a"] * 13}), "input 'dense' holds 'a', expected numbers"),
        (body({"data": [True] * 13}), "input 'dense' holds True, expected numbers"),
        (body({"data": [None] * 13}), "input 'dense' holds None, expected numbers"),
        (body({"data": [[0.5] * 12]}), "not nested as its shape [1, 13]"),
        (body({"data": [[[0.5]] * 13]}), "input 'dense' holds [0.5], expected numbers"),
        (body({"data": [1e39] * 13}), "input 'dense' holds inf in row 1, expected finite numbers"),
        (body(None, {"data": [0.5] * 26}), "input 'ids' holds 0.5, expected whole numbers"),
        (body(None, {"data": [2**70] * 26}), "input 'ids' holds a number that int64 cannot hold"),
        (body(None, {"data": [-1] * 26}), "input 'ids' holds -1 in row 1 for column C1, expected 0 to"),
        (body(None, {"data": [0] * 25 + [10**9]}), "input 'ids' holds 1000000000 in row 1 for column C26"),
        (body(None, {"shape": [2, 26], "data": [0] * 52}), "input 'ids' has 2 rows, the others have 1"),
        (body({"shape": [0, 13], "data": []}, {"shape": [0, 26], "data": []}), "has no rows"),
        (body({"parameters": 1}), "'parameters' of input 'dense' is 1, expected an object"),
        (body({"parameters": {"shared_memory_region": "x"}}), "is in shared memory"),
        (body({"parameters": {"binary_data_size": 52}}), "has binary_data_size 52 and 0 bytes, expected 52 bytes"),
        (body({"parameters": {"binary_data_size": -1}}), "has binary_data_size -1"),
        (body(outputs=[{"name": "score"}]), "there is no output 'score', expected probability or logit"),
        (body(outputs={"name": "score"}), "'outputs' is {'name': 'score'}, expected a list"),
        (body(outputs=[{"name": []}]), "there is no output []"),
    ],
)
def test_inference_requests(client, given, said):
    assert said in refused(client, INFER, given)


@pytest.mark.parametrize("length", ["-1", "a", "9" * 30, "10000", "²"])
def test_lengths_of_the_header(client, length):
    headers = {"Inference-Header-Content-Length": length.encode("latin-1")}
    assert "Inference-Header-Content-Length is" in refused(client, INFER, body(), headers)


def binary(dense, ids):
    """A binary request: its body and headers."""
    arrays = [np.ascontiguousarray(dense, "<f4"), np.ascontiguousarray(ids, "<i8")]
    given = body()
    for each, array in zip(given["inputs"], arrays):
        del each["data"]
        each["shape"], each["parameters"] = list(array.shape), {"binary_data_size": array.nbytes}
    head = json.dumps(given).encode()
    return head + b"".join(array.tobytes() for array in arrays), {"Inference-Header-Content-Length": str(len(head))}


def test_binary_tensors(client, expected):
    batch, probabilities = expected
    data, headers = binary(batch.dense.numpy(), batch.ids.numpy())
    status, answer = client.json("POST", INFER, data, headers)
    assert status == 200
    assert close(answer["outputs"][0]["data"], probabilities[answer["model_version"]])
    assert "bytes for shape" in refused(client, INFER, data[:-1], headers)
    assert "1 bytes follow the last binary input" in refused(client, INFER, data + b"x", headers)
    dense = batch.dense.numpy().copy()
    dense[5, 2] = np.nan
    assert "holds nan in row 6" in refused(client, INFER, *binary(dense, batch.ids.numpy()))


def test_bodies_that_are_too_large(client):
    assert "more than 200000 bytes" in refused(client, SCORE, b" " * 200_001, status=413)
    assert "more than 200000 bytes" in refused(client, INFER, b" " * 5_000_000, status=413)
    chunked = b"POST /score HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536
    assert b" 413 " in client.raw(chunked + (b"\r\n10000\r\n" + b" " * 65536) * 4 + b"\r\n0\r\n\r\n")
    assert "not compressed" in refused(client, SCORE, b"x", {"Content-Encoding": "gzip"}, 415)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 408),
        (b"POST /score HTTP/1.1\r\nhost: x\r\n", 408),
        (b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{", 408),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n", 400),
    ],
)
def test_slow_and_endless_senders(client, sent, status):
    answer = client.raw(sent)
    assert answer.split(b" ", 2)[1] == str(status).encode()
    assert answer.rpartition(b"\r\n\r\n")[2]


def test_a_sender_of_single_bytes_is_cut_off(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.settimeout(0.05)
        answer = b""
        for byte in b"POST /score HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 1000:
            try:
                connection.sendall(bytes([byte]))
                answer += connection.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
        assert b" 408 " in answer


def test_clients_that_hang_up(client, expected):
    for length in (5, 500):
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{1234" % length)
    assert client.json("POST", INFER, infer_body(expected[0], 0))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", INFER, 405), ("DELETE", "/v2", 405), ("POST", "/v2/models/m2/infer", 404),
     ("POST", "/v2/models/m1/versions/9/infer", 404), ("POST", "/score/m2", 404), ("GET", "/v2/", 404),
     ("GET", "/v2/models/%00", 404), ("GET", "/%ff", 404)],
)  # fmt: skip
def test_paths(client, method, path, status):
    found, answer = client.json(method, path)
    assert found == status
    assert answer["error"]


def mangled(random, good, row):
    """A malformed request: path, body and headers."""
    kind = random.randrange(6)
    if kind == 0:  # a cut, or a byte of another value
        data = bytearray(json.dumps(good).encode())
        at = random.randrange(len(data))
        return INFER, bytes(data[:at]), {}
    if kind == 1:
        given = json.loads(json.dumps(good))
        each = random.choice(given["inputs"])
        odd = [None, True, "x", -1, 1e400, [], {}, [[]], "NaN", 10**30, {"a": [1]}]
        each[random.choice(["name", "shape", "datatype", "data"])] = random.choice(odd)
        return INFER, json.dumps(given), {}
    if kind == 2:
        given = json.loads(json.dumps(good))
        each = random.choice(given["inputs"])
        each["data"][random.randrange(13)] = random.choice([float("nan"), float("inf"), "1", None, 10**39, [1], -5e40])
        return INFER, json.dumps(given), {}
    if kind == 3:
        given = dict(row)
        name = random.choice(list(given))
        given[name] = random.choice([{"a": 1}, [[1]], float("nan"), ["a", 1], [None, {}], [{}]])
        return SCORE, json.dumps(given), {}
    if kind == 4:
        depth = random.choice([999, 5000, 90_000])
        return random.choice([INFER, SCORE]), "[" * depth + "]" * random.choice([0, depth]), {}
    data, headers = binary(np.zeros((1, 13)), np.zeros((1, 26)))
    return INFER, data[: random.randrange(len(data) - 1)], headers


def malformed(client, row, expected, count):
    draw, good = random.Random(0), infer_body(expected[0], 0)
    statuses = set()
    for number in range(count):
        path, data, headers = mangled(draw, good, row)
        status, answer = client.json("POST", path, data, headers)
        assert 400 <= status < 500, (number, path, data[:300], status, answer)
        assert set(answer) == {"error"}
        assert "\n" not in answer["error"]
        statuses.add(status)
    status, answer = client.json("POST", INFER, good)
    assert status == 200
    assert close(answer["outputs"][0]["data"], expected[1][answer["model_version"]][:1])
    return statuses


def test_malformed_requests(client, generated, expected):
    malformed(client, raw_rows(generated, 1)[0], expected, 60)


@pytest.mark.slow
def test_1000_malformed_requests(client, generated, expected):
    malformed(client, raw_rows(generated, 1)[0], expected, 1000)
