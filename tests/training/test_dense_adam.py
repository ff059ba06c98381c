"""`DenseAdam` against a dense Adam in float64, and what it leaves for later: reading, saving, ranks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tensors, tiny
from dqrm.config import Config, ExchangeConfig, OptimizerConfig
from dqrm.data.batches import Batch
from dqrm.export.config import ExportConfig
from dqrm.export.pipeline import export_run
from dqrm.models.dlrm import DLRM
from dqrm.quant.embedding import QuantEmbeddingBag
from dqrm.serving.loaded import load
from dqrm.training.evaluation import evaluate
from dqrm.training.launch import train
from dqrm.training.optimizers import DenseAdam, SparseAdam, build_optimizers, dense_adam
from dqrm.training.run import Run
from dqrm.training.step import TrainStep
from quant.test_active_rows import Recorder

LR, L2 = 1e-3, 1e-5


def sparse(rows, values, shape):
    return torch.sparse_coo_tensor(torch.as_tensor(rows)[None], values, shape, check_invariants=True)


def batches(steps, rows, dim, size=1e-4, seed=0):
    """Rows by Zipf's law, so that gaps are of all lengths, and gradients of the size of a mean over 1,000 samples."""
    random, weights = np.random.default_rng(seed), 1 / np.arange(1, rows + 1) ** 1.2
    for _ in range(steps):
        chosen = random.choice(rows, 5, p=weights / weights.sum())
        values = random.standard_normal((5, dim)).astype(np.float32) * np.float32(size)
        yield torch.from_numpy(chosen), torch.from_numpy(values)


class Both:
    """`DenseAdam` beside `torch.optim.Adam` on a dense table in float64."""

    def __init__(self, rows=200, dim=3, lr=LR, l2=L2, dtype=torch.float32, **options):
        start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1)) * 0.05
        self.weight, self.exact = nn.Parameter(start.to(dtype)), nn.Parameter(start.to(dtype).double())
        self.ours = DenseAdam([self.weight], lr, l2=l2, **options)
        self.theirs = torch.optim.Adam([self.exact], lr, weight_decay=l2)

    def step(self, rows, values, rate=None):
        """Returns how far the rows are off that a forward would look up now."""
        self.ours.catch_up(rows)
        off = self.off(rows)
        for optimizer in (self.ours, self.theirs):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] if rate is None else rate
        self.weight.grad = sparse(rows, values.to(self.weight.dtype), self.weight.shape)
        self.exact.grad = torch.zeros_like(self.exact).index_add_(0, rows, values.double())
        self.ours.step()
        self.theirs.step()
        return off

    def off(self, rows=slice(None)):
        return max((self.weight.detach().double() - self.exact.detach())[rows].abs().flatten().tolist(), default=0.0)


@pytest.mark.parametrize(("lr", "l2", "size"), [(1e-3, 1e-5, 1e-4), (1e-2, 1e-6, 1e-3), (1e-3, 0.0, 1e-4),
                                                (1e-3, 1e-4, 1e-4)])  # fmt: skip
def test_it_is_a_dense_adam(path, lr, l2, size):
    """Weights are about 0.05 and move by about that: 2e-4 is 0.4 % of it, and far less than a step of INT4."""
    both = Both(lr=lr, l2=l2)
    off = [both.step(*batch) for batch in batches(1500 if path == "native" else 150, 200, 3, size)]
    assert max(off) < 2e-4
    assert np.mean(off) < 2e-5
    moved = (both.exact.detach() - torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) * 0.05).abs()
    assert moved.median() > 1e-3 or not l2
    both.ours.catch_up_all()
    assert both.off() < 2e-4


def test_short_gaps_are_exact_to_float32(path):
    both = Both(rows=12)
    for step in range(300):
        rows = torch.tensor([step % 12, (7 * step) % 12])  # each row comes at least once in 12 steps
        both.step(rows, torch.full((2, 3), 1e-4 * (-1) ** step))
    both.ours.catch_up_all()
    assert both.off() < 2e-6


@pytest.mark.parametrize("entries", [1 << 16, 64])
def test_the_course_of_the_learning_rate_is_remembered(monkeypatch, entries):
    """Of a run that is longer than the memory, that of every 8th step: then a warm-up is a staircase, and so are the
    bias corrections of rows whose last gradient was before step 8."""
    monkeypatch.setattr(dense_adam, "_ENTRIES", entries)
    both = Both()
    for number, (rows, values) in enumerate(batches(500, 200, 3)):
        both.step(rows, values, LR * min(1.0, (number + 1) / 250))
    assert int(both.ours.state[both.weight]["stride"]) == (1 if entries > 500 else 8)
    both.ours.catch_up_all()
    assert both.off() < (2e-4 if entries > 500 else 2e-3)


def test_ids_that_are_not_seen_are_forgotten():
    """The effect that lazy L2 does not have: a row that had one gradient, after 3,000 steps of others."""
    left = {}
    for name, make in (("dense", DenseAdam), ("lazy", SparseAdam)):
        weight = nn.Parameter(torch.full((4, 2), 0.05))
        optimizer = make([weight], LR, l2=L2)
        for step in range(3001):
            weight.grad = sparse([min(step, 1)], torch.full((1, 2), 1e-4), weight.shape)
            optimizer.step()
        optimizer.catch_up_all()
        left[name] = weight.detach()
    assert left["dense"][[0, 2, 3]].abs().max() < 1e-4
    assert left["lazy"][0].abs().min() > 0.04
    torch.testing.assert_close(left["lazy"][2:], torch.full((2, 2), 0.05))


def test_a_row_at_rest_is_0_and_stays_there(path):
    both = Both(rows=3)
    both.step(torch.tensor([0]), torch.full((1, 3), 1e-4))
    both.ours.state[both.weight]["count"] += 30_000  # steps that none of the rows had a part in
    for name, value in (("alpha", LR), ("root", 1.0)):
        both.ours.state[both.weight][name][1:] = value
    both.ours.catch_up_all()
    assert torch.equal(both.weight.detach(), torch.zeros(3, 3))
    assert not both.ours.state[both.weight]["exp_avg"].any()


@pytest.mark.parametrize("lookups", [0, 1])
def test_one_row_and_empty_batches(path, lookups):
    both = Both(rows=1, dim=1)
    for _ in range(40):
        both.step(torch.zeros(lookups, dtype=torch.int64), torch.full((lookups, 1), 1e-4))
    both.ours.catch_up_all()
    assert both.off() < 2e-5
    assert int(both.ours.state[both.weight]["count"]) == 40


def test_where_adam_itself_is_unstable_the_weights_stay_small(path):
    """lr * l2 / eps = 1,000: a dense Adam swings about 0 by up to its learning rate, in float64 as in float32."""
    both = Both(lr=1e-2, l2=1e-3)
    for batch in batches(300, 200, 3):
        both.step(*batch)
    both.ours.state[both.weight]["count"] += 5000
    for name, value in (("alpha", 1e-2), ("root", 1.0)):
        both.ours.state[both.weight][name][300:] = value
    both.ours.catch_up_all()
    assert both.weight.detach().abs().max() < 2e-2


def test_bf16_rows_are_caught_up_on_average():
    both = Both(rows=2000, dim=8, dtype=torch.bfloat16)
    rows = torch.arange(2000)
    both.step(rows, torch.full((2000, 8), 1e-4))
    for _ in range(20):
        both.step(rows[:1], torch.full((1, 8), 1e-4))
    both.ours.catch_up_all()
    difference = (both.weight.detach().double() - both.exact.detach())[1:]
    assert difference.mean().abs() < 2e-5  # the mean moved by 0.02
    assert both.weight.dtype == torch.bfloat16


def test_scales_follow_rows_that_are_caught_up():
    """Momentum goes on while a row is not looked up: by then its table's scale must hold it."""
    tables = QuantEmbeddingBag(5, 2, mode="sum", sparse=True, scale_refresh="running_max")
    nn.init.constant_(tables.weight, 0.05)
    tables.only_looked_up_rows_change()
    optimizer = DenseAdam([tables.weight], 0.1)
    optimizer.tables = tables
    offsets = torch.zeros(1, dtype=torch.int64)
    for row in (0, *[1] * 8):
        ids = torch.tensor([row])
        optimizer.catch_up(ids)
        tables.weight.grad = None
        (-tables(ids, offsets).sum()).backward()
        optimizer.step()
    before = float(tables.weight.detach()[0].max())
    optimizer.catch_up_all()
    after = float(tables.weight.detach().abs().max())
    assert after > 2 * before
    assert float(tables.scale) == pytest.approx(after / 7)


def test_new_rows_begin_at_the_step_of_their_drawing():
    both = Both(rows=4)
    for batch in batches(100, 4, 3):
        both.step(*batch)
    both.ours.catch_up_all()
    both.ours.reset_rows(slice(1, 3))
    state = both.ours.state[both.weight]
    assert state["last"].tolist() == [100] * 4
    assert not state["exp_avg"][1:3].any()
    assert not state["exp_avg_sq"][1:3].any()
    assert state["exp_avg_sq"][3].all()
    assert state["alpha"][:100].all()


# ---- in a training step and a run


def make(rows, ranks=0, **optimizer):
    config = tiny(optimizer="dense_adam", table_l2=1e-3)
    config = Config(config.model, config.quantization, replace(config.optimizer, **optimizer), config.training,
                    ExchangeConfig(ranks))  # fmt: skip
    model = DLRM(
        13,
        [rows, 7],
        config=config.model,
        qat=replace(config.quantization, scale_refresh="running_max", scale_period=None),
    )
    return TrainStep(model.train(), config)


@pytest.mark.parametrize("ranks", [0, 2])
def test_no_operator_of_a_step_touches_the_whole_table(ranks):
    """Catch-up included: each id comes back after 8 steps. The course of the learning rate has 65,536 entries."""
    produced = []
    for rows in (200_000, 1_000_000):
        step = make(rows, ranks, clip_norm=0.1)

        def batch(number):
            random = torch.Generator().manual_seed(number % 8)
            ids = torch.randint(0, 7, (64, 2), generator=random) * torch.tensor([101, 1])
            return Batch(torch.randn(64, 13, generator=random), ids.int(), (), torch.ones(64))

        for number in range(9):
            step(batch(number), 0.01, 64, number)
        with Recorder(rows) as recorder:
            for number in range(9, 17):
                step(batch(number), 0.01, 64, number)
        assert recorder.offenders == []
        produced.append(recorder.produced)
    assert produced[0] == produced[1] > 0


class Stopped(Exception):
    pass


@pytest.fixture
def cut(generated, tmp_path):
    """A run whose newest checkpoint is of step 16, between evaluations, and its best one of step 11."""

    def progress(_, done, total):
        if done == 17 * 64 and total == generated.rows["train"]:
            raise Stopped

    config = tiny(optimizer="dense_adam", table_l2=1e-3, checkpoint_every=4, eval_every=11)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.01))
    with pytest.raises(Stopped):
        train(generated, tmp_path / "run", config, progress=progress)
    return tmp_path / "run"


@pytest.mark.parametrize("mapped", [False, True])
def test_reading_a_checkpoint_applies_what_is_pending(generated, cut, mapped):
    saved = tensors(cut / "checkpoints" / "step-000000016")
    stale = saved["optimizer.safetensors/0/0/last"] < 16
    assert stale.any()
    model, where = Run.open(cut).load_model("last", mapped=mapped)
    # Only a run that goes on takes over the random state.
    assert not torch.equal(torch.get_rng_state(), saved["optimizer.safetensors/random/cpu"])
    assert where["step"] == 16
    weight = nn.Parameter(saved["weights.safetensors/tables.weight"].clone())
    optimizer = DenseAdam([weight], 0.01, l2=1e-3)
    loaded = copy.deepcopy(optimizer.state_dict())
    prefix = "optimizer.safetensors/0/0/"
    loaded["state"][0] = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    optimizer.load_state_dict(loaded)
    optimizer.catch_up_all()
    assert torch.equal(model.tables.weight, weight)
    changed = (model.tables.weight != saved["weights.safetensors/tables.weight"]).any(1)
    assert torch.equal(changed, changed & stale)
    assert changed.any()


def test_the_export_of_a_pending_checkpoint_is_what_is_evaluated(generated, cut, tmp_path):
    export_run(cut, tmp_path / "last.dqrm", ExportConfig(checkpoint="last"))
    artifact, (model, _) = load(tmp_path / "last.dqrm"), Run.open(cut).load_model("last")
    ours, theirs = (evaluate(each, generated, "test") for each in (model, artifact))
    assert theirs["log_loss"] == pytest.approx(ours["log_loss"], abs=1e-6)


def test_an_evaluated_checkpoint_has_nothing_pending(generated, cut):
    saved = tensors(cut / "checkpoints" / "step-000000011")
    assert (saved["optimizer.safetensors/0/0/last"] == 11).all()
    model, state = Run.open(cut).load_model("best", mapped=True)
    assert torch.equal(model.tables.weight, saved["weights.safetensors/tables.weight"])
    assert evaluate(model, generated, "validation") == state["best"]["metrics"]


# ---- what cannot be


@pytest.mark.parametrize(("options", "message"), [
    ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0, expected at least 0 and below 1"),
    ({"eps": 0.0}, "eps is 0.0, expected above 0"),
    ({"l2": -1.0}, "l2 is -1.0, expected 0 or more"),
])  # fmt: skip
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenseAdam([nn.Parameter(torch.ones(2, 2))], 0.1, **options)
    with pytest.raises(ValueError, match=r"adam_eps is 0\.0, expected above 0 with dense_adam"):
        OptimizerConfig("dense_adam", adam_eps=0.0)


def test_fields_reach_tables_and_mlp():
    config = OptimizerConfig("dense_adam", 0.02, adam_beta1=0.5, adam_beta2=0.75, adam_eps=1e-3, table_l2=0.1)
    tables, others = build_optimizers([nn.Parameter(torch.ones(3, 2))], [nn.Parameter(torch.ones(2))], config)
    group, mlp = tables.param_groups[0], others.param_groups[0]
    assert (group["lr"], group["beta1"], group["beta2"], group["eps"], group["l2"]) == (0.02, 0.5, 0.75, 1e-3, 0.1)
    assert (mlp["lr"], mlp["betas"], mlp["eps"]) == (0.02, (0.5, 0.75), 1e-3)
