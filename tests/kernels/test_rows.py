"""Sums and updates of rows, and maxima, in compiled code: in input order, with the bits of plain torch."""

from functools import partial

import numpy as np
import pytest
import torch

import reference as ref
from dqrm import kernels
from dqrm.quant.rows import add_rows, add_rows_stochastic, sum_duplicates
from dqrm.quant.storage import max_abs
from dqrm.quant.uniform import scale_from_max
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import NATIVE, ODD, PATHS, both, collection, on, random_rows, same

# ---- sums and updates of rows

GRADIENTS = {
    "none": (torch.zeros(0, dtype=torch.int64), 3),
    "one": (torch.tensor([4]), 16),
    "all the same": (torch.full((129,), 7), 17),
    "hot row": (torch.where(torch.arange(700) % 3 > 0, 5, torch.arange(700)), 3),
    "random": (torch.randint(40, (500,), generator=torch.Generator().manual_seed(3)), 16),
    "wide": (torch.randint(900, (600,), generator=torch.Generator().manual_seed(4)), 64),
    "falling": (torch.arange(300).flip(0), 1),
}


@PATHS
@pytest.mark.parametrize("name", GRADIENTS)
def test_duplicates_are_summed_in_input_order(path, name):
    rows, dim = GRADIENTS[name]
    values = random_rows(len(rows), dim, seed=1) * 10.0 ** torch.linspace(-4, 4, len(rows))[:, None]
    with on(path):
        found_rows, found = sum_duplicates(rows, values)
    expected_rows, expected = ref.sequential_sums(rows.numpy(), values.numpy())
    assert found_rows.tolist() == expected_rows.tolist()
    np.testing.assert_array_equal(found.numpy(), expected)


@PATHS
@pytest.mark.parametrize("largest", [2**11 - 1, 2**11, 2**22, 2**33, 2**36 - 1, 2**36, 2**62])
def test_rows_of_any_size_are_sorted(path, largest):
    rows = torch.tensor([largest, 3, largest - 1, 0, 3, largest, largest // 2, 1])
    values = torch.arange(8.0)[:, None].expand(-1, 2).contiguous()
    with on(path):
        found_rows, found = sum_duplicates(rows, values)
    expected_rows, expected = ref.sequential_sums(rows.numpy(), values.numpy())
    assert found_rows.tolist() == expected_rows.tolist()
    np.testing.assert_array_equal(found.numpy(), expected)


def test_odd_values_are_summed_too():
    values = torch.tensor(ODD)[torch.randint(len(ODD), (60, 5), generator=torch.Generator().manual_seed(0))]
    if kernels.native():
        rows = torch.arange(60) % 7
        found = both(lambda: sum_duplicates(rows, values))[1]
        with np.errstate(all="ignore"):
            expected = ref.sequential_sums(rows.numpy(), values.numpy())[1]
        np.testing.assert_array_equal(found.numpy(), expected)


@PATHS
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("factor", [1.0, -0.1])
def test_rows_are_added_in_input_order(path, name, factor):
    rows, dim = GRADIENTS[name]
    values, target = random_rows(len(rows), dim, seed=1), random_rows(901, dim, seed=2)
    expected = target.numpy().copy()
    for row, value in zip(rows.tolist(), values.numpy()):
        expected[row] += value * np.float32(factor)
    with on(path):
        add_rows(target, rows, values, factor)
    np.testing.assert_array_equal(target.numpy(), expected)


@NATIVE
@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "none"])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_stochastic_rounding_has_the_bits_of_plain_torch(name, seed):
    rows, dim = GRADIENTS[name]
    rows = rows.unique()
    values = random_rows(len(rows), dim, seed=1)
    start = random_rows(901, dim, seed=2, dtype=torch.bfloat16)
    (found,) = both(lambda: (add_rows_stochastic(start.clone(), rows, values, -0.01, seed),))
    with np.errstate(all="ignore"):
        exact = start[rows].float().numpy() + values.numpy() * np.float32(-0.01)
    inner, outer = ref.bf16_neighbours(exact)
    new = found[rows].float().numpy()
    assert ((new == inner) | (new == outer)).all()
    untouched = torch.ones(901, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(found[untouched], start[untouched])


@NATIVE
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_optimizers_give_the_bits_of_plain_torch(rule, l2, dtype):
    rows, dim = GRADIENTS["hot row"]

    def run():
        weight = torch.nn.Parameter(random_rows(701, dim, seed=5, dtype=dtype))
        kind = SparseSGD if rule == "sgd" else SparseAdagrad
        options = {} if rule == "sgd" else {"rowwise": rule == "rowwise"}
        optimizer = kind([weight], 0.1, l2, seed=3, **options)
        for step in range(5):
            values = random_rows(len(rows), dim, seed=step, dtype=dtype)
            weight.grad = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=True)
            optimizer.step()
        return [weight.detach(), *(value for value in optimizer.state[weight].values())]

    both(run)


@PATHS
@pytest.mark.parametrize("row", [-1, 4, 2**40])
@pytest.mark.parametrize("update", ["nearest", "stochastic"])
def test_a_row_outside_the_weight_is_refused(path, row, update):
    """The one behind the last, too: its write would be into other memory."""
    rows, values = torch.tensor([0, row, 3]), torch.ones(3, 2)
    target = torch.zeros(4, 2, dtype=torch.float32 if update == "nearest" else torch.bfloat16)
    add = add_rows if update == "nearest" else partial(add_rows_stochastic, seed=0)
    with on(path), pytest.raises((IndexError, RuntimeError), match="out"):
        add(target, rows, values, factor=1.0)


# ---- maxima


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (15, 3), (16, 16), (17, 17), (1000, 3)])
def test_the_exact_scale_is_of_the_largest_magnitude(path, rows, dim, dtype):
    tables = collection((rows, 2), dim, dtype=dtype, scale_period=1)
    with torch.no_grad():
        tables.weight[rows - 1, dim - 1] = -50
    with on(path):
        tables.only_looked_up_rows_change()
        tables(torch.zeros(1, 2, dtype=torch.int64))
    ref.assert_scale(tables.scale[0], 50, 4)
    ref.assert_scale(tables.scale[1], np.abs(ref.array(tables.table(1))).max(), 4)


@NATIVE
@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_maxima_of_odd_numbers(value, dtype):
    table = torch.full((33, 3), 1e-9).to(dtype)
    table[20, 1] = value
    maxima, dirty = torch.zeros(3), torch.ones(3, dtype=torch.uint8)
    found = torch.tensor(kernels.blocks_max(table, 16, dirty, maxima))
    same(found, max_abs(table))
    same(maxima, torch.stack([max_abs(part) for part in table.split(16)]))
    assert not dirty.any()
    per_table = scale_from_max(torch.zeros(2), 4)
    ranges = kernels.TableRanges(torch.tensor([0, 20]), per_table, 7)
    kernels.raise_scales(torch.tensor([1, 20, 2, 32]), table, ranges)
    same(per_table, scale_from_max(torch.stack([max_abs(table[:20]), max_abs(table)]), 4))
    kept = torch.tensor([2.0, 1e30])
    kernels.raise_scales(torch.tensor([1, 21]), table, kernels.TableRanges(torch.tensor([0, 20]), kept, 7))
    assert kept.tolist() == [2.0, torch.tensor(1e30).item()]
