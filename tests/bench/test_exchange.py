"""`dqrm bench exchange`: real ranks on loopback; that its counts are right, and what it refuses."""

import json

import pytest

from cli_helpers import command
from dqrm.bench.config import BenchExchangeConfig


@pytest.mark.distributed
def test_two_ranks_on_loopback(capsys):
    code, out, _ = command(
        capsys, "bench", "exchange", "--ranks", "2", "--rows-scale", "0.0001", "--steps", "6", "--warmup", "1",
        "--batch-size", "16", "--variants", "dense,fp32,int8,int4", "--dense-steps", "1", "--json",
    )  # fmt: skip
    assert not code
    found = json.loads(out)
    assert list(found) == ["variants", "machine", "settings"]
    variants = {variant["variant"]: variant for variant in found["variants"]}
    assert list(variants) == ["dense", "fp32", "int8", "int4"]
    for name, variant in variants.items():
        assert variant["steps"] == (1 if name == "dense" else 6)
        assert 0 < variant["p10_ms"] <= variant["median_ms"] <= variant["p90_ms"]
        assert variant["ratio_to_fp32"] > 0
        if name == "dense":
            assert variant["payload_bytes"] is None
            continue
        assert variant["payload_bytes"] == pytest.approx(sum(variant["payload_parts"].values()), abs=0.5)
        # With two ranks each sends half of the MLP, the other's half of the sums, and its rows: its payload once.
        assert variant["counted_bytes"] == pytest.approx(variant["payload_bytes"], rel=0.01)
        assert variant["wire_bytes"] > variant["counted_bytes"]  # headers; on loopback other programs count, too
    mlp = 475_985  # values of the Kaggle model's MLP
    assert variants["fp32"]["payload_parts"]["mlp_values"] == 4 * mlp
    assert variants["int8"]["payload_parts"]["mlp_values"] == mlp
    assert variants["int4"]["payload_parts"]["mlp_values"] == mlp / 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ranks", "1"), "ranks is 1, expected 2 or more"),
        (("--variants", "int3"), "variants has 'int3'; did you mean 'int"),
        (("--rows-scale", "2"), "rows_scale is 2.0, expected above 0 and at most 1"),
    ],
)
def test_what_is_refused(capsys, arguments, sentence):
    code, out, said = command(capsys, "bench", "exchange", *arguments)
    assert code == 2
    assert out == ""
    assert said.startswith("dqrm: ")
    assert sentence in said


def test_a_rank_that_fails_is_named(monkeypatch, tmp_path):
    from dqrm.bench import exchange
    from dqrm.errors import UserError

    monkeypatch.setattr(exchange.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"rank [01] ended"):
        exchange.run_exchange(BenchExchangeConfig(ranks=2, rows_scale=0.0001))
