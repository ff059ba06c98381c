"""Weights of rows and groups of rows: from a column of the log to loss, metrics and the choice of a checkpoint."""

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from sklearn.metrics import log_loss, roc_auc_score

from conftest import tensors, tiny
from data_helpers import KAGGLE, content, criteo_lines, write
from dqrm.cli import cli
from dqrm.config import ExchangeConfig
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import Dataset
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.training.evaluation import evaluate, predict_logits
from dqrm.training.launch import train
from dqrm.training.metrics import click_metrics, group_auc
from dqrm.training.run import Run
from dqrm.training.step import TrainStep
from launch_helpers import flags, same_run, torchrun

PLAIN = PrepareConfig(categorical=("user", "ad"), dense=("x",), max_rows_per_table=5)
FULL = replace(PLAIN, weight="w", group="user")


def frame(rows=600, seed=0, **more):
    random = np.random.default_rng(seed)
    user, ad = random.integers(0, 12, rows), random.integers(0, 9, rows)
    click = (random.random(rows) < 0.2 + 0.05 * (user % 5) + 0.03 * ad).astype(int)
    weight = random.integers(0, 9, rows) / 4
    names = [None if number == 11 else f"u{number}" for number in user.tolist()]
    return pl.DataFrame({"label": click, "user": names, "ad": ad, "x": random.random(rows), "w": weight, **more})


def made(folder, config=FULL, log=None, name="data"):
    (frame() if log is None else log).write_parquet(folder / f"{name}.parquet")
    return prepare([folder / f"{name}.parquet"], folder / name, config)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("weights"))


def rows_of(dataset, split):
    part = dataset.split(split)
    arrays = (part.labels(), part.weights(), part.groups())
    return [None if array is None else np.asarray(array) for array in arrays]


def test_arrays_are_the_log_s_own(tmp_path):
    log = frame()
    data = made(tmp_path, replace(FULL, split="time", chunk_rows=100), log)
    found = [rows_of(data, name) for name in ("train", "validation", "test")]
    labels, weights, groups = (np.concatenate(parts) for parts in zip(*found))
    assert (weights.dtype, groups.dtype) == (np.float32, np.int32)
    assert labels.tolist() == log["label"].to_list()
    assert weights.tolist() == log["w"].to_list()
    # In order of first appearance, each user one number although the tables are capped, none where it is missing.
    order = {name: number for number, name in enumerate(log["user"].drop_nulls().unique(maintain_order=True))}
    first = {name: number for number, name in enumerate(log["user"].unique(maintain_order=True))}
    assert len(set(groups[groups >= 0].tolist())) == len(order) == 11
    named = {name: number for name, number in zip(log["user"], groups.tolist()) if name is not None}
    assert [named[name] for name in log["user"] if name is not None] == [g for g in groups.tolist() if g >= 0]
    assert sorted(named, key=named.get) == sorted(order, key=first.get)
    assert (groups[log["user"].is_null().to_numpy()] == -1).all()
    assert (Dataset(data.path).weight, Dataset(data.path).group) == ("w", "user")
    data.validate()


def test_data_without_them_is_what_it_was(tmp_path):
    plain, full = made(tmp_path, PLAIN, name="plain"), made(tmp_path, FULL, name="full")
    same = {name: data for name, data in content(full).items() if "weight" not in name and "group" not in name}
    assert content(plain) == same
    assert set(content(full)) - set(same) == {
        f"{split}/{name}" for split in ("train", "validation", "test") for name in ("weight.f32", "group.i32")
    }
    assert not {"weight", "group"} & {*plain.info["options"], *plain.info["schema"]}
    assert plain.split("train").weights() is None
    assert next(plain.split("train").batches(8)).weights is None


@pytest.mark.parametrize(
    ("value", "told"),
    [(-1.0, "-1.0"), (float("nan"), "nan"), (float("inf"), "inf"), (1e300, "1e+300"), (None, "nothing")],
)
def test_a_weight_that_is_none_is_refused_by_its_row(tmp_path, value, told):
    log = frame(20).with_columns(w=pl.Series([1.0] * 7 + [value] + [2.0] * 12))
    with pytest.raises(UserError, match=r"row 8: column w, the weight, holds .*, expected a finite number") as error:
        made(tmp_path, FULL, log)
    assert told in str(error.value)
    skipped = made(tmp_path, replace(FULL, on_error="skip"), log, "skipped")
    assert skipped.info["lines_skipped"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "label"}, "column label is the label and cannot be the weight too"),
        ({"group": "label"}, "column label is the label and cannot be the group too"),
        ({"group": "ad", "multi": ("ad",)}, "group is 'ad', a multi column"),
        ({"layout": "criteo-kaggle", "categorical": (), "dense": (), "weight": "w"}, "weight is for layout table"),
    ],
)
def test_columns_that_cannot_be_them(options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"categorical": ("ad",), **options})


@pytest.mark.parametrize(("factor", "told"), [(1, False), (40, True), (0.01, True)])
def test_a_mean_weight_far_from_1_is_told(tmp_path, factor, told):
    log = frame().with_columns(w=1.0 * factor + pl.col("w") * 0)
    log.write_parquet(tmp_path / "log.parquet")
    flags = ["--categorical=user,ad", "--weight=w", "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, ["prepare", str(tmp_path / "log.parquet"), *flags])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert (f"mean weight of the training rows is {factor:.3g}, which scales" in said) == told
    assert Dataset(tmp_path / "out").mean_weight == pytest.approx(factor)


def test_unknown_columns_and_weights_that_are_all_zero(tmp_path):
    for field in ("weight", "group"):
        with pytest.raises(UserError, match="no column 'wright' in"):
            made(tmp_path, replace(FULL, **{field: "wright"}))
    with pytest.raises(UserError, match=r"weight column t of .* is of type Date"):
        made(tmp_path, replace(FULL, weight="t"), frame().with_columns(t=pl.date(2020, 1, 1)))
    with pytest.raises(UserError, match="weights in column w of all training rows are 0"):
        made(tmp_path, FULL, frame().with_columns(w=0.0))
    assert not (tmp_path / "data").exists()


def test_a_weight_may_be_a_dense_column_and_a_group_any(tmp_path):
    data = made(tmp_path, replace(FULL, weight="x", group="ad"))
    _, weights, _ = rows_of(data, "train")
    transformed = np.log1p(weights.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_max_ulp(np.asarray(data.split("train").arrays["dense.f32"])[:, 0], transformed, 4)
    log = write(tmp_path / "log.txt", criteo_lines(70))
    criteo = prepare([log], tmp_path / "criteo", replace(KAGGLE, group="C3"))
    part = criteo.split("train")
    ids = np.asarray(part.arrays["ids.i32"])[:, 2]
    groups = np.asarray(part.groups())
    keys = pl.read_parquet(criteo.vocabulary_path("C3"))
    missing = keys.filter(pl.col("key") == 0)["row"].to_list()
    assert len(missing) == 1
    assert set(groups[ids == missing[0]].tolist()) == {-1}
    of = {}
    for row, group in zip(ids.tolist(), groups.tolist()):
        assert of.setdefault(row, group) == group
    assert len(set(of.values())) == len(of)


@pytest.mark.parametrize("shuffle", ["none", "block", "global"])
def test_batches_and_shares_carry_the_weights_of_their_rows(data, shuffle):
    part = data.split("train")
    wanted = dict(zip(map(tuple, np.asarray(part.arrays["dense.f32"]).tolist()), np.asarray(part.weights()).tolist()))
    whole = list(part.batches(37, shuffle=shuffle))
    for batch in whole:
        assert [wanted[tuple(row)] for row in batch.dense.tolist()] == batch.weights.tolist()
    for rank in range(3):
        for batch, share in zip(whole, part.batches(37, shuffle=shuffle, share=(rank, 3)), strict=True):
            assert torch.equal(share.weights, batch.share(rank, 3).weights)
            assert torch.equal(batch.to("cpu").weights, batch.weights)


def test_the_loss_is_the_mean_of_weight_times_loss(data):
    model = Run.plan(data.path.parent / "none", tiny(bits=32), data).new_model()
    batch = next(data.split("train").batches(50))
    step = TrainStep(model, tiny(bits=32))
    logits = model(batch.dense, batch.ids, batch.bags)
    each = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    torch.testing.assert_close(step.forward(batch), (each * batch.weights).mean())
    ones = replace(batch, weights=torch.ones(50))
    assert torch.equal(step.forward(ones), step.forward(replace(batch, weights=None)))


def test_equal_weights_train_as_none_and_double_ones_as_a_doubled_loss(tmp_path):
    plain = made(tmp_path, PLAIN, name="plain")
    ones = made(tmp_path, FULL, frame().with_columns(w=1.0), "ones")
    for name, data in (("a", plain), ("b", ones)):
        train(data, tmp_path / name, tiny(max_steps=6))
    a, b = (tensors(max((tmp_path / name / "checkpoints").iterdir())) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = (Run.open(tmp_path / name).summary["test"] for name in "ab")
    assert {name: second[name] for name in first} == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_simulated_ranks_weigh_as_one_process_does(data, tmp_path, ranks):
    exact = ExchangeConfig(simulate_ranks=ranks, table_codec="fp32", mlp_codec="fp32")
    one, several = tiny(bits=32, max_steps=5, batch_size=50), tiny(bits=32, max_steps=5, batch_size=50)
    train(data, tmp_path / "one", one)
    train(data, tmp_path / "several", replace(several, exchange=exact))
    a, b = (tensors(max((tmp_path / name / "checkpoints").iterdir())) for name in ("one", "several"))
    for name in a:
        if name.startswith("model"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_weighted_metrics_are_those_of_repeated_rows():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 400), random.standard_normal(400).astype(np.float32).round(1)
    groups, times = random.integers(-1, 20, 400), random.integers(0, 4, 400)
    found = click_metrics(labels, logits, times.astype(np.float32), groups)
    repeated = click_metrics(*(np.repeat(array, times) for array in (labels, logits)), None, np.repeat(groups, times))
    assert found.pop("rows") == 400
    assert repeated.pop("rows") == times.sum()
    assert found == pytest.approx(repeated, rel=1e-12)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=times), rel=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(labels, probabilities, sample_weight=times), rel=1e-12)


def test_rows_without_weight_decide_nothing():
    labels, logits = np.array([1, 0, 0, 0]), np.array([5, 1, 2, 3], np.float32)
    found = click_metrics(labels, logits, np.array([0, 1, 1, 1], np.float32), np.zeros(4, np.int32))
    assert found["auc"] is None
    assert found["calibration"] is None
    assert found["gauc"] is None
    nothing = click_metrics(labels, logits, np.zeros(4, np.float32))
    assert nothing == {"rows": 4} | dict.fromkeys(("auc", "log_loss", "accuracy", "ne", "calibration"))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("digits", [0, 1, 6])
def test_gauc_against_a_loop_over_the_groups(weighted, digits):
    random = np.random.default_rng(digits)
    count = 1000
    labels, logits = random.integers(0, 2, count), random.standard_normal(count).astype(np.float32).round(digits)
    groups = random.geometric(0.05, count).astype(np.int32) - 2  # -1: in none; many have one row or one label
    weights = random.random(count).astype(np.float32) + 0.1 if weighted else np.ones(count, np.float32)
    total = covered = 0.0
    for group in range(groups.max() + 1):
        rows = groups == group
        if len(set(labels[rows].tolist())) == 2:
            impressions = weights[rows].sum(dtype=np.float64)
            total += impressions * roc_auc_score(labels[rows], logits[rows], sample_weight=weights[rows])
            covered += impressions
    assert 0 < covered < weights.sum(dtype=np.float64)
    gauc, share = group_auc(labels, logits, groups, weights if weighted else None)
    assert gauc == pytest.approx(total / covered, rel=1e-12)
    assert share == pytest.approx(covered / weights.sum(dtype=np.float64), rel=1e-12)


def test_gauc_at_its_edges():
    one, none = np.array([1]), np.empty(0)
    assert group_auc(none, none, none) == (None, None)
    assert group_auc(one, one, np.array([-1])) == (None, 0.0)
    assert group_auc(one, one, np.array([3])) == (None, 0.0)
    assert group_auc(np.array([1, 0]), np.array([0.0, -0.0]), np.array([7, 7])) == (0.5, 1.0)


def test_weights_of_very_different_sizes_swallow_nothing():
    """A first group of overwhelming weight leaves the AUC of the others as it is, and a click that of the negatives."""
    random = np.random.default_rng(0)
    labels, logits, groups = np.arange(60) % 3 % 2, random.standard_normal(60), np.repeat(np.arange(6), 10)
    weights = np.where(groups == 0, 1e20, np.where(labels == 1, 1e30, 1e-3)) * (1 + random.random(60))
    total = covered = 0.0
    for group in range(6):
        rows = groups == group
        pairs = [
            (weights[i] * weights[j], (logits[i] > logits[j]) + 0.5 * (logits[i] == logits[j]))
            for i in np.flatnonzero(rows & (labels == 1))
            for j in np.flatnonzero(rows & (labels == 0))
        ]
        auc = sum(weight * won for weight, won in pairs) / sum(weight for weight, _ in pairs)
        total, covered = total + weights[rows].sum() * auc, covered + weights[rows].sum()
    assert group_auc(labels, logits, groups, weights)[0] == pytest.approx(total / covered, rel=1e-9)
    found = click_metrics(np.array([1, 0]), np.zeros(2, np.float32), np.array([1e30, 1], np.float32))
    weight = float(np.float32(1e30))
    entropy = -(math.log(weight / (weight + 1)) + math.log(1 / (weight + 1)) / (weight + 1))
    assert found["ne"] == pytest.approx(math.log(2) / entropy, rel=1e-9)


def test_eval_shows_gauc_and_it_may_choose(data, tmp_path):
    summary = train(data, tmp_path / "run", tiny(epochs=3, select_by="gauc"))
    assert summary["selection"] == "best validation gauc"
    run = Run.open(tmp_path / "run")
    model, state = run.load_model()
    found = evaluate(model, data, "validation")
    labels, weights, groups = rows_of(data, "validation")
    logits = predict_logits(model, data, "validation", 8192)
    some = weights > 0
    own = group_auc(labels[some], logits[some], groups[some], weights[some])
    assert (found["gauc"], found["gauc_coverage"]) == own
    assert state["best"]["metrics"]["gauc"] == found["gauc"]
    lines = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "evaluation" in line]
    assert found["gauc"] == max(pl.read_ndjson("\n".join(lines).encode())["gauc"])


def test_gauc_is_refused_where_there_is_no_group(tmp_path):
    plain = made(tmp_path, PLAIN, name="plain")
    with pytest.raises(
        UserError, match=r"select_by is gauc, but .* has no group column; prepare the data with --group"
    ):
        train(plain, tmp_path / "run", tiny(select_by="gauc"))
    alone = made(tmp_path, replace(FULL, group="row"), frame().with_row_index("row"), "alone")
    with pytest.raises(UserError, match="no row of the validation split has rows of both labels"):
        train(alone, tmp_path / "run", tiny(select_by="gauc"))
    assert not (tmp_path / "run").exists()


def test_two_ranks_give_the_bits_of_two_simulated_ones(data, tmp_path):
    options = {"epochs": 2, "eval_every": 4, "select_by": "gauc"}
    real, simulated = tmp_path / "real", tmp_path / "simulated"
    with torchrun(tmp_path / "launch", 2, "train", data.path, "-o", real, *flags(**options)) as launch:
        (ended,) = launch.wait()
    assert ended.code == 0, ended.err
    result = CliRunner().invoke(
        cli, ["train", str(data.path), "-o", str(simulated), *flags(**options, simulate_ranks=2)]
    )
    assert result.exit_code == 0, result.output
    same_run(real, simulated)


def test_on_the_command_line_and_of_exported_files(tmp_path):
    frame().write_csv(tmp_path / "log.csv")

    def run(*words):
        result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    data, model = tmp_path / "data", tmp_path / "run"
    shown = run(
        "prepare", tmp_path / "log.csv", "-o", data, "--categorical", "user,ad", "--weight", "w", "--group", "user"
    )
    assert "Weight of each row: column w" in shown
    assert "Group of each row: column user" in shown
    assert "gauc" in run("train", data, "-o", model, *flags(max_steps=9, select_by="gauc"))
    assert "gauc" in run("info", model)
    wanted = json.loads(run("eval", model, data, "--json"))
    assert 0 < wanted["gauc_coverage"] <= 1
    assert "gauc_coverage" in run("eval", model, data)
    pytest.importorskip("onnxruntime")
    for suffix in (".dqrm", ".onnx"):
        file = tmp_path / f"model{suffix}"
        run("export", model, "-o", file)
        found = json.loads(run("eval", file, data, "--json"))
        assert found == pytest.approx(wanted, abs=0.01)  # another order of sums may swap two rows
        assert found["gauc_coverage"] == wanted["gauc_coverage"]
    assert "gauc" in run("info", tmp_path / "model.dqrm")
