"""Scales of tables when an optimizer changes rows that this process did not look up, and steps of several forwards."""

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBagCollection
from dqrm.quant.ranges import BlockMaxima
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import PATHS, on

ROWS, MULTI, DIM = (33, 1, 16, 250, 47), (False, False, False, False, True), 3
STARTS = np.cumsum([0, *ROWS])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(dtype=torch.float32, promise=True, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sum(ROWS), DIM, generator=generator).to(dtype)
    module = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=weight, **options)
    if promise:
        module.only_looked_up_rows_change()
    return module


def look_up(module, seed, batch=4):
    """A forward of few rows; their numbers in the weight."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.integers(0, rows, batch) for rows in ROWS[:4]], 1)
    lengths = random.integers(0, 3, batch)
    values = random.integers(0, ROWS[4], lengths.sum())
    out = module(torch.from_numpy(ids), [(torch.from_numpy(values), torch.from_numpy(lengths.cumsum() - lengths))])
    return out, sorted({*(ids + STARTS[:4]).ravel().tolist(), *(values + STARTS[4]).tolist()})


def maxima(module, rows=None):
    """Of each table, the largest magnitude: of all rows, or of some; 0 where there are none."""
    weight = np.abs(ref.array(module.weight))
    rows = np.arange(STARTS[-1]) if rows is None else np.asarray(rows, np.int64)
    table = np.searchsorted(STARTS, rows, side="right") - 1
    return np.array([weight[rows[table == number]].max(initial=0) for number in range(len(ROWS))])


def change(module, optimizer, seed, own, count=9):
    """An update as the exchange brings it: of this process's rows and of others; by turns they grow and shrink."""
    random = np.random.default_rng(seed + 1000)
    others = random.choice(STARTS[-1], count, replace=False).tolist()
    others += (STARTS[1:] - 1).tolist() if seed % 3 == 0 else STARTS[:-1].tolist()  # first and last rows of tables
    rows = random.permutation(sorted({*own, *others}))
    size = 10.0 if seed % 4 == 0 else 1.0
    values = ref.array(module.weight)[rows] if seed % 2 else random.normal(size=(len(rows), DIM)) * size
    rows = torch.from_numpy(rows)
    optimizer.step_rows(rows, torch.from_numpy(values.astype("f4")))
    module.rows_changed(rows)
    return rows.numpy()


@PATHS
@DTYPES
@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("promise", [True, False], ids=["blocks", "scan"])
@pytest.mark.parametrize("rule", [SparseSGD, SparseAdagrad])
def test_a_periodic_refresh_is_exact_whoever_looked_the_rows_up(path, dtype, period, promise, rule):
    with on(path):
        module = make(dtype, promise, scale_period=period)
        optimizer, expected = rule(module.parameters(), 0.9), None
        for step in range(24):
            if step % period == 0:
                expected = maxima(module)
            _, own = look_up(module, step)
            ref.assert_scale(module.scale, expected, 4)
            change(module, optimizer, step, own)
            ref.assert_scale(module.scale, expected, 4)  # not before it is due
        module.refresh_scale()
        ref.assert_scale(module.scale, maxima(module), 4)


@PATHS
@DTYPES
@pytest.mark.parametrize(("rescan", "bits"), [(7, 4), (7, 8), (10_000, 4)])
def test_running_max_is_raised_by_exactly_the_changed_rows(path, dtype, rescan, bits):
    with on(path):
        module = make(dtype, bits=bits, scale_refresh="running_max", rescan_period=rescan)
        optimizer, expected = SparseSGD(module.parameters(), 0.9), None
        for step in range(24):
            if step % rescan == 0:
                expected = maxima(module)
            _, own = look_up(module, step)
            ref.assert_scale(module.scale, expected, bits)
            expected = np.maximum(expected, maxima(module, change(module, optimizer, step, own)))
            ref.assert_scale(module.scale, expected, bits)  # at once
        module.eval()
        look_up(module, 99)
        ref.assert_scale(module.scale, expected, bits)


@PATHS
@DTYPES
@pytest.mark.parametrize("table", range(len(ROWS)))
@pytest.mark.parametrize("last", [False, True], ids=["first row", "last row"])
def test_only_the_tables_of_the_changed_rows_are_raised(path, dtype, table, last):
    row = int(STARTS[table + 1] - 1 if last else STARTS[table])
    with on(path):
        module = make(dtype, scale_refresh="running_max")
        look_up(module, 0)
        before = module.scale.clone()
        with torch.no_grad():
            module.weight[row, 1] = -77
        module.rows_changed(torch.tensor([row]))
    ref.assert_scale(module.scale[table], 77, 4)
    others = torch.arange(len(ROWS)) != table
    assert torch.equal(module.scale[others], before[others])


@PATHS
@DTYPES
@pytest.mark.parametrize("value", [50.0, float("inf"), float("nan")])
def test_each_row_of_each_table_is_found(path, dtype, value):
    """First and last rows of blocks of 16, in tables of no whole number of them."""
    for row in (0, 15, 16, 31, 32, 33, 34, 49, 50, 65, 66, 299, 300, 346):
        with on(path):
            module = make(dtype, scale_period=1)
            look_up(module, 0)
            look_up(module, 0)
            with torch.no_grad():
                module.weight[row, 2] = value
            module.rows_changed(torch.tensor([row]))
            look_up(module, 0)
        fresh = make(dtype, promise=False, scale_period=1)
        fresh.load_state_dict(module.state_dict())
        fresh.refresh_scale()
        assert torch.equal(module.scale.nan_to_num(-1), fresh.scale.nan_to_num(-1))
        table = int(np.searchsorted(STARTS, row, side="right")) - 1
        if np.isfinite(value):
            ref.assert_scale(module.scale[table], value, 4)
        else:
            assert not module.scale[table].isfinite()


@pytest.mark.parametrize("sizes", [(1,), (16,), (17,), (1, 1, 33), (40, 15, 16, 2, 100)], ids=str)
def test_the_blocks_of_the_rows_are_marked_and_no_others(sizes):
    blocks, starts = BlockMaxima(sizes), np.cumsum([0, *sizes])
    block_starts = np.cumsum([0, *(-(-size // 16) for size in sizes)])
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows = random.choice(starts[-1], int(random.integers(0, min(12, starts[-1]) + 1)), replace=False)
        expected = np.zeros(block_starts[-1])
        for row in rows:
            table = max(number for number in range(len(sizes)) if starts[number] <= row)
            expected[block_starts[table] + (row - starts[table]) // 16] = 1
        blocks.dirty.zero_()
        blocks.mark_any(torch.from_numpy(rows))
        np.testing.assert_array_equal(blocks.dirty, expected)


@PATHS
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_no_rows_change_nothing(path, refresh):
    with on(path):
        module = make(scale_refresh=refresh)
        module.rows_changed(torch.zeros(0, dtype=torch.int64))
        look_up(module, 0)
        before = module.scale.clone()
        module.rows_changed(torch.zeros(0, dtype=torch.int64))
        look_up(module, 1)
    assert torch.equal(module.scale, before)
    ref.assert_scale(module.scale, maxima(module), 4)


@PATHS
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_rows_may_change_before_the_first_forward(path, refresh):
    with on(path):
        module = make(scale_refresh=refresh)
        change(module, SparseSGD(module.parameters(), 0.9), 0, [])
        look_up(module, 0)
    ref.assert_scale(module.scale, maxima(module), 4)


@PATHS
def test_tables_of_32_bits_and_single_tables_take_it_too(path):
    with on(path):
        make(bits=32).rows_changed(torch.tensor([3]))
        table = QuantEmbedding(40, DIM, sparse=True, scale_refresh="running_max")
        table(torch.tensor([1, 2]))
        with torch.no_grad():
            table.weight[39] = 9
        table.rows_changed(torch.tensor([39, 5]))
    ref.assert_scale(table.scale, [9], 4)


# ---- several forwards in one step


@PATHS
@pytest.mark.parametrize("forwards", [2, 3, 5])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_several_forwards_of_one_step_are_one_tick(path, forwards, period, refresh):
    options = {"scale_period": period} if refresh == "periodic" else {"rescan_period": period}
    with on(path):
        module = make(scale_refresh=refresh, **options)
        optimizer, expected = SparseSGD(module.parameters(), 0.9), None
        for step in range(8):
            if step % period == 0:
                expected = maxima(module)
            rows = set()
            for number in range(forwards):
                rows |= set(look_up(module, 10 * step + number)[1])
                ref.assert_scale(module.scale, expected, 4)
                if number + 1 < forwards:
                    module.same_step()
            assert module.scale_ticks == step + 1
            changed = change(module, optimizer, step, rows)
            if refresh == "running_max":
                expected = np.maximum(expected, maxima(module, changed))
        assert int(module.state_dict()["weight_fake_quantizer.scale_ticks"]) == 8


@PATHS
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_an_update_after_two_forwards_counts_the_rows_of_both(path, refresh):
    """Gradients added up over two forwards, and `step()`: nothing says `rows_changed`, all rows were looked up here."""
    with on(path):
        module, expected = make(**({"scale_period": 1} if refresh == "periodic" else {"rescan_period": 3})), None
        optimizer = SparseSGD(module.parameters(), 0.5)
        for step in range(9):
            optimizer.zero_grad()
            rows = []
            for number, size in enumerate([8, 0.01]):
                if refresh == "periodic" or step % 3 == 0:
                    expected = maxima(module)
                out, found = look_up(module, 10 * step + number)
                ref.assert_scale(module.scale, expected, 4)
                (out * size).sum().backward()
                rows += found
                if number == 0:
                    module.same_step()
            optimizer.step()
            if refresh == "running_max":
                expected = np.maximum(expected, maxima(module, rows))


@PATHS
def test_weights_that_are_replaced_in_the_middle_of_a_step_get_scales(path):
    with on(path):
        module = make(scale_period=100)
        look_up(module, 0)
        module.same_step()
        state = module.state_dict()
        del state["weight_fake_quantizer.scale"], state["weight_fake_quantizer.scale_ticks"]  # an unquantized model's
        module.load_state_dict(state)
        look_up(module, 1)
    ref.assert_scale(module.scale, maxima(module), 4)


# ---- other weights


@PATHS
@DTYPES
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_replaced_weights_are_read_at_the_next_refresh_of_their_clock(path, dtype, refresh):
    given = torch.tensor([1.0, 2, 3, 4, 5])
    with on(path):
        module = make(dtype, **{"scale_period" if refresh == "periodic" else "rescan_period": 3})
        for step in range(2):
            change(module, SparseSGD(module.parameters(), 0.9), step, look_up(module, step)[1])
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-0.3, 0.2, module.weight.numel()).view_as(module.weight))
        module.scale.copy_(given)
        module.weights_replaced(5)
        assert module.scale_ticks == 5
        look_up(module, 5)
        assert torch.equal(module.scale, given)
        look_up(module, 6)
        ref.assert_scale(module.scale, maxima(module), 4)


@PATHS
def test_replaced_weights_without_scales_get_them_at_the_next_forward(path):
    with on(path):
        module = make(scale_period=100)
        look_up(module, 0)
        with torch.no_grad():
            module.weight.mul_(3)
        module.scale[2] = 0
        module.weights_replaced(7)
        look_up(module, 1)
    ref.assert_scale(module.scale, maxima(module), 4)
    assert module.scale_ticks == 8
