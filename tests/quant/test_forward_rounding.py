"""Stochastic rounding in the forward passes of training: the formula, the same for any rank, nearest in evaluation."""

import copy

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.config import QUANTIZERS, QATConfig
from dqrm.quant.convert import convert
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.quantizer import WeightFakeQuantizer
from kernel_helpers import PATHS, on
from kernels.test_blocks import noise

ROWS, DIM = (7, 30, 5, 9), 5
MIXED = {"small_table_bits": 8, "small_table_rows": 8}
STOCHASTIC = {"forward_rounding": "stochastic"}


def uniform(rows, columns, width, seed, step):
    """The number between 0 and 1 of each (row, column)."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**32
    return np.array([[(noise(int(row) * width + column, mixed) + 0.5) / 2**16 for column in columns] for row in rows])


def rounded(x, scale, bits, u):
    if bits == 32:
        return x
    n = ref.levels(bits)
    return np.clip(np.floor(x / scale + u), -n - 1, n) * scale


def check(found, x, scale, bits, u):
    """Save where a quotient plus noise in float32 may be on the other side of a whole number: one step there."""
    expected, quotient = rounded(x, scale, bits, u), np.abs(x / scale) + 1
    near = np.abs(x / scale + u - np.rint(x / scale + u)) < np.maximum(1e-6, quotient * 2.0**-22)
    allowed = np.where(near & (bits != 32), scale, 0) + 1e-6 * np.abs(expected)
    assert bits == 16 or near.sum() <= 2 + 0.02 * x.size
    assert (np.abs(found - expected) <= allowed).all()


def collection(**options):
    torch.manual_seed(1)
    multi = [False, False, False, True]
    return QuantEmbeddingBagCollection(ROWS, DIM, multi=multi, _weight=torch.randn(sum(ROWS), DIM),
                                       **STOCHASTIC, **options)  # fmt: skip


def batch(samples):
    generator = torch.Generator().manual_seed(samples)
    ids = torch.stack([torch.randint(rows, (samples,), generator=generator) for rows in ROWS[:3]], 1)
    return ids, [(torch.randint(ROWS[3], (samples,), generator=generator), torch.arange(samples))]


@PATHS
@pytest.mark.parametrize("samples", [0, 1, 40])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 2}, {"bits": 16}, MIXED | {"bits": 32}, MIXED])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_tables_round_as_the_formula_says(path, samples, options, sparse):
    tables, (ids, bags) = collection(sparse=sparse, **options), batch(samples)
    tables.weight_fake_quantizer.rounding_seed = 77
    with on(path):
        for step in (1, 2, 3):
            tables.weight.grad = None
            out = tables(ids, bags)
            out.sum().backward()
            assert tables.scale_ticks == step
            starts = np.cumsum([0, *ROWS])
            for number, bits in enumerate(tables.table_bits):
                rows = starts[number] + (ids[:, number] if number < 3 else bags[0][0]).numpy()
                x = ref.array(tables.weight)[rows]
                check(ref.array(out[:, number]), x, tables.scale[number].item(), bits,
                      uniform(rows, range(DIM), DIM, 77, step).reshape(x.shape))  # fmt: skip
    rows = torch.cat([ids + torch.tensor([0, 7, 37]), 42 + bags[0][0][:, None]], 1)
    expected = torch.zeros(sum(ROWS)).index_add_(0, rows.view(-1), torch.ones(rows.numel()))
    assert torch.equal(tables.weight.grad.to_dense(), expected[:, None].expand(-1, DIM))


@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_single_tables_round_as_the_formula_says(kind, sparse):
    torch.manual_seed(0)
    table, ids = kind(20, DIM, sparse=sparse, **STOCHASTIC), torch.randint(20, (13,))
    out = table(ids) if kind is QuantEmbedding else table(ids[:, None])
    x = ref.array(table.weight)[ids.numpy()]
    check(ref.array(out), x, table.scale.item(), 4, uniform(ids.numpy(), range(DIM), DIM, 0, 1))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_linear_layers_round_as_the_formula_says(granularity, bits):
    torch.manual_seed(0)
    layer = QuantLinear(6, 9, bias=False, bits=bits, granularity=granularity, **STOCHASTIC)
    for step in (1, 2):
        found = ref.array(layer(torch.eye(6))).T
        weight = ref.array(layer.weight)
        if bits == 32:
            np.testing.assert_array_equal(found, weight)
            continue
        scale = ref.array(layer.current_scale())[:, None]
        u = uniform(range(9), range(6), 6, 0, step)
        for row in range(9):
            check(found[row], weight[row], float(scale[row if len(scale) > 1 else 0, 0]), bits, u[row])
        layer.zero_grad()
        layer(
            torch.eye(6),
        ).sum().backward()  # the gradient passes unchanged
        assert torch.equal(layer.weight.grad, torch.ones(9, 6))
        layer.weight_fake_quantizer.scale_ticks = step


def test_the_mean_over_steps_is_the_weight():
    torch.manual_seed(0)
    table, ids = QuantEmbedding(30, 4, **STOCHASTIC), torch.arange(30)
    found = torch.stack([table(ids).detach() for _ in range(400)]).double()
    off = (found.mean(0) - table.weight.detach()).abs() / table.scale
    assert off.max() < 5 * 0.5 / 400**0.5  # five standard errors of at most half a step each
    nearest = (table.eval()(ids).detach() - table.weight.detach()).abs() / table.scale
    assert nearest.max() > 0.4
    assert found.std(0).max() > 0.3 * table.scale


@PATHS
def test_evaluation_and_packed_tables_round_to_the_nearest(path):
    with on(path):
        tables, layer = collection(**MIXED), QuantLinear(6, 3, **STOCHASTIC)
        plain = copy.deepcopy(tables)
        tables(*batch(9))
        assert not torch.equal(tables(*batch(9)), plain.eval()(*batch(9)))
        out = tables.eval()(*batch(9))
        nearest = QuantEmbeddingBagCollection(ROWS, DIM, multi=tables.multi, _weight=tables.weight.detach(), **MIXED)
        assert torch.equal(out, nearest.eval()(*batch(9)))
        packed = convert(torch.nn.ModuleList([tables, layer]))
        assert torch.equal(packed[0](*batch(9)), out)


def test_a_loop_of_ones_own_resumes_bit_for_bit():
    """The count of training steps is in the state dict."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(QuantEmbedding(20, 4, **STOCHASTIC), QuantLinear(4, 3, **STOCHASTIC))
    ids = torch.arange(7)
    for _ in range(3):
        model(ids)
    other = copy.deepcopy(model)
    assert "1.weight_fake_quantizer.scale_ticks" in model.state_dict()
    fresh = torch.nn.Sequential(QuantEmbedding(20, 4, **STOCHASTIC), QuantLinear(4, 3, **STOCHASTIC))
    fresh.load_state_dict(model.state_dict())
    expected = model(ids)
    assert torch.equal(fresh(ids), expected)
    assert torch.equal(other(ids), expected)
    assert not torch.equal(model(ids), expected)
    assert "scale_ticks" not in "".join(QuantLinear(4, 3).state_dict())


def test_what_rounds_by_itself_and_what_does_not_exist_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="forward_rounding is 'up', expected 'nearest' or 'stochastic'"):
        QATConfig(forward_rounding="up")

    class Own(WeightFakeQuantizer):
        pass

    monkeypatch.setitem(QUANTIZERS, "own", Own)
    with pytest.raises(ValueError, match="'stochastic', but the quantizer 'own' rounds to the nearest"):
        QuantEmbedding(5, 3, quantizer="own", **STOCHASTIC)
