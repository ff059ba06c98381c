"""Tables stored as INT4 rows with an INT8 tier: numerics against slow float64, who is in which tier, and the tensor."""

import io

import numpy as np
import pytest
import torch
from torch import nn

import reference as ref
from dqrm import kernels
from dqrm.config import TrainingConfig
from dqrm.kernels.layout import int4_row_width
from dqrm.quant.embedding import QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.storage import FP32, INT4, storage_for, storage_of
from dqrm.quant.tiered_rows import TieredRows, slots_for
from dqrm.training.optimizers import SparseSGD
from kernel_helpers import PATHS, on, threads

MASK = 0xFFFFFFFF


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed(position, seed):
    h = (position * 0x9E3779B1 & MASK) ^ seed
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def scale_of(row, highest):
    """max|row| / highest, at least 1e-8 / highest, rounded up to the 8 binary places of bf16."""
    mantissa, exponent = np.frexp(np.float64(np.float32(max(np.abs(row).max(initial=0), np.float32(1e-8)) / highest)))
    return np.ldexp(np.ceil(mantissa * 2.0**8), exponent - 8)


def rounded(row, highest, noise=None):
    scale = scale_of(row, highest)
    codes = np.float64(np.float32(row) / np.float32(scale))
    codes = np.round(codes) if noise is None else np.floor(np.float32(codes + noise))
    return np.clip(codes, -highest, highest) * scale


class Model:
    """The rows and slots of a weight, in float64 and one row at a time."""

    def __init__(self, weight):
        self.values, self.slot = ref.array(weight.dequantize()).astype(np.float64), {}
        slots = len(weight.operand.hot)
        self.owner, self.counts = [None] * slots, [0] * slots

    def _noise(self, row, seed):
        dim = self.values.shape[1]
        return np.array([((mixed(row * dim + d, seed) >> 16) + 0.5) / 2**16 for d in range(dim)])

    def update(self, rows, values, factor, seed):
        for row, change in zip(rows, values):
            new = np.float64(np.float32(self.values[row]) + np.float32(change) * np.float32(factor))
            self.values[row] = rounded(new, 127 if row in self.slot else 7, self._noise(row, seed))
            if row in self.slot:
                self.counts[self.slot[row]] += 1
        moved = []
        for row in rows:
            if row in self.slot or not self.owner:
                continue
            first = (mixed(row, 0x5BD1E995) * (len(self.owner) // 8) >> 32) * 8
            slot = min(range(first, first + 8), key=lambda slot: (self.counts[slot], slot))
            if mixed(row, seed ^ 0x2545F491) / 2**32 >= 1 / (self.counts[slot] + 1):
                continue
            if (lost := self.owner[slot]) is not None:
                del self.slot[lost]
                moved.append(lost)
                self.values[lost] = rounded(self.values[lost], 7, self._noise(lost, seed ^ 0x68E31DA4))
            self.owner[slot], self.slot[row] = row, slot
            self.counts[slot] += 1
        return moved


@PATHS
@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (1, 1), (40, 2), (41, 3), (90, 16), (60, 17)])
def test_values_are_encoded_to_the_nearest_of_15_levels(rows, dim, path):
    values = normal(rows, dim) * 10.0 ** torch.linspace(-30, 30, max(rows, 1))[:rows, None]
    with on(path):
        weight = TieredRows.encode(values)
        found = ref.array(weight.dequantize())
    for row, expected in zip(found, ref.array(values)):
        np.testing.assert_allclose(row, rounded(expected, 7), rtol=1e-6, atol=1e-38)


@PATHS
@pytest.mark.parametrize(("rows", "dim", "hot_rows"), [(400, 3, 0.05), (300, 16, 0.02), (60, 5, 0.0), (9, 2, 0.5)])
def test_updates_and_moves_are_those_of_the_reference(rows, dim, hot_rows, path):
    weight = TieredRows.encode(normal(rows, dim), hot_rows)
    model, random, moves = Model(weight), torch.Generator().manual_seed(1), 0
    for step in range(25):
        some = (torch.rand(rows, generator=random) < 8 / (8 + torch.arange(rows))).nonzero()[:, 0]
        values = normal(len(some), dim, seed=step)
        with on(path), threads(1 + step % 3):
            _, moved = INT4.update(weight, some, values, -0.1, step * 0x85EBCA77 % 2**32, None)
        expected = model.update(some.tolist(), ref.array(values), -0.1, step * 0x85EBCA77 % 2**32)
        assert moved.tolist() == expected
        moves += len(expected)
        assert weight.operand.counts.tolist() == model.counts
        assert [None if row == 0 else row - 1 for row in weight.operand.owner.tolist()] == model.owner
        np.testing.assert_allclose(ref.array(weight.dequantize()), model.values, rtol=1e-6, atol=1e-6)
        weight.check()
    assert moves or not model.owner


@PATHS
@pytest.mark.parametrize("hot", [False, True])
def test_updates_far_below_a_step_act_on_average(hot, path):
    """The mean over many equal rows: its error is that of so many draws of a step's size."""
    rows, dim = 6000, 16
    start, change = normal(1, dim).expand(rows, dim), normal(1, dim, seed=1) * 1e-3
    weight = TieredRows.encode(start, 0.5 if hot else 0.0)
    for _ in range(hot):
        INT4.update(weight, torch.arange(rows), torch.zeros(rows, dim), 1.0, 0, None)
    owner = weight.operand.owner.long()
    there = owner[owner > 0] - 1 if hot else torch.arange(rows)
    assert len(there) > rows * 0.4
    before = weight.dequantize()[0].double()
    with on(path):
        INT4.update(weight, there.sort().values, change.expand(len(there), dim), 1.0, 7, None)
    error = (weight.dequantize()[there].double().mean(0) - (before + change[0].double())).abs().max()
    assert error < 5 * float(before.abs().max()) / (127 if hot else 7) / len(there) ** 0.5


def test_the_rows_updated_most_often_end_up_in_int8():
    rows, often = 2000, 40
    weight = TieredRows.encode(normal(rows, 8), 0.05)
    random = torch.Generator().manual_seed(2)
    for step in range(300):
        rare = torch.randint(often, rows, (20,), generator=random)
        some = torch.cat([torch.arange(often)[torch.rand(often, generator=random) < 0.7], rare]).unique()
        INT4.update(weight, some, normal(len(some), 8, seed=step), 0.01, step, None)
    owners = set(weight.operand.owner.tolist())
    assert len(weight.operand.owner) == slots_for(rows, 0.05) == 104
    assert sum(row + 1 in owners for row in range(often)) >= 0.9 * often


def test_a_row_that_moves_up_keeps_its_value_and_one_that_moves_down_is_off_by_less_than_a_step():
    weight = TieredRows.encode(normal(9, 6), 0.5)
    before = weight.dequantize()
    INT4.update(weight, torch.arange(9), torch.zeros(9, 6), 1.0, 3, None)
    assert weight.operand.owner.count_nonzero() == 8
    assert torch.equal(weight.dequantize(), before)
    weight.operand.counts.zero_()
    cold = next(row for row in range(9) if row + 1 not in weight.operand.owner.tolist())
    _, moved = INT4.update(weight, torch.tensor([cold]), torch.zeros(1, 6), 1.0, 4, None)
    assert len(moved) == 1
    step = before.abs().amax(1) / 7
    assert ((weight.dequantize() - before).abs() <= step[:, None] * 1.01).all()


@pytest.mark.parametrize(("dim", "smaller"), [(16, 6.0), (64, 6.5)])
def test_memory_is_a_sixth_of_float32(dim, smaller):
    rows = 100_000
    weight = INT4.empty(rows, dim)
    assert INT4.memory(weight).nbytes == INT4.memory_bytes(rows, dim)
    assert FP32.memory_bytes(rows, dim) / INT4.memory_bytes(rows, dim) >= smaller


# ---- the tensor


@pytest.fixture
def weight():
    made = nn.Parameter(TieredRows.encode(normal(50, 3), 0.2))
    for step in range(4):
        INT4.update(made, torch.arange(0, 50, step + 1), normal(len(range(0, 50, step + 1)), 3), 0.1, step, None)
    assert made.operand.owner.all()
    return made


def test_slices_copies_and_files_hold_the_same_rows(weight):
    values = weight.detach().dequantize()
    assert torch.equal(weight.detach()[7:40][3:20].dequantize(), values[10:27])
    assert torch.equal(torch.cat([part.dequantize() for part in weight.detach().split(17)]), values)
    assert torch.equal(weight.detach().clone(), weight.detach())
    assert torch.equal(weight[torch.tensor([3, -1, 3])], values[[3, 49, 3]])
    file = io.BytesIO()
    torch.save({"weight": weight, "slice": weight.detach()[2:9]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["weight"].detach(), weight.detach())
    assert torch.equal(loaded["slice"].dequantize(), values[2:9])
    other = TieredRows.empty(50, 3, hot_rows=0.5)  # of other tiers: by value
    other.copy_(weight.detach())
    step = values.abs().amax(1, keepdim=True) / 7
    assert ((other.dequantize() - values).abs() <= step * 0.51).all()


def test_a_slice_is_written_in_its_tiers(weight):
    owner, values = weight.operand.owner.clone(), weight.detach().dequantize()
    new = normal(20, 3, seed=5)
    weight.detach()[10:30].copy_(new)
    assert torch.equal(weight.operand.owner, owner)
    changed = weight.detach().dequantize()
    assert torch.equal(torch.cat([changed[:10], changed[30:]]), torch.cat([values[:10], values[30:]]))
    hot = [row - 11 for row in owner.tolist() if 10 < row <= 30]
    np.testing.assert_allclose(ref.array(changed[10:30][hot]), ref.array(new[hot]), atol=0.02)
    weight.check()


def test_memory_that_is_no_table_is_refused(weight):
    """Also from a file: the kernels would read other memory."""
    with pytest.raises(ValueError, match=r"stored rows are torch.int32 \[3\], expected torch.int32 \[75\] for 50 rows"):
        TieredRows(torch.zeros(3, dtype=torch.int32), 50, 3)
    slots = weight.operand.hot.shape[0]
    row = int(weight.operand.owner[0]) - 1
    for damage in (
        lambda tiers: tiers.cold[row, :4].copy_(torch.tensor([slots], dtype=torch.int32).view(torch.uint8)),
        lambda tiers: tiers.cold[row, :4].copy_(torch.tensor([1], dtype=torch.int32).view(torch.uint8)),
        lambda tiers: tiers.cold[row, -1].zero_(),
        lambda tiers: tiers.owner[0].zero_(),
    ):
        copy = weight.detach().clone()
        damage(copy.operand)
        with pytest.raises(ValueError, match="rows and slots of a table stored as INT4 rows do not match"):
            TieredRows(copy.stored, 50, 3)


def test_data_of_another_shape_or_kind_are_refused(weight):
    before = weight.dequantize()
    rows, dim = weight.shape
    for other in (TieredRows.empty(rows + 9, dim), TieredRows.empty(rows, dim + 1), torch.zeros(rows, dim)):
        with pytest.raises(ValueError, match=rf"are INT4 rows of its shape \[{rows}, {dim}\]; use .copy_"):
            weight.data = other
    assert torch.equal(weight.dequantize(), before)
    other = TieredRows.encode(normal(rows, dim, seed=3))
    weight.data = other
    assert weight.stored is other.stored


def test_what_needs_all_values_at_once_is_refused(weight):
    with pytest.raises(NotImplementedError, match="a table stored as INT4 rows"):
        _ = weight.detach() * 2
    with pytest.raises(ValueError, match="10 rows of a table stored as INT4 rows are updated alone"):
        INT4.update(weight.detach()[:10], torch.tensor([0]), torch.zeros(1, 3), 1.0, 0, None)
    with pytest.raises(IndexError, match="row 50 is outside a weight of 50 rows"):
        kernels.cpu.update_tiers(weight.operand, torch.tensor([50]), torch.zeros(1, 3), 1.0, 0)


def test_the_share_of_hot_rows_is_checked():
    with pytest.raises(ValueError, match=r"hot_rows is 0\.6, expected 0 to 0.5"):
        TrainingConfig(table_dtype="int4", hot_rows=0.6)
    with pytest.raises(ValueError, match=r"hot_rows is 0\.1, but table_dtype is 'fp32'"):
        TrainingConfig(hot_rows=0.1)
    storage = INT4.with_hot_rows(0.1)
    assert storage_for(storage) is storage
    assert len(storage.empty(1000, 4).operand.hot) == 104
    assert storage_of(storage.empty(1, 4)) is INT4
    assert int4_row_width(16) == 10


# ---- modules


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_the_forward_is_that_of_the_float32_values(weight, bits):
    ids = torch.tensor([[0, 3], [30, 18], [29, 0]])
    for training in (True, False):
        tables = [
            QuantEmbeddingBagCollection([31, 19], 3, bits=bits, _weight=each).train(training)
            for each in (weight, weight.detach().dequantize())
        ]
        assert torch.equal(*[table(ids) for table in tables])
    bag = QuantEmbeddingBag(50, 3, dtype=torch.int4, bits=bits)
    assert isinstance(bag.weight, TieredRows)
    assert bag(torch.tensor([[1, 2]])).shape == (1, 3)


PERIODIC = {"scale_refresh": "periodic", "scale_period": 3}


@pytest.mark.parametrize("options", [{}, {"table_granularity": "row"}, PERIODIC])
def test_scales_fit_the_rows_that_lost_their_slot(options):
    """What a kept scale or maximum says is what a scan of all rows gives."""
    tables = QuantEmbeddingBagCollection([300, 100], 5, bits=8, dtype=INT4.with_hot_rows(0.05), **options)
    optimizer = SparseSGD([tables.weight], 0.5)
    optimizer.tables = tables
    tables.only_looked_up_rows_change()
    random, losses = torch.Generator().manual_seed(0), 0
    for step in range(40):
        ids = torch.stack([torch.randint(count, (30,), generator=random) for count in (300, 100)], 1)
        owner = tables.weight.operand.owner.clone()
        tables(ids).mul(normal(30, 2, 5, seed=step)).sum().backward()
        optimizer.step()
        tables.weight.grad = None
        losses += int((owner[owner > 0] != tables.weight.operand.owner[owner > 0]).sum())
    assert losses > 5
    quantizer = tables.weight_fake_quantizer
    if options.get("scale_refresh") == "periodic":
        quantizer.refresh(tables.weight)
        expected = tables.scale.clone()
        quantizer.refresh(tables.weight, everything=True)
        assert torch.equal(expected, tables.scale)
    else:
        needed = quantizer.scale_of(quantizer.groups.largest(tables.weight))
        assert (tables.scale >= needed).all()
        if options:
            assert torch.equal(tables.scale, needed)
