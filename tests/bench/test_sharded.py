"""`dqrm bench sharded`: real ranks on loopback; that its counts are right, and what it refuses."""

import importlib.util
import json

import pytest

from cli_helpers import command

TORCHREC = pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is None, reason="the extra dqrm[torchrec] and TorchRec are not installed"
)


@TORCHREC
@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_on_loopback(capsys):
    tables, batch, ranks = 4, 16, 2
    code, out, said = command(
        capsys, "bench", "sharded", "--ranks", str(ranks), "--tables", str(tables), "--rows", "64", "--steps", "6",
        "--warmup", "1", "--batch-size", str(batch), "--sharding", "table_wise", "--json",
    )  # fmt: skip
    assert not code, said
    found = json.loads(out)
    assert list(found) == ["variants", "machine", "settings"]
    variants = {(variant["variant"], variant["dim"]): variant for variant in found["variants"]}
    assert list(variants) == [("fp32", 16), ("int4", 16), ("fp32", 64), ("int4", 64)]
    rows = tables // ranks * batch  # table-wise, a rank sends the rows of its tables for the other rank's samples
    for (name, dim), variant in variants.items():
        forward, backward = (4 * dim, 4 * dim) if name == "fp32" else (dim // 2 + 4, dim + 4)
        assert (variant["forward_bytes"], variant["backward_bytes"]) == (rows * forward, rows * backward)
        assert variant["wire_bytes"] > rows * (forward + backward)  # ids and headers besides
        assert variant["steps"] == 6
        assert 0 < variant["p10_ms"] <= variant["median_ms"] <= variant["p90_ms"]
        assert variant["ratio_to_fp32"] > 0
    # The first bar.
    assert variants["int4", 16]["forward_ratio"] >= 5.3
    assert variants["int4", 64]["forward_ratio"] >= 7
    assert variants["int4", 16]["backward_ratio"] >= 3.2
    assert variants["int4", 64]["backward_ratio"] >= 3.7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ranks", "1"), "ranks is 1, expected 2 or more"),
        (("--variants", "int3"), "variants has 'int3'; did you mean 'int"),
        (("--dim", "16-18"), "dim is '16-18', expected multiples of 4, as 16-64 (FBGEMM)"),
    ],
)
def test_what_is_refused(capsys, arguments, sentence):
    code, out, said = command(capsys, "bench", "sharded", *arguments)
    assert code == 2
    assert out == ""
    assert said.startswith("dqrm: ")
    assert sentence in said
