"""Row-wise Adagrad with the frequency of rows, against float64 references written row by row."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tiny
from dqrm.config import ExchangeConfig, OptimizerConfig
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.training.launch import train
from dqrm.training.optimizers import CounterAdagrad, FrequencyAdagrad, SparseAdagrad, build_optimizers
from launch_helpers import same_run
from run_helpers import assert_resumes
from training.test_adam import sparse

RULES = ["counter_adagrad", "frequency_adagrad"]
EPS = 1e-3


def counted(weight, steps, lr, l2, halflife):
    """The docstring of `CounterAdagrad`, in float64."""
    w = weight.astype(np.float64).copy()
    s, c, last = np.zeros(len(w)), np.zeros(len(w)), np.zeros(len(w))
    for now, (rows, values) in enumerate(steps, start=1):
        for row in sorted(set(rows.tolist())):
            g = values[rows == row].astype(np.float64).sum(0)
            c[row] = 1 + 2.0 ** (-(now - last[row]) / halflife) * c[row]
            last[row] = now
            s[row] += (g**2).mean()
            w[row] = w[row] * max(0, 1 - lr * l2 * halflife / c[row]) - lr * g / (np.sqrt(s[row]) + EPS)
    return w


def by_frequency(weight, steps, lr, l2, starts):
    """The docstring of `FrequencyAdagrad`, in float64: all rows of a step are counted first."""
    w = weight.astype(np.float64).copy()
    s, f = np.zeros(len(w)), np.zeros(len(w))
    for rows, values in steps:
        for row in set(rows.tolist()):
            f[row] += 1
        for row in sorted(set(rows.tolist())):
            table = np.searchsorted(starts, row, side="right") - 1
            first, end = starts[table], [*starts, len(w)][table + 1]
            g = values[rows == row].astype(np.float64).sum(0) + l2 * w[row]
            s[row] += (g**2).mean()
            factor = np.log(f[row] + 1) / np.log(f[first:end].max() + 1)
            w[row] -= lr * factor * g / (np.sqrt(s[row]) + EPS)
    return w


def drawn(rows, dim, lookups, count=9):
    """A weight and gradients; low rows are much more frequent than high ones."""
    random = np.random.default_rng(rows)
    steps = [
        ((rows * random.random(lookups) ** 4).astype(np.int64), random.standard_normal((lookups, dim), np.float32))
        for _ in range(count)
    ]
    return random.standard_normal((rows, dim), np.float32), steps


SIZES = pytest.mark.parametrize(("rows", "dim", "lookups"), [(1, 1, 3), (7, 3, 20), (50, 16, 9), (5, 4, 0)])


@SIZES
@pytest.mark.parametrize(("l2", "halflife"), [(0.0, 5.0), (0.1, 5.0), (0.01, 1e6), (0.1, 0.5), (1e3, 5.0)])
def test_counted_updates_equal_the_reference(path, rows, dim, lookups, l2, halflife):
    start, steps = drawn(rows, dim, lookups)
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = CounterAdagrad([weight], 0.1, l2, EPS, halflife)
    for ids, values in steps:
        weight.grad = sparse(ids, values, weight.shape)
        optimizer.step()
    np.testing.assert_allclose(weight.detach(), counted(start, steps, 0.1, l2, halflife), rtol=1e-4, atol=2e-5)
    assert {name: len(value) for name, value in optimizer.state[weight].items() if value.dim()} == dict.fromkeys(
        ("sum", "row_counts", "last"), rows
    )


@SIZES
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_updates_by_frequency_equal_the_reference(path, rows, dim, lookups, l2):
    start, steps = drawn(rows, dim, lookups)
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = FrequencyAdagrad([weight], 0.1, l2, EPS)
    for ids, values in steps:
        weight.grad = sparse(ids, values, weight.shape)
        optimizer.step()
    np.testing.assert_allclose(weight.detach(), by_frequency(start, steps, 0.1, l2, [0]), rtol=1e-4, atol=2e-5)


def test_each_table_has_a_most_frequent_row_of_its_own():
    tables = QuantEmbeddingBagCollection([30, 1, 9], 4, bits=4)
    start, steps = drawn(40, 4, 12)
    with torch.no_grad():
        tables.weight.copy_(torch.from_numpy(start))
    optimizer = FrequencyAdagrad([tables.weight], 0.1, 0.0, EPS)
    optimizer.tables = tables
    for number, (ids, values) in enumerate(steps):
        optimizer.step_rows(torch.from_numpy(ids), torch.from_numpy(values))
        if number == 4:  # state that is loaded says what was most frequent
            again = FrequencyAdagrad([tables.weight], 0.1, 0.0, EPS)
            again.load_state_dict(optimizer.state_dict())
            again.tables, optimizer = tables, again
    expected = by_frequency(start, steps, 0.1, 0.0, [0, 30, 31])
    np.testing.assert_allclose(tables.weight.detach(), expected, rtol=1e-4, atol=2e-5)
    assert abs(expected - by_frequency(start, steps, 0.1, 0.0, [0])).max() > 1e-2


def test_rows_that_are_reset_are_new():
    for kind in (CounterAdagrad, FrequencyAdagrad):
        weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
        used, new = (kind([weight], 0.1, 0.01) for weight in weights)
        for row in (0, 1, 1, 1):
            weights[0].grad = sparse([row], torch.tensor([[2.0, -3.0]]), (3, 2))
            used.step()
        used.reset_rows(slice(0, 3))
        weights[0].data.fill_(1)
        for weight, optimizer in zip(weights, (used, new)):
            weight.grad = sparse([0, 2], torch.tensor([[2.0, -3.0], [1.0, 1.0]]), (3, 2))
            optimizer.step()
        torch.testing.assert_close(*weights)


def test_without_decay_a_counter_changes_nothing():
    start, steps = drawn(7, 3, 20)
    weights = [nn.Parameter(torch.from_numpy(start.copy())) for _ in range(2)]
    pair = CounterAdagrad([weights[0]], 0.1), SparseAdagrad([weights[1]], 0.1, rowwise=True)
    for ids, values in steps:
        for weight, optimizer in zip(weights, pair):
            weight.grad = sparse(ids, values, weight.shape)
            optimizer.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_all_other_rows(rule):
    weight = nn.Parameter(torch.ones(100, 4))
    config = OptimizerConfig(rule, 0.1, table_l2=0.1)
    optimizer, _ = build_optimizers([weight], [nn.Parameter(torch.ones(1))], config)
    optimizer.step_rows(torch.tensor([3, 50, 3]), torch.ones(3, 4))
    assert weight.ne(1).any(1).nonzero().flatten().tolist() == [3, 50]


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_keeps_its_bits(generated, tmp_path, rule, ranks):
    config = tiny(optimizer=rule, table_l2=0.01, epochs=2, checkpoint_every=4, callbacks=("redraw_tables:min_rows=30",))
    config = replace(config, exchange=ExchangeConfig(ranks))
    config = replace(config, optimizer=replace(config.optimizer, count_halflife=20.0))
    assert_resumes(generated, tmp_path, config, 9, 25, 12)
    train(generated, tmp_path / "none", replace(config, optimizer=replace(config.optimizer, table_l2=0.0)))
    with pytest.raises(AssertionError):
        same_run(tmp_path / "none", tmp_path / "whole")


def test_a_halflife_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="halflife is 0, expected a number of steps above 0"):
        CounterAdagrad([nn.Parameter(torch.ones(2, 2))], 0.1, halflife=0)
    for wrong in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"count_halflife is {wrong}, expected a finite number of steps above 0"):
            OptimizerConfig(count_halflife=wrong)
