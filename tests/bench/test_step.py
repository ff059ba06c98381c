"""`dqrm bench`: what its JSON holds, that variants alternate, and what it refuses. No test looks at a timing's size."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from cli_helpers import command
from dqrm import recipe
from dqrm.bench import embedding, step
from dqrm.bench.baseline import PlainDLRM, WholeTableQAT
from dqrm.bench.config import (
    ARCHITECTURES,
    EMBEDDING_VARIANTS,
    NUM_DENSE,
    SCHEMES,
    BenchEmbeddingConfig,
    BenchStepConfig,
    Scheme,
)
from dqrm.bench.data import endless, write_split
from dqrm.bench.measure import Clock, require_memory, spread
from dqrm.bench.variants import training_config
from dqrm.cli import cli
from dqrm.errors import UserError
from dqrm.models.registry import build_model
from dqrm.quant.int8_rows import Int8Rows
from dqrm.quant.uniform import fake_quantize

SMALL = {"rows_scale": 0.0001, "samples": 512, "steps": 4, "warmup": 1, "threads": 1, "device": "cpu"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
FIGURES = {
    "name", "variant", "steps", "median_ms", "p10_ms", "p90_ms", "mean_ms", "per_second", "peak_rss_mb",
}  # fmt: skip
MACHINE = {"processor", "cores", "threads", "device", "cpu_capability", "native_kernels", "torch", "python"}


@pytest.fixture
def order(monkeypatch):
    """The names of the variants in the order of their steps."""
    steps = []
    for kind in (step.Ours, step.Plain):
        original = kind.step

        def noted(self, batch, original=original):
            steps.append(self.name)
            original(self, batch)

        monkeypatch.setattr(kind, "step", noted)
    return steps


def test_steps_as_json(capsys, order):
    names = ["baseline", "fp32", "int4", "int4_periodic", "int4_bf16"]
    flags = [*FLAGS, "--batch-size=16-8", "--scale-period=5", f"--variants={','.join(names)}"]
    code, out, err = command(capsys, "bench", "step", *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"variants", "machine", "settings", "memory"}
    assert set(found["machine"]) == MACHINE
    assert [(v["batch_size"], v["variant"]) for v in found["variants"]] == [(b, n) for b in (16, 8) for n in names]
    for variant in found["variants"]:
        more = {"batch_size", "median_excl_data_ms", "cost_ms", "parts", "loss", "ratio_to_baseline", "table_bytes"}
        assert set(variant) == FIGURES | more | {"ratio_to_fp32"}
        assert variant["steps"] == SMALL["steps"]
        assert variant["p10_ms"] <= variant["median_ms"] <= variant["p90_ms"]
        assert list(variant["parts"]) == ["data", "lookup", "forward", "backward", "update"]
        assert math.isfinite(variant["loss"])
        # fp32_bf16 was not measured, so int4_bf16 has nothing that computes alike.
        assert (variant["ratio_to_fp32"] is None) == (variant["variant"] == "int4_bf16")
        assert variant["ratio_to_baseline"] > 0
    assert found["variants"][0]["name"] == "nn.EmbeddingBag + nn.Linear"
    assert found["settings"]["batch_size"] == [16, 8]
    assert set(found["memory"]) == {
        "before_model_mb", "tables_mb", "create_seconds", "after_model_mb", "steady_mb",
    }  # fmt: skip
    # Every round has one step of each.
    for at in range(0, len(order), len(names)):
        assert set(order[at : at + len(names)]) == set(names)


def test_steps_as_tables(capsys):
    code, out, _ = command(
        capsys, "bench", "step", *FLAGS, "--batch-size=8", "--scale-period=1", "--variants=int8_bf16_tables,fp32",
        "--arch=terabyte",
    )  # fmt: skip
    assert code == 0
    assert "terabyte" in out
    assert "int8_bf16_tables" in out
    assert "Refreshes of periodic scales are in the mean" in out
    assert "native kernels" in out


def test_variants_share_tables_where_they_can():
    options = BenchStepConfig(**SMALL, variants=("baseline", "int4_periodic", "fp32", "int4_bf16_tables", "int4"))
    rows = ARCHITECTURES["kaggle"].scaled(options.rows_scale)
    memory: dict = {}
    made = step._variants(options, rows, Clock(torch.device("cpu")), memory)
    weights = [variant.tables.weight for variant in made[1:]]
    assert weights[0].data_ptr() == weights[1].data_ptr() == made[0].tables.bags[0].weight.data_ptr()
    assert weights[2].dtype == torch.bfloat16
    assert weights[3].data_ptr() not in {weight.data_ptr() for weight in weights[:3]}
    assert memory["create_seconds"] >= 0
    start = sum(rows[:5])
    torch.testing.assert_close(made[0].tables.bags[5].weight, weights[0][start : start + rows[5]], rtol=0, atol=0)


@pytest.mark.parametrize(("optimizer", "of_row"), [("sgd", 0), ("rowwise_adagrad", 4), ("adagrad", 4 * 16)])
def test_each_variant_tells_what_its_tables_take(optimizer, of_row):
    variants = ("baseline", "fp32", "int4_bf16_tables", "int4_int8_tables", "int8_bf16_int8_tables")
    options = BenchStepConfig(**SMALL, batch_size=(8,), variants=variants, optimizer=optimizer)
    rows = sum(ARCHITECTURES["kaggle"].scaled(options.rows_scale))
    found = {each["variant"]: each["table_bytes"] for each in step.run_step(options)["variants"]}
    widths = dict(zip(variants, (64, 64, 32, 18, 18)))
    assert {name: each["weights"] for name, each in found.items()} == {name: rows * w for name, w in widths.items()}
    # Storages that round at random count their steps in 8 bytes.
    expected = {"baseline": 0, "fp32": rows * of_row} | dict.fromkeys(variants[2:], rows * of_row + 8)
    assert {name: each["optimizer"] for name, each in found.items()} == expected


def test_int8_tables_are_not_shared():
    options = BenchStepConfig(**SMALL, variants=("fp32", "fp32_int8_tables", "int4_periodic_int8_tables"))
    rows = ARCHITECTURES["kaggle"].scaled(options.rows_scale)
    weights = [each.tables.weight for each in step._variants(options, rows, Clock(torch.device("cpu")), {})]
    assert [type(weight.data) for weight in weights] == [torch.Tensor, Int8Rows, Int8Rows]
    assert weights[1].stored.data_ptr() != weights[2].stored.data_ptr()


def test_the_baseline_is_the_same_model():
    options = BenchStepConfig(**SMALL)
    arch, rows = ARCHITECTURES["kaggle"], ARCHITECTURES["kaggle"].scaled(options.rows_scale)
    ours = build_model(training_config(options, Scheme(32)), NUM_DENSE, rows)
    plain = PlainDLRM(13, arch.bottom_mlp, arch.top_mlp, torch.split(ours.tables.weight.detach(), list(rows)))
    for part in ("bottom", "top"):
        layers = zip(getattr(plain, part), getattr(ours, part))
        for mine, theirs in layers:
            if isinstance(mine, torch.nn.Linear):
                mine.load_state_dict({"weight": theirs.weight.detach(), "bias": theirs.bias.detach()})
    random = torch.Generator().manual_seed(0)
    dense = torch.rand(7, 13, generator=random)
    ids = (torch.rand(7, 26, generator=random) * torch.tensor(rows)).int()
    torch.testing.assert_close(plain(dense, ids.t().contiguous().long()), ours(dense, ids), rtol=1e-5, atol=1e-5)


def test_whole_table_qat_quantizes_as_ours():
    torch.manual_seed(0)
    module, ids = WholeTableQAT(50, 4, 4), torch.tensor([[3], [7], [3]])
    scale = module.weight.detach().abs().max() / 7
    torch.testing.assert_close(module(ids), fake_quantize(module.weight.detach()[[3, 7, 3]], scale, 4))
    module(ids).sum().backward()
    assert not module.weight.grad.is_sparse
    assert module.weight.grad[3].tolist() == [2.0] * 4


def test_generated_data_is_skewed_and_within_its_tables(tmp_path):
    rows = (3, 100, 2_000_000)
    split = write_split(tmp_path, 1000, 13, rows, seed=1)
    batch = next(split.batches(1000))
    assert batch.dense.shape == (1000, 13)
    assert 0 < batch.labels.mean() < 0.5
    for number, size in enumerate(rows):
        ids = batch.ids[:, number]
        assert 0 <= int(ids.min()) <= int(ids.max()) < size
        assert int(ids.median()) < size / 2
    first, second = (list(np.sort(next(endless(split, 1000, "global", seed)).ids[:, 2])) for seed in (1, 2))
    assert first == second
    stream = endless(split, 300, "block", 1)
    assert [len(next(stream)) for _ in range(7)] == [300] * 7


def test_a_loss_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setattr(step.Plain, "step", lambda self, batch: setattr(self, "loss", torch.tensor(math.nan)))
    with pytest.raises(UserError, match="loss of baseline is nan at batch size 8"):
        step.run_step(BenchStepConfig(**SMALL, variants=("baseline",), batch_size=(8,)))


def test_embedding_as_json(capsys):
    flags = ["--rows=300", "--batch-size=16", "--repeats=12", "--scale-period=7", "--threads=1", "--device=cpu"]
    code, out, err = command(capsys, "bench", "embedding", *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"variants", "machine", "settings", "skipped"}
    assert set(found["machine"]) == MACHINE
    measured = [variant["variant"] for variant in found["variants"]]
    assert sorted([*measured, *found["skipped"]]) == sorted(EMBEDDING_VARIANTS)
    for variant in found["variants"]:
        assert set(variant) == FIGURES | {"ratio_to_ours"}
        fast = variant["variant"] in embedding.FAST
        assert variant["steps"] >= 12 if fast else variant["steps"] == 10
    assert found["variants"][0]["ratio_to_ours"] == 1


def test_embedding_as_a_table_tells_what_was_skipped(capsys):
    code, out, _ = command(
        capsys, "bench", "embedding", "--rows=50", "--batch-size=4", "--repeats=2", "--bits=2", "--threads=1",
        "--variants=torch_ao,fp32", "--scale-period=1", "--device=cpu",
    )  # fmt: skip
    assert code == 0
    assert "torch_ao skipped: it has no default configuration of 2 bits" in out
    assert "nn.EmbeddingBag FP32" in out


def test_embedding_variants_alternate(monkeypatch):
    seen = []
    original = embedding._step
    monkeypatch.setattr(embedding, "_step", lambda module, *rest: (seen.append(module), original(module, *rest))[1])
    options = BenchEmbeddingConfig(rows=40, batch_size=4, repeats=30, variants=("ours", "fp32", "whole_table"))
    found = embedding.run_embedding(options)
    assert [variant["steps"] for variant in found["variants"]] == [30, 30, 10]
    # After the first round, in which each warms up, every round has one step of both fast variants.
    kinds = [type(module).__name__ for module in seen[12:] if not isinstance(module, WholeTableQAT)]
    assert len(kinds) == 58
    for at in range(0, 58, 2):
        assert set(kinds[at : at + 2]) == {"QuantEmbeddingBag", "EmbeddingBag"}


def test_percentiles():
    found = spread([1.0, 2.0, 3.0, 4.0, 100.0], per_step=10)
    assert (found["median_ms"], found["mean_ms"], found["per_second"]) == (3, 22, 3333.3)
    assert found["p10_ms"] == pytest.approx(1.4)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"the tables take 1000000.00 GB and .* --rows-scale"):
        require_memory(10**15, torch.device("cpu"))


def test_the_optimizer_and_its_learning_rate_are_those_asked_for():
    for name, rate in ("sgd", 0.1), ("adagrad", recipe.learning_rate("adagrad", 16)):
        options = BenchStepConfig(**SMALL, variants=("fp32", "int4"), batch_size=(16,), optimizer=name)
        assert step.run_step(options)["settings"]["learning_rate"] == rate
        config = training_config(options, SCHEMES["int4"])
        assert (config.optimizer.optimizer, config.optimizer.rate) == (name, rate)
    with pytest.raises(UserError, match="'adagard'"):
        step.run_step(BenchStepConfig(**SMALL, variants=("fp32",), batch_size=(16,), optimizer="adagard"))


def test_what_the_names_of_variants_say():
    assert SCHEMES["int4_running_max"] == Scheme(4, refresh="running_max")
    assert SCHEMES["int4_periodic_bf16"] == Scheme(4, refresh="periodic", bf16=True)
    assert SCHEMES["int8_bf16"].reference == SCHEMES["fp32_bf16"].reference == "fp32_bf16"
    assert SCHEMES["fp32_bf16_tables"] == Scheme(32, table_dtype="bf16")
    assert "fp32_running_max" not in SCHEMES


def test_every_field_is_a_flag_with_help():
    for verb, cls in (("step", BenchStepConfig), ("embedding", BenchEmbeddingConfig)):
        options = {option: parameter for parameter in cli.commands["bench"].commands[verb].params
                   for option in parameter.opts}  # fmt: skip
        for field in fields(cls):
            assert len(options["--" + field.name.replace("_", "-")].help) > 20


@pytest.mark.parametrize(
    ("verb", "flag", "message"),
    [
        ("step", "--variants=int4_runing_max", "variants has 'int4_runing_max'; did you mean 'int4_running_max'?"),
        ("step", "--variants=fp32,fp32", "variants has 'fp32' twice"),
        ("step", "--variants=", "variants is empty; known are baseline, fp32"),
        ("step", "--rows-scale=0", "rows_scale is 0.0, expected above 0 and at most 1"),
        ("step", "--batch-size=0-8", "batch_size is '0-8', expected sizes of 1 or more"),
        ("step", "--steps=0", "steps is 0, expected 1 or more"),
        ("step", "--warmup=0", "warmup is 0, expected 1 or more"),
        ("step", "--arch=criteo", "arch: got 'criteo', expected one of kaggle, terabyte"),
        ("step", "--device=gpu", "device is 'gpu', expected 'auto'"),
        ("step", "--threads=5000", "threads is 5000, expected 1024 or fewer"),
        ("embedding", "--bits=32", "bits is 32, expected 2, 4, 8 or 16"),
        ("embedding", "--rows=none", "rows: got 'none', expected a whole number"),
        ("embedding", "--variants=torchoa", "variants has 'torchoa'; did you mean 'torchao'?"),
    ],
)
def test_impossible_flags_are_refused_in_one_sentence(capsys, verb, flag, message):
    code, out, err = command(capsys, "bench", verb, flag)
    assert (code, out) == (2, "")
    assert f"bench {verb}: {message}" in err
    assert err.count("\n") == 1
