"""The sparse optimizers against a float64 reference, and the learning rate's course."""

import numpy as np
import pytest
import torch
from torch import nn

from dqrm.config import OptimizerConfig
from dqrm.kernels import sum_duplicates
from dqrm.training.optimizers import SparseAdagrad, SparseSGD, learning_rate


def reference(weight, steps, rule, lr, l2, eps=1e-10):
    """Row by row in float64: what the docstrings of the optimizers say."""
    weight = weight.astype(np.float64).copy()
    state = np.zeros((len(weight), 1 if rule == "rowwise" else weight.shape[1]))
    for rows, values in steps:
        for row in sorted(set(rows.tolist())):
            gradient = values[rows == row].astype(np.float64).sum(0) + l2 * weight[row]
            if rule == "sgd":
                weight[row] -= lr * gradient
            else:
                state[row] += (gradient**2).mean() if rule == "rowwise" else gradient**2
                weight[row] -= lr * gradient / (np.sqrt(state[row]) + eps)
    return weight


def build(rule, weight, lr, l2, eps=1e-10):
    if rule == "sgd":
        return SparseSGD([weight], lr, l2)
    return SparseAdagrad([weight], lr, l2, eps, rowwise=rule == "rowwise")


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "dim", "lookups"), [(1, 1, 3), (7, 3, 20), (50, 16, 9), (5, 4, 0)])
def test_updates_equal_the_reference(rule, l2, rows, dim, lookups):
    random = np.random.default_rng(rows)
    start = random.standard_normal((rows, dim)).astype(np.float32)
    steps = [
        (random.integers(0, rows, lookups), random.standard_normal((lookups, dim)).astype(np.float32)) for _ in range(4)
    ]
    weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = build(rule, weight, 0.1, l2)
    for ids, values in steps:
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids)[None], torch.from_numpy(values), weight.shape, check_invariants=True
        )
        optimizer.step()
    np.testing.assert_allclose(weight.detach(), reference(start, steps, rule, 0.1, l2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["adagrad", "rowwise"])
def test_eps_is_added_to_the_root(rule):
    """A large one, which shows; and where all gradients were 0 it is what keeps the update from being NaN."""
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = build(rule, weight, 0.5, 0.0, eps=0.25)
    values = torch.tensor([[2.0, -2.0], [0.0, 0.0]])
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), values, (3, 2), check_invariants=True)
    optimizer.step()
    moved = 0.5 * 2 / (2 + 0.25)
    torch.testing.assert_close(weight.detach(), torch.tensor([[1 - moved, 1 + moved], [1, 1], [1, 1]]))


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise"])
def test_rows_outside_the_batch_do_not_move(rule):
    weight = nn.Parameter(torch.ones(10, 2))
    optimizer = build(rule, weight, 0.5, 0.5)
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[3, 3]]), torch.ones(2, 2), (10, 2), check_invariants=True)
    optimizer.step()
    moved = (weight != 1).any(1)
    assert moved.nonzero().flatten().tolist() == [3]


def test_a_dense_gradient_is_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="SparseSGD got a dense gradient"):
        SparseSGD([weight], 0.1).step()


def test_adagrad_equals_torchs_on_sparse_gradients():
    ours, theirs = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(6, 3))
    pair = [(ours, SparseAdagrad([ours], 0.1)), (theirs, torch.optim.Adagrad([theirs], 0.1))]
    for step in range(3):
        values = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in pair:
            rows = torch.tensor([[0, 2, 2, 5]])
            weight.grad = torch.sparse_coo_tensor(rows, values, (6, 3), check_invariants=True)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_duplicates_are_summed_once_sorted_and_the_same_every_time():
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (1000,), generator=random)
    values = torch.randn(1000, 5, generator=random)
    unique, sums = sum_duplicates(rows, values)
    expected = torch.zeros(40, 5, dtype=torch.float64).index_add_(0, rows, values.double())
    assert unique.tolist() == sorted(set(rows.tolist()))
    torch.testing.assert_close(sums.double(), expected[unique], rtol=1e-5, atol=1e-5)
    for _ in range(5):
        assert torch.equal(sums, sum_duplicates(rows, values)[1])


def test_the_learning_rate_is_dlrms_policy():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_start_step=10, decay_steps=4)
    course = [learning_rate(step, config) for step in range(17)]
    assert course[:4] == [0.5, 1.0, 1.5, 2.0]
    assert course[4:10] == [2.0] * 6
    assert course[10:14] == [2.0 * (left / 4) ** 2 for left in (4, 3, 2, 1)]
    assert course[14:] == [course[13]] * 3
    assert {learning_rate(step, OptimizerConfig(learning_rate=0.3)) for step in (0, 7, 10**6)} == {0.3}
