"""torchrun on this machine: what real ranks give is what simulated ones give, bit for bit; and bytes.

Starting ranks costs seconds, so the tests share a few launches; the commands of `several` run in one.
"""

import json

import numpy as np
import polars as pl
import pytest
import torch

from conftest import tensors, tiny
from distributed.test_data import PARTS, dense_bytes, expected
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import train
from dqrm.training.run import Run
from launch_helpers import (
    LONG,
    flags,
    here,
    launched,
    lines,
    newest,
    no_traceback_of_ours,
    same_run,
    same_tensors,
    simulated,
    state,
    summary,
    torchrun,
    train_words,
)

pytestmark = pytest.mark.distributed
PLAIN = {"bits": 32, "table_codec": "fp32", "mlp_codec": "fp32", "epochs": 2, "checkpoint_every": 9}
ODD = {"table_codec": "int4", "mlp_codec": "int4", "mlp_codec_scale": "bucket:100", "codec_rounding": "stochastic",
       "table_exchange": "all_to_all", "scale_refresh": "running_max",
       "rescan_period": 17, "small_table_bits": 8, "small_table_rows": 50,
       "optimizer": "rowwise_adagrad", "batch_size": 61, "log_every": 7, "seed": 5}  # fmt: skip
SHARED = {"shared_scales": True, "table_codec": "int4", "table_dtype": "bf16", "precision": "bf16", "log_every": 4,
          "mlp_codec": "bf16", "bits": 8, "quantizer": "mse", "max_steps": 20}  # fmt: skip
ROWS = {"table_codec_scale": "row", "shuffle": "block", "log_every": 1, "batch_size": 37, "table_l2": 0.1,
        "optimizer": "adagrad", "max_steps": 20, "forward_rounding": "stochastic",
        "table_granularity": "row"}  # fmt: skip
DCN = {"model": "dcn", "bottom_mlp": None, "top_mlp": None, "cross_layers": 2, "cross_rank": 3, "deep_mlp": "8-4",
       "dropout": 0.4, "optimizer": "rowwise_adagrad", "learning_rate": 0.01, "max_steps": 20, "log_every": 5,
       "checkpoint_every": 8}  # fmt: skip
REDRAWN = {"callbacks": "redraw_tables:min_rows=30,ema:decay=0.9", "optimizer": "rowwise_adagrad", "epochs": 2,
           "max_steps": 40, "scale_refresh": "running_max"}  # fmt: skip
BLOCKS = REDRAWN | {"table_granularity": "block:8", "table_qscheme": "affine", "rescan_period": 13}
COUNTED = REDRAWN | {"optimizer": "counter_adagrad", "table_l2": 0.01, "count_halflife": 20, "checkpoint_every": 9,
                     "table_dtype": "int4", "hot_rows": 0.1}  # fmt: skip
STAGED = REDRAWN | {"callbacks": "stage_bits:tables=32:mlp=16,redraw_tables:min_rows=30", "checkpoint_every": 9,
                    "optimizer": "frequency_adagrad"}  # fmt: skip
LSQ = REDRAWN | {"quantizer": "lsq", "learning_rate": 0.02, "checkpoint_every": 9}
ADAM = {"optimizer": "rowwise_adam", "table_learning_rate": 0.02, "clip_norm": 0.05, "learning_rate": 0.01,
        "max_steps": 20, "log_every": 5, "checkpoint_every": 8}  # fmt: skip
DENSE_ADAM = {"optimizer": "dense_adam", "table_l2": 1e-3, "learning_rate": 0.01, "scale_refresh": "running_max",
              "max_steps": 40, "log_every": 5, "checkpoint_every": 8, "eval_every": 11, "warmup_steps": 9}  # fmt: skip
INT8 = REDRAWN | {"table_dtype": "int8", "learning_rate": 0.02, "table_l2": 1e-3, "checkpoint_every": 9,
                  "embedding_dim": 5, "bottom_mlp": "8-5", "table_codec": "int4"}  # fmt: skip
# On the bags: 38 samples a step, and last batches that are smaller than the number of ranks.
BAGS = {"batch_size": 38, "epochs": 3, "scale_period": 2, "log_every": 2}


# ---- the launches


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("launches")


@pytest.fixture(scope="module")
def two(generated, work):
    """A run of two ranks that nobody stops, by the command line that a user types."""
    with torchrun(
        work / "two", 2, "train", generated.path, "-o", work / "two" / "run", *flags(**LONG), "--json"
    ) as launch:
        return launch.wait()[0], work / "two" / "run"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Only dense columns, only a table of bags with them, and neither validation nor test rows: {name: dataset}."""
    made, random = {}, np.random.default_rng(0)
    columns = {"label": random.integers(0, 2, 103).tolist(), "x": random.normal(size=103).tolist()}
    tags = [[f"t{tag}" for tag in random.integers(0, 9, count)] for count in random.integers(0, 4, 103)]
    for name, fields in {
        "dense": {"dense": ("x",)},
        "unsplit": {"dense": ("x",), "categorical": ("tags",), "multi": ("tags",), "split": "time",
                    "validation_fraction": 0, "test_fraction": 0},
    }.items():  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        given = columns if name == "dense" else columns | {"tags": tags}
        pl.DataFrame(given).write_parquet(folder / "log.parquet")
        made[name] = prepare([folder / "log.parquet"], folder / "data", PrepareConfig(**fields))
    return made


@pytest.fixture(scope="module")
def pair(generated, bags_data, small, work):
    """Two ranks, one command after the other: {name: (run folder, each rank's probe)}, and what they said."""
    return launched(work / "pair", 2, {
        "odd": train_words(generated, **ODD),
        "shared": train_words(generated, **SHARED),
        "rows": train_words(generated, **ROWS),
        "redrawn": train_words(generated, **REDRAWN),
        "blocks": train_words(generated, **BLOCKS),
        "lsq": train_words(generated, **LSQ),
        "staged": train_words(generated, **STAGED),
        "counted": train_words(generated, **COUNTED),
        "adam": train_words(generated, **ADAM),
        "dense_adam": train_words(generated, **DENSE_ADAM),
        "int8": train_words(generated, **INT8),
        "plain": train_words(generated, **PLAIN, batch_size=61, optimizer="rowwise_adagrad"),
        "gathered": train_words(generated, max_steps=27, log_every=9),
        "summed": train_words(generated, max_steps=9, table_exchange="all_to_all"),
        "bags": train_words(bags_data, **BAGS),
        "dcn": train_words(generated, **DCN),
        "dense": train_words(small["dense"], batch_size=51, epochs=2),
        "unsplit": train_words(small["unsplit"], batch_size=51, epochs=2),
        "minutes": train_words(generated, checkpoint_minutes=1e-6, max_steps=20, early_stopping=1, eval_every=4,
                               plateau_factor=0.5, learning_rate=0.5),
        "again": ["train", "--resume", work / "nothing"],
        "diverged": train_words(generated, bits=32, learning_rate=1e6),
        "both": train_words(generated, simulate_ranks=2),
        "active": train_words(generated, activation_bits=8),
        "norm": train_words(generated, **DCN, batch_norm=True),
        "crowd": train_words(generated, batch_size=1),
    })  # fmt: skip


@pytest.fixture(scope="module")
def four(generated, bags_data, work):
    """Likewise four ranks."""
    return launched(work / "four", 4, {
        "default": train_words(generated, epochs=2, log_every=5, checkpoint_every=7),
        "plain": train_words(generated, **PLAIN, batch_size=107),  # 1,715 rows: the last batch has 3
        "bags": train_words(bags_data, **BAGS),
    })  # fmt: skip


@pytest.fixture
def launches(request):
    """What so many ranks ran; only these are started."""
    return lambda ranks: request.getfixturevalue("pair" if ranks == 2 else "four")


RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


# ---- real and simulated ranks


def test_two_ranks_give_the_bits_of_two_simulated_ones(generated, two, capsys, tmp_path):
    ended, run = two
    assert ended.code == 0
    same_run(run, simulated(capsys, generated, tmp_path / "run", 2, **LONG))


@pytest.mark.slow
def test_four_ranks_give_the_bits_of_four_simulated_ones(generated, four, capsys, tmp_path):
    run = simulated(capsys, generated, tmp_path / "run", 4, epochs=2, log_every=5, checkpoint_every=7)
    same_run(four[0]["default"][0], run)


OTHERS = {
    "odd": ODD, "shared": SHARED, "rows": ROWS, "redrawn": REDRAWN, "blocks": BLOCKS, "lsq": LSQ, "staged": STAGED,
    "counted": COUNTED, "adam": ADAM, "dense_adam": DENSE_ADAM, "int8": INT8, "dcn": DCN,
    "gathered": {"max_steps": 27, "log_every": 9}, "summed": {"max_steps": 9, "table_exchange": "all_to_all"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations_are_simulated_to_the_bit(generated, pair, capsys, tmp_path, name):
    same_run(pair[0][name][0], simulated(capsys, generated, tmp_path / "run", 2, **OTHERS[name]))


@pytest.mark.parametrize("name", ["bags", "dense", "unsplit"])
def test_other_data_is_simulated_to_the_bit(bags_data, small, pair, capsys, tmp_path, name):
    """Bags; no table at all; nothing to validate and test on."""
    data = small.get(name, bags_data)
    fields = BAGS if name == "bags" else {"batch_size": 51, "epochs": 2}
    same_run(pair[0][name][0], simulated(capsys, data, tmp_path / "run", 2, **fields))


@pytest.mark.slow
def test_four_ranks_on_bags_are_simulated_to_the_bit(bags_data, four, capsys, tmp_path):
    same_run(four[0]["bags"][0], simulated(capsys, bags_data, tmp_path / "run", 4, **BAGS))


@RANKS
def test_without_loss_ranks_give_the_model_of_one(generated, launches, capsys, tmp_path, ranks):
    """The same batches, the short one too. In FP32: the last bit of a sum can flip an INT4 code, by a whole step."""
    fields = PLAIN | ({"batch_size": 61, "optimizer": "rowwise_adagrad"} if ranks == 2 else {"batch_size": 107})
    run, _ = launches(ranks)[0]["plain"]
    here(capsys, "train", generated.path, "-o", tmp_path / "run", *flags(**fields))
    one, many = tensors(newest(tmp_path / "run")), tensors(newest(run))
    assert many.keys() - one.keys() == {"exchange.safetensors/counters", "exchange.safetensors/loss_sums"}
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for name in ("step", "epoch", "batch", "loss_rows", "train_rows", "finished"):
        assert state(newest(run))[name] == state(newest(tmp_path / "run"))[name]
    assert state(newest(run))["train_rows"] == 2 * generated.rows["train"]
    alone = summary(tmp_path / "run")
    for name in ("best", "test"):
        ours, theirs = (summary_of[name].get("metrics", summary_of[name]) for summary_of in (summary(run), alone))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert summary(run)["best"]["train_loss"] == pytest.approx(alone["best"]["train_loss"], rel=1e-5)


def test_a_world_of_one_rank_is_one_machine(generated, tmp_path, monkeypatch):
    train(generated, tmp_path / "alone", tiny(max_steps=9))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "exchange" not in train(generated, tmp_path / "torchrun", tiny(max_steps=9))
    same_tensors(tmp_path / "alone", tmp_path / "torchrun")


# ---- what ranks share, and who writes


@RANKS
def test_all_ranks_hold_the_same_weights_at_every_save(launches, ranks):
    for name, (_, probe) in launches(ranks)[0].items():
        assert len(probe) == ranks
        assert all(rank["weights"] == probe[0]["weights"] for rank in probe), name
        assert probe[0]["refused"] or len(probe[0]["weights"]) > 1


@pytest.mark.slow
def test_the_first_weights_depend_neither_on_the_rank_nor_on_the_number_of_ranks(pair, four):
    start = {commands["plain"][1][rank]["weights"]["0"] for commands, rank in ((pair[0], 1), (four[0], 3))}
    assert len(start) == 1


@pytest.mark.slow
def test_rank_0_alone_writes_and_prints(two, four):
    ended, run = two
    assert json.loads(ended.out) == summary(run)
    assert ended.err == ""  # --json
    for place in ("epoch 1, step 27", "epoch 2, step 54"):  # of the run with the default configuration
        assert four[1].err.count(f"{place}: training loss") == 1
    assert [line["step"] for line in lines(run, "train")] == list(range(5, 136, 5))
    evaluated = [line["step"] for line in lines(run, "evaluation")]
    assert evaluated == sorted({*range(27, 136, 27), *range(31, 136, 31)})
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "summary.json",
    }
    no_traceback_of_ours(ended)


@RANKS
def test_metrics_of_shared_evaluation_are_exactly_those_of_one_rank(generated, bags_data, two, launches, ranks):
    """142 rows in batches of 50: two and one of three, or one rank with none."""
    runs = {
        generated: two[1] if ranks == 2 else launches(4)[0]["default"][0],
        bags_data: launches(ranks)[0]["bags"][0],
    }
    for data, run in runs.items():
        model, _ = Run.open(run).load_model("best")
        assert evaluate(model, data, "validation", 50) == summary(run)["best"]["metrics"]
        assert evaluate(model, data, "test", 50) == summary(run)["test"]


def test_what_ranks_cannot_run_is_refused_by_all_with_one_sentence(pair):
    for name, sentence in {
        "again": f"rank 0: {pair[0]['again'][0]} does not exist",
        "diverged": "training diverged: the loss is",
        "both": "simulate_ranks is 2, but 2 real ranks were started",
        "active": "activation_bits is 8",
        "norm": "batch_norm is true",
        "crowd": "2 ranks share a batch of 1 samples (batch_size)",
    }.items():
        run, probe = pair[0][name]
        assert probe[0]["refused"].startswith(sentence)
        assert {rank["refused"] for rank in probe} == {probe[0]["refused"]}
        assert run.exists() == (name == "diverged")


def test_checkpoints_by_the_clock_and_early_stopping(generated, pair, capsys, tmp_path):
    """The clock is rank 0's; the others save with it, and all stop at the same evaluation."""
    run, probe = pair[0]["minutes"]
    fields = {"max_steps": 20, "early_stopping": 1, "eval_every": 4, "plateau_factor": 0.5, "learning_rate": 0.5}
    simulated(capsys, generated, tmp_path / "run", 2, checkpoint_minutes=0, **fields)
    same_run(run, tmp_path / "run")
    assert len(probe[1]["weights"]) > len(lines(run, "evaluation")) + 1  # the clock saved besides


# ---- bytes


@pytest.mark.parametrize(("name", "ranks", "steps"), [
    ("gathered", 2, 27), ("summed", 2, 9), pytest.param("default", 4, 54, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_payload_and_the_bytes_sent_follow_from_the_rows_of_the_data(generated, launches, name, ranks, steps):
    """Counted at the collectives, and reported; in all-gather a rank sends each other one its message and 8 bytes."""
    run, probe = launches(ranks)[0][name]
    parts, sent = expected(generated, ranks, steps, owners_sum=name == "summed")
    scales, values, dense = dense_bytes(Run.open(run).load_model("last")[0], ranks)
    for rank in range(ranks):
        counted = np.array(probe[rank]["sent"]).reshape(steps, -1).sum(1)
        assert counted.tolist() == (sent[rank] + dense[rank]).tolist(), f"rank {rank}"
    for line in [*lines(run, "train"), summary(run) | {"step": steps}]:
        report, until_now = line["exchange"], line.get("step")
        assert list(report) == ["ranks", "payload_bytes", "payload_parts", "sent_bytes", "waited_ms"]
        figures = [*parts[0, :until_now].mean(0), scales, values]
        assert list(report["payload_parts"]) == PARTS
        assert list(report["payload_parts"].values()) == pytest.approx(figures, abs=0.051)
        assert report["payload_bytes"] == pytest.approx(sum(figures), abs=0.051)
        assert report["sent_bytes"] == pytest.approx(sent[0, :until_now].mean() + dense[0], abs=0.051)
        assert report["waited_ms"] > 0
    assert len(lines(run, "train")) >= (name != "summed")
