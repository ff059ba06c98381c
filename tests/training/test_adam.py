"""Lazy and row-wise Adam against a float64 reference written row by row."""

import numpy as np
import pytest
import torch
from torch import nn

from dqrm.config import OptimizerConfig
from dqrm.training.optimizers import SparseAdam, build_optimizers

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
