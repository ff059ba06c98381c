"""Tables of several bit widths in one collection (small_table_bits): as each of them alone would be, and packed."""

import copy
import re

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.config import QUANTIZERS, QATConfig
from dqrm.quant.convert import convert, stored_bytes
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBagCollection
from dqrm.quant.mixed import MixedPackedCollection
from dqrm.quant.packed import PackedEmbeddingBagCollection
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import PATHS, on

ROWS, MULTI, DIM = (5, 300, 1, 40, 9, 60), (False, False, False, False, True, True), 5
BITS = {
    "4 and 8": {"bits": 4, "small_table_bits": 8, "small_table_rows": 40},
    "2 and 16": {"bits": 2, "small_table_bits": 16, "small_table_rows": 10},
    "4 and 32": {"bits": 4, "small_table_bits": 32, "small_table_rows": 10},
    "32 and 4": {"bits": 32, "small_table_bits": 4, "small_table_rows": 10},
}
CASES = pytest.mark.parametrize("name", BITS)


def made(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    weight = torch.randn(sum(ROWS), DIM).to(dtype)
    return QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=weight, **BITS[name], **options)


def batch(samples, seed=0):
    random = np.random.default_rng(seed)
    ids = np.stack([random.integers(0, rows, samples) for rows in ROWS[:4]], 1)
    bags = []
    for rows in ROWS[4:]:
        lengths = random.integers(0, 4, samples)
        bags.append((torch.from_numpy(random.integers(0, rows, lengths.sum())),
                     torch.from_numpy(np.cumsum(lengths) - lengths)))  # fmt: skip
    return torch.from_numpy(ids), bags


def expected_bits(name):
    few, rows = BITS[name]["small_table_bits"], BITS[name]["small_table_rows"]
    return tuple(few if count < rows else BITS[name]["bits"] for count in ROWS)


@CASES
@PATHS
@pytest.mark.parametrize("samples", [0, 1, 17])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_values_and_gradients_are_those_of_the_formula_table_by_table(path, name, samples, sparse):
    tables, (ids, bags) = made(name, sparse=sparse), batch(samples)
    assert tables.table_bits == expected_bits(name)
    with on(path):
        out = tables(ids, bags)
        grad = torch.randn(out.shape)
        (out * grad).sum().backward()
    weight, starts = ref.array(tables.weight), np.cumsum([0, *ROWS])
    gradient = np.zeros_like(weight)
    for number, bits in enumerate(tables.table_bits):
        table = weight[starts[number] : starts[number + 1]]
        scale = tables.scale[number].item()
        if bits == 32:
            assert scale == 1
        else:
            ref.assert_scale(scale, np.abs(table).max(), bits)
        if number < 4:
            flat = ids[:, number : number + 1].numpy()
            groups = ref.bag_positions(flat)
        else:
            flat, offsets = (tensor.numpy() for tensor in bags[number - 4])
            groups = ref.bag_positions(flat, offsets)
        found = ref.array(out[:, number])
        ref.assert_pooled(found, table, scale=scale, bits=bits, ids=flat, bags=groups)
        values = ref.fake_quantize(table, scale, bits)
        own, _ = ref.pool_gradients(ref.array(grad[:, number]), values, flat, groups)
        gradient[starts[number] : starts[number + 1]] = own
    np.testing.assert_allclose(ref.array(tables.weight.grad), gradient, rtol=1e-6, atol=1e-6)


def train(tables, steps=12, rule=SparseSGD):
    """Steps large enough to outgrow scales; what each gives."""
    optimizer = rule([tables.weight], lr=2.0)
    optimizer.tables, found = tables, []
    tables.only_looked_up_rows_change()
    for step in range(steps):
        optimizer.zero_grad()
        out = tables(*batch(7, step))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        optimizer.step()
        found.append((out.detach(), tables.scale.clone()))
    return found


@CASES
@PATHS
@pytest.mark.parametrize("rule", [SparseSGD, SparseAdagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clock", [{"rescan_period": 5}, {"scale_period": 5}], ids=["running_max", "periodic"])
def test_training_is_that_of_collections_of_one_width(path, name, clock, rule, dtype):
    """The same tables, all in one width: those that are of that width have the same scales and values at each step."""
    widths = sorted({*expected_bits(name)})
    with on(path):
        mixed = made(name, dtype, **clock)
        found = train(mixed, rule=rule)
        counted = mixed.clamps.take()
        clamped = 0
        for bits in widths:
            alone = made(name, dtype, **clock)
            alone = QuantEmbeddingBagCollection(
                ROWS, DIM, multi=MULTI, _weight=alone.weight.detach().clone(), bits=bits, **clock
            )
            members = [number for number, own in enumerate(mixed.table_bits) if own == bits]
            for (out, scale), (own, own_scale) in zip(found, train(alone, rule=rule)):
                assert torch.equal(out[:, members], own[:, members])
                assert bits == 32 or torch.equal(scale[members], own_scale[members])
            for number in members:
                assert torch.equal(mixed.table(number), alone.table(number))
            clamped += alone.clamps.take()[0]
    assert counted[1] > 0
    assert (counted[0] > 0) == ("scale_period" in clock)
    assert counted[0] <= clamped


@CASES
def test_packed_tables_give_what_evaluation_gave_and_take_the_bits_that_are_told(name):
    tables, (ids, bags) = made(name), batch(23)
    train(tables)
    told = stored_bytes(tables)["tables"]
    expected = tables.eval()(ids, bags).detach()
    packed = convert(torch.nn.ModuleList([copy.deepcopy(tables)]))[0]
    assert type(packed) is MixedPackedCollection
    assert torch.equal(packed(ids, bags), expected)
    with on("plain"):
        assert torch.equal(packed(ids, bags), expected)
    again = copy.deepcopy(packed)
    for part in again.parts:
        part.codes.zero_()
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(ids, bags), expected)
    held = 0
    for (bits, numbers), part in zip(packed.members.items(), packed.parts, strict=True):
        assert type(part) is PackedEmbeddingBagCollection
        assert part.bits == bits
        assert part.table_rows == tuple(ROWS[number] for number in numbers)
        held += part.codes.nbytes + (0 if bits == 32 else part.scale.nbytes)
    padding = sum(rows * (-(-DIM * bits // 8) - DIM * bits / 8) for rows, bits in zip(ROWS, tables.table_bits))
    assert 0 <= told - (held - padding) < len(ROWS)  # a table's last byte may be begun
    none = batch(0)
    assert packed(*none).shape == (0, len(ROWS), DIM)


@pytest.mark.parametrize(("table", "bad"), [(0, 5), (1, -1), (4, 9), (5, 60)])
def test_an_id_outside_its_table_is_refused_by_the_tables_own_number(table, bad):
    packed, (ids, bags) = convert(torch.nn.ModuleList([made("4 and 8")]))[0], batch(6)
    (ids[:, table] if table < 4 else bags[table - 4][0])[-1] = bad
    with pytest.raises(IndexError, match=re.escape(f"id {bad} is outside table {table}, which has {ROWS[table]} rows")):
        packed(ids, bags)


@PATHS
def test_a_collection_whose_tables_have_one_width_after_all_is_an_ordinary_one(path):
    with on(path):
        for rows, bits in ((1, 4), (1000, 8)):
            one = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, small_table_bits=8, small_table_rows=rows)
            other = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, bits=bits, _weight=one.weight.detach())
            assert one.bits == bits
            assert torch.equal(one(*batch(9)), other(*batch(9)))
            assert type(convert(torch.nn.ModuleList([one]))[0]) is PackedEmbeddingBagCollection


def test_a_single_embedding_has_the_bits_of_its_rows():
    options = {"small_table_bits": 8, "small_table_rows": 10}
    assert [QuantEmbedding(rows, 3, **options).bits for rows in (9, 10)] == [8, 4]


def test_a_cast_and_a_loaded_model_keep_the_scales():
    tables, (ids, bags) = made("4 and 8"), batch(9)
    train(tables)
    other = made("4 and 8")
    other.load_state_dict(tables.state_dict())
    assert torch.equal(other.eval()(ids, bags), tables.eval()(ids, bags))
    half = copy.deepcopy(tables).bfloat16()
    assert half.weight_fake_quantizer._highest.dtype == torch.int32
    assert (half.scale >= tables.scale).all()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="small_table_rows is 5, but no small_table_bits"):
        QATConfig(small_table_rows=5)
    with pytest.raises(ValueError, match="small_table_bits is 3, expected one of 2, 4, 8, 16, 32"):
        QATConfig(small_table_bits=3)
    for rows in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=re.escape(f"small_table_rows is {rows!r}, expected a whole number")):
            QATConfig(small_table_bits=8, small_table_rows=rows)
    assert QATConfig(small_table_bits=8).small_table_rows == 10_000


def test_a_quantizer_that_knows_one_width_refuses_several(monkeypatch):
    class Own(WeightFakeQuantizer):
        pass

    monkeypatch.setitem(QUANTIZERS, "own", Own)
    with pytest.raises(
        ValueError, match="small_table_bits is 8, but the quantizer 'own' needs the same number of bits"
    ):
        made("4 and 8", quantizer="own")
