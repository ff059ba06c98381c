"""Lazy and row-wise Adam against a float64 reference written row by row."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tiny
from dqrm.config import ExchangeConfig, OptimizerConfig
from dqrm.data.batches import Batch
from dqrm.models.dlrm import DLRM
from dqrm.training.optimizers import SparseAdam, build_optimizers
from dqrm.training.step import TrainStep

BETAS = (0.8, 0.95)


def reference(weight, steps, lr, l2, eps, rowwise):
    """The docstring of `SparseAdam`, in float64."""
    w = weight.astype(np.float64).copy()
    m, v, t = np.zeros_like(w), np.zeros_like(w), np.zeros(len(w))
    for rows, values in steps:
        for row in sorted(set(rows.tolist())):
            g = values[rows == row].astype(np.float64).sum(0) + l2 * w[row]
            t[row] += 1
            m[row] = BETAS[0] * m[row] + (1 - BETAS[0]) * g
            v[row] = BETAS[1] * v[row] + (1 - BETAS[1]) * ((g**2).mean() if rowwise else g**2)
            root = np.sqrt(v[row] / (1 - BETAS[1] ** t[row])) + eps
            w[row] -= lr * m[row] / (1 - BETAS[0] ** t[row]) / root
    return w


def sparse(rows, values, shape):
    return torch.sparse_coo_tensor(torch.as_tensor(rows)[None], torch.as_tensor(values), shape, check_invariants=True)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "dim", "lookups"), [(1, 1, 3), (7, 3, 20), (50, 16, 9), (5, 4, 0)])
def test_updates_equal_the_reference(path, rowwise, l2, rows, dim, lookups):
    random = np.random.default_rng(rows)
    start = random.standard_normal((rows, dim)).astype(np.float32)
    steps = [
        (random.integers(0, rows, lookups), random.standard_normal((lookups, dim)).astype(np.float32)) for _ in range(9)
    ]
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = SparseAdam([weight], 0.1, BETAS, 1e-3, l2, rowwise)
    for ids, values in steps:
        weight.grad = sparse(ids, values, weight.shape)
        optimizer.step()
    expected = reference(start, steps, 0.1, l2, 1e-3, rowwise)
    np.testing.assert_allclose(weight.detach(), expected, rtol=1e-4, atol=2e-5)
    assert optimizer.state[weight]["exp_avg_sq"].shape == ((rows, 1) if rowwise else (rows, dim))
    assert optimizer.state[weight]["row_steps"].dtype == torch.int32


def test_where_all_rows_are_in_use_it_is_torchs():
    ours, theirs = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(6, 3))
    pair = [(ours, SparseAdam([ours], 0.1)), (theirs, torch.optim.SparseAdam([theirs], 0.1))]
    for step in range(5):
        values = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in pair:
            weight.grad = sparse([0, 1, 2, 3, 4, 5, 5, 0], values, (6, 3))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_rows_first_update_is_a_whole_step_whenever_it_comes():
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = SparseAdam([weight], 0.1)
    for row in (0, 0, 0, 0, 1):
        weight.grad = sparse([row], torch.tensor([[2.0, -3.0]]), (3, 2))
        optimizer.step()
    torch.testing.assert_close(weight.detach()[1:], torch.tensor([[-0.1, 0.1], [0.0, 0.0]]))
    optimizer.reset_rows(slice(0, 1))
    assert optimizer.state[weight]["row_steps"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("steps", "ratio"), [(1, 1.0), (10, 0.4844), (1000, 2.5146)])
def test_bias_correction_by_all_steps_gives_late_rows_other_first_updates(steps, ratio):
    """As torch's SparseAdam and FBGEMM do: by how much a row's first update then differs from ours, in float64."""
    b1, b2 = 0.9, 0.999
    weights = [nn.Parameter(torch.zeros(2, 1, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    theirs = torch.optim.SparseAdam([weights[0]], 0.1, (b1, b2), 1e-30)
    ours = SparseAdam([weights[1]], 0.1, (b1, b2), 1e-30)
    for step in range(steps):
        row = int(step == steps - 1)
        for weight, optimizer in zip(weights, (theirs, ours)):
            weight.grad = sparse([row], torch.ones(1, 1, dtype=weight.dtype), weight.shape)
            optimizer.step()
    formula = (1 - b1) / (1 - b1**steps) / np.sqrt((1 - b2) / (1 - b2**steps))
    assert float(weights[0].detach()[1]) == pytest.approx(-0.1 * formula, rel=1e-9)
    assert float(weights[1].detach()[1]) == pytest.approx(-0.1, rel=1e-5)
    assert formula == pytest.approx(ratio, abs=1e-4)


def test_bf16_weights_follow_float32_ones_on_average():
    float32, half = (nn.Parameter(torch.ones(400, 16, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    for weight in (float32, half):
        optimizer, start = SparseAdam([weight], 1e-3, rowwise=True), weight.detach().clone().float()
        for _ in range(10):
            weight.grad = sparse(range(400), torch.ones(400, 16, dtype=weight.dtype), weight.shape)
            optimizer.step()
        moved = (weight.detach().float() - start).mean()
        assert float(moved) == pytest.approx(-0.01, rel=0.05)


@pytest.mark.parametrize(("options", "message"), [
    ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0, expected at least 0 and below 1"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
    ({"eps": -1.0}, r"eps is -1.0, expected"),
    ({"l2": -1.0}, r"l2 is -1.0, expected 0 or more"),
])  # fmt: skip
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAdam([nn.Parameter(torch.ones(2, 2))], 0.1, **options)


@pytest.mark.parametrize(("fields", "message"), [
    ({"adam_beta1": 1.0}, "adam_beta1 is 1.0, expected at least 0 and below 1"),
    ({"adam_beta2": -0.5}, "adam_beta2 is -0.5, expected 0 or more"),
    ({"clip_norm": -1.0}, "clip_norm is -1.0, expected 0 or more"),
    ({"table_learning_rate": -0.1}, "table_learning_rate is -0.1, expected 0 or more"),
    ({"table_learning_rate": 0.1, "learning_rate": 0.0}, "table_learning_rate is 0.1 but learning_rate is 0"),
])  # fmt: skip
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize("rule", ["adam", "rowwise_adam"])
def test_fields_reach_tables_and_mlp(rule):
    config = OptimizerConfig(rule, 0.02, adam_beta1=0.5, adam_beta2=0.75, adam_eps=1e-3, table_l2=0.1, mlp_l2=0.2)
    tables, others = build_optimizers([nn.Parameter(torch.ones(3, 2))], [nn.Parameter(torch.ones(2))], config)
    group, mlp = tables.param_groups[0], others.param_groups[0]
    assert (group["lr"], group["beta1"], group["beta2"], group["eps"], group["l2"]) == (0.02, 0.5, 0.75, 1e-3, 0.1)
    assert (mlp["lr"], mlp["betas"], mlp["eps"], mlp["weight_decay"]) == (0.02, (0.5, 0.75), 1e-3, 0.2)
    assert isinstance(others, torch.optim.Adam)


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_one_norm_over_tables_and_mlp_is_clipped(ranks, limit):
    """Against torch's clipping of the dense gradients in float64, of plain SGD with rate 1; the tables' rate is 0.5."""
    optimizer = OptimizerConfig("sgd", 1.0, table_learning_rate=0.5, clip_norm=limit)
    exchange = ExchangeConfig(ranks, table_codec="fp32", mlp_codec="fp32")
    config = replace(tiny(bits=32), optimizer=optimizer, exchange=exchange)
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 5, (64, 2), generator=random).int()
    batch = Batch(torch.randn(64, 13, generator=random), ids, (), (torch.rand(64, generator=random) < 0.3).float())
    torch.manual_seed(0)
    model = DLRM(13, [9, 7], config=config.model, qat=config.quantization).train()
    exact = copy.deepcopy(model)
    step = TrainStep(model, config)
    step(batch, 1.0, 64, 0)
    logits = exact(batch.dense, batch.ids, batch.bags)
    nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
    gradients = [weight.grad.to_dense().double() for weight in exact.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = min(1.0, limit / (float(norm) + 1e-6))
    assert (scale < 1) == (limit < 1)
    for weight, start, gradient in zip(model.parameters(), exact.parameters(), gradients):
        rate = 0.5 if start is exact.tables.weight else 1.0
        moved = start.detach().double() - weight.detach().double()
        torch.testing.assert_close(moved, rate * scale * gradient, rtol=1e-3, atol=2e-7)
