"""`dqrm train --tables sharded`: ranks against one process, resumed by others, read by one machine."""

import importlib.metadata
import importlib.util
import shutil
import signal
import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dqrm
from cli_helpers import command
from conftest import tensors
from dqrm.config import PLACEMENTS, Config
from dqrm.models.base import draw_rows
from dqrm.training.tensor_files import Streamed, read_tensor, save_file
from launch_helpers import (
    flags,
    held_at,
    here,
    launched,
    newest,
    steps_saved,
    summary,
    torchrun,
    train_words,
    until,
)

THERE = importlib.util.find_spec("torchrec") is not None
RANKS = pytest.mark.skipif(not THERE, reason="the extra dqrm[torchrec] and TorchRec are not installed")
SLOW = [RANKS, pytest.mark.slow, pytest.mark.distributed]
EXACT = {"table_codec": "fp32", "mlp_codec": "fp32", "scale_period": None, "bits": 4}
STEPS = 12


# Quick: what needs no ranks.


def refused(data, folder, capsys):
    """The sentence, where nothing but it is left."""
    code, out, said = command(capsys, "train", str(data.path), "-o", str(folder / "run"), "--tables", "sharded")
    assert (code, out, len(said.strip().splitlines())) == (2, "", 1)
    assert not (folder / "run").exists()
    return said


def test_a_missing_package_is_refused_with_what_to_install(generated, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dqrm.torchrec")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(PLACEMENTS, "sharded", "dqrm.torchrec.placement.Sharded")

    def version(name):
        if name == "torch":
            return "2.13.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = refused(generated, tmp_path, capsys)
    assert said.startswith(
        "dqrm: dqrm.torchrec needs torchrec and FBGEMM, not installed here; with torch 2.13.0 install"
    )
    for name in [name for name in sys.modules if name.startswith("dqrm.torchrec")]:
        monkeypatch.delitem(sys.modules, name)  # what was imported with that version()


def test_fields_that_are_left_open_go_with_sharded_tables():
    config = Config.load(overrides={"tables": "sharded"})
    assert (config.quantization.table_granularity, config.quantization.small_table_bits) == ("row", None)
    assert (config.quantization.mlp_bits, config.exchange.table_codec_scale) == (8, "row")
    for bits in (32, "32"):  # of YAML or Python, of a flag
        plain = Config.load(overrides={"tables": "sharded", "bits": bits})
        assert plain.quantization.table_granularity == "table"
    assert Config.load().exchange.table_codec_scale == Config().exchange.table_codec_scale == "table"
    assert Config.from_dict(config.to_dict()) == config


def test_rows_are_drawn_alike_wherever_a_shard_begins():
    whole = torch.empty(50, 3)
    draw_rows(whole, [7, 0, 2], 0, 0.5)
    for first, last in ((0, 20), (20, 33), (33, 50)):  # an even and an odd number of values before them
        part = torch.empty(last - first, 3)
        draw_rows(part, [7, 0, 2], first, 0.5)
        assert torch.equal(part, whole[first:last])
    assert float(whole.abs().max()) <= 0.25 < 1.1 * float(whole.abs().max())


def test_a_streamed_tensor_is_written_as_any_other_and_read_by_the_row(tmp_path):
    values = torch.randn(10, 4)
    streamed = Streamed((10, 4), torch.float32, lambda: iter(values.split(3)))
    files = {}
    save_file({"rows": streamed, "b": torch.arange(3)}, tmp_path / "a.safetensors", files)
    save_file({"rows": values, "b": torch.arange(3)}, tmp_path / "b.safetensors", files)
    assert files["a.safetensors"] == files["b.safetensors"]
    part = torch.empty(2, 4)
    read_tensor(tmp_path / "a.safetensors", "rows", part, skip=5 * 16)
    assert torch.equal(part, values[5:7])


def test_a_streamed_tensor_is_in_memory_by_the_piece(tmp_path):
    made, most = [], 0

    def pieces():
        nonlocal most
        for _ in range(20):
            memory = np.zeros(8, np.float32)
            made.append(weakref.ref(memory))
            most = max(most, sum(each() is not None for each in made))
            yield torch.from_numpy(memory)

    save_file({"rows": Streamed((160,), torch.float32, pieces)}, tmp_path / "a.safetensors", {})
    assert 1 <= most <= 4  # one is written, one is hashed


# Ranks.

DCN = {"bottom_mlp": None, "top_mlp": None, "deep_mlp": "8-4", "cross_layers": 1}
CASES = {
    "sgd": {},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.02, "table_learning_rate": 0.03},
    "rowwise_adagrad": {"optimizer": "rowwise_adagrad", "learning_rate": 0.02, "model": "dcn", **DCN},
    "adam": {"optimizer": "adam", "learning_rate": 0.005},
    "rowwise_adam": {"optimizer": "rowwise_adam", "learning_rate": 0.005, "model": "dcn", **DCN},
    "redrawn": {"callbacks": "redraw_tables:min_rows=1000,ema:decay=0.9", "epochs": 2, "batch_size": 500},
    "fp32": {"bits": 32},
}
STARTS = {name: CASES[name] for name in ("rowwise_adam", "adagrad")}
REFUSED = {
    "optimizer is 'dense_adam', but tables is 'sharded'; expected one of": {"optimizer": "dense_adam"},
    "table_dtype is 'int8', but tables is 'sharded'; expected 'fp32'": {"table_dtype": "int8"},
    "table_granularity is 'table', but tables": {"table_granularity": "table"},
    "scale_refresh is 'periodic', but tables": {"scale_period": 3},
    "clip_norm is 1.0, but tables": {"clip_norm": 1},
    "table_l2 is 0.1, but tables": {"table_l2": 0.1},
    "embedding_dim is 6, but tables": {"embedding_dim": 6, "bottom_mlp": "8-6"},
    "table_codec is 'bf16', but tables": {"table_codec": "bf16"},
    "table_codec_scale is 'table', but tables": {"table_codec": "int8", "table_codec_scale": "table"},
    "tables is 'sharded', but the callback RecordHistograms": {"record_histograms": "largest"},
    "tables is 'sharded', but the callback StageBits": {"callbacks": "stage_bits:tables=32", "epochs": 2},
}


def words(data, **fields):
    options = {"max_steps": STEPS, **EXACT, **fields}
    return train_words(data, tables="sharded", **options)


def alone(data, run, capsys, **fields):
    """The same on one process."""
    options = {"max_steps": STEPS, **EXACT, **fields}
    granularity = "table" if options["bits"] == 32 else "row"
    here(capsys, "train", data.path, "-o", run, *flags(table_granularity=granularity, **options))
    return run


def assert_close(one, two):
    """The same weights, optimizer state and callbacks but for the order of sums; `one` may have been trained alone."""
    first, second = tensors(newest(one)), tensors(newest(two))
    assert set(first) == {name for name in second if name in first or not name.startswith("exchange")}
    for name in (name for name in first if not name.startswith("exchange")):
        if first[name].is_floating_point():
            message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=2e-5, msg=message)
        elif name.endswith("row_steps"):
            assert int(first[name].max()) > 1
            assert torch.equal(first[name], second[name])


@pytest.fixture(scope="module")
def pair(generated, tmp_path_factory):
    """Two ranks: runs by case, what is refused, and one with the default codecs."""
    folder = tmp_path_factory.mktemp("pair")
    commands = {name: words(generated, **fields) for name, fields in CASES.items()}
    commands |= {sentence: words(generated, **fields) for sentence, fields in REFUSED.items()}
    commands["codecs"] = words(generated, table_codec=None, mlp_codec=None)
    return launched(folder, 2, commands)[0]


@pytest.fixture(scope="module")
def killed(generated, tmp_path_factory):
    """A run of two ranks of which rank 1 is killed after its checkpoint of step 5: (run folder, what rank 0 said)."""
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "run"
    line = [run if word is None else word for word in words(generated, checkpoint_every=5, **CASES["adam"])]
    with torchrun(folder / "log", 2, *line, program=[*held_at(5)]) as launch:
        until(lambda: steps_saved(run), launch)
        launch.signal(signal.SIGKILL, rank=1)
        (ended,) = launch.wait()
    assert ended.code
    return run, ended


@pytest.fixture(scope="module")
def three(generated, bags_data, pair, killed, tmp_path_factory):
    """Three ranks: the killed run resumed, a run from one of one machine, and multi-valued columns."""
    folder = tmp_path_factory.mktemp("three")
    resumed = shutil.copytree(killed[0], folder / "resumed")
    dqrm.export_run(pair["adam"][0], folder / "adam.dqrm")
    commands = {
        "resumed": ["train", "--resume", resumed],
        **{name: [*words(generated, **STARTS[name]), "--from", pair[name][0]] for name in STARTS},
        "artifact": [*words(generated, **CASES["adam"]), "--from", folder / "adam.dqrm"],
        # The last of its batches has one sample for three ranks; validation is one batch.
        "bags": words(bags_data, batch_size=80, eval_batch_size=1000, pooling="mean", max_steps=0),
    }
    return launched(folder, 3, commands)[0]


class TestRanks:
    pytestmark = SLOW

    def test_one_rank_is_refused(self, generated, tmp_path, capsys):
        wanted = "dqrm: tables is 'sharded', but there is one rank; start two or more with `torchrun"
        assert refused(generated, tmp_path, capsys).startswith(wanted)

    @pytest.mark.parametrize("case", CASES)
    def test_two_ranks_train_as_one_process(self, pair, generated, tmp_path, capsys, case):
        rows = generated.table_rows
        assert min(rows) < 1000 <= max(rows)  # tables of both kinds, row-wise and table-wise
        one = alone(generated, tmp_path / "one", capsys, **CASES[case])
        assert_close(one, pair[case][0])
        drawn = dqrm.Run.open(one).new_model().tables.weight
        trained = load_file(newest(one) / "weights.safetensors")["tables.weight"]
        assert float((trained - drawn).abs().max()) > 1e-3  # it changes them, so equality says something
        assert summary(pair[case][0])["stored_bytes"] == summary(one)["stored_bytes"]
        assert summary(pair[case][0])["table_bytes"] == summary(one)["table_bytes"]

    @pytest.mark.parametrize("case", ["codecs", "redrawn", "fp32"])
    def test_one_machine_reads_the_run_without_torchrec(self, pair, generated, tmp_path, monkeypatch, case):
        monkeypatch.setitem(sys.modules, "torchrec", None)  # an import of it would fail
        monkeypatch.setitem(sys.modules, "dqrm.torchrec", None)
        run = pair[case][0]
        said = summary(run)["test"]
        model, _ = dqrm.Run.open(run).load_model()
        assert dqrm.evaluate(model, generated, "test") == pytest.approx(said, abs=1e-6)
        dqrm.export_run(run, tmp_path / "a.dqrm")
        assert dqrm.evaluate(dqrm.load(tmp_path / "a.dqrm"), generated, "test") == pytest.approx(said, abs=1e-6)

    def test_codecs_change_the_gradients_and_little_else(self, pair):
        exact, encoded = (load_file(newest(pair[name][0]) / "weights.safetensors") for name in ("sgd", "codecs"))
        difference = float((exact["tables.weight"] - encoded["tables.weight"]).abs().max())
        assert 0 < difference < 0.01

    @pytest.mark.parametrize("sentence", REFUSED)
    def test_what_is_not_supported_is_refused_on_all_ranks_before_a_folder_is_made(self, pair, sentence):
        run, probe = pair[sentence]
        assert probe[0]["refused"] == probe[1]["refused"]
        assert probe[0]["refused"].removeprefix("rank 0: ").startswith(sentence)
        assert not run.exists()

    def test_the_other_rank_says_that_one_died(self, killed):
        run, ended = killed
        assert [line for line in ended.sentences if "rank 1 " in line], ended.err
        assert not list(run.glob("checkpoints/*.partial"))

    def test_a_killed_run_goes_on_with_another_number_of_ranks(self, three, killed, pair):
        assert steps_saved(killed[0])[-1] < STEPS == summary(three["resumed"][0])["steps"]
        assert_close(pair["adam"][0], three["resumed"][0])

    @pytest.mark.parametrize("case", STARTS)
    def test_a_run_is_the_start_of_a_sharded_one(self, three, pair, generated, tmp_path, capsys, case):
        fields = {"max_steps": STEPS, **EXACT, **STARTS[case]}
        start = ["--from", pair[case][0]]
        here(capsys, "train", generated.path, "-o", tmp_path / "one", *flags(table_granularity="row", **fields), *start)
        assert_close(tmp_path / "one", three[case][0])

    def test_an_artifact_is_the_start_of_a_sharded_run(self, three, pair, generated, tmp_path, capsys):
        dqrm.export_run(pair["adam"][0], tmp_path / "adam.dqrm")
        fields = {"max_steps": STEPS, **EXACT, **CASES["adam"], "table_granularity": "row"}
        start = ["--from", tmp_path / "adam.dqrm"]
        here(capsys, "train", generated.path, "-o", tmp_path / "one", *flags(**fields), *start)
        assert_close(tmp_path / "one", three["artifact"][0])

    def test_multi_valued_columns_are_pooled_after_the_exchange(self, three, bags_data, tmp_path, capsys):
        fields = {"batch_size": 80, "eval_batch_size": 1000, "pooling": "mean", "max_steps": 0}
        assert_close(alone(bags_data, tmp_path / "one", capsys, **fields), three["bags"][0])
