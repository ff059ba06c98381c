"""Layers that train with other bits than their own: the values in training are those of these bits, all others their
own's."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from quant.test_linear import check, make, random

QUANTIZERS = ["max", "mse", "percentile"]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 8, 16, 32])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_linear_layer_trains_with_these_bits_and_evaluates_with_its_own(quantizer, bits, granularity):
    layer = make(7, 5, bits=4, granularity=granularity, quantizer=quantizer)
    layer.train_with_bits(bits)
    check(layer, random(6, 7), bits=bits, granularity=granularity)
    own = make(7, 5, bits=4, granularity=granularity, quantizer=quantizer)
    assert torch.equal(layer.eval()(random(6, 7)), own.eval()(random(6, 7)))
    assert layer.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize("bias_bits", [4, 16])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_bias_is_quantized_with_its_weight(bits, bias_bits):
    layer = make(7, 5, bits=4, bias_bits=bias_bits)
    layer.train_with_bits(bits)
    check(layer, random(6, 7), bits=bits, bias_bits=32 if bits == 32 else bias_bits)
    layer.eval().zero_grad()
    check(layer, random(6, 7), bits=4, bias_bits=bias_bits)


@pytest.mark.parametrize("options", [{}, {"bias_bits": 8}, {"activation_bits": 8}, {"granularity": "tensor"}])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_fused_stack_is_that_of_layers_of_these_bits(bits, options, bf16):
    if bits == 32 and "bias_bits" in options:
        pytest.skip("a layer of 32 bits cannot be asked for that")

    def stack(bits):
        layers = [make(9, 8, 1, bits=bits, **options), nn.ReLU(), make(8, 3, 2, bits=bits, **options)]
        mlp = QuantMLP(*layers)
        mlp.bf16 = bf16
        return mlp

    staged, other, own = stack(4), stack(bits), stack(4)
    for layer in staged:
        if isinstance(layer, QuantLinear):
            layer.train_with_bits(bits)
    for x in (random(5, 9), random(1, 9), random(0, 9)):
        for mlp in (staged, other):
            mlp.zero_grad()
            mlp(x).sum().backward()
        assert torch.equal(staged(x), other(x))
        for mine, theirs in zip(staged.parameters(), other.parameters()):
            assert torch.equal(mine.grad, theirs.grad)
    if "activation_bits" not in options:  # whose range training has widened
        assert torch.equal(staged.eval()(random(5, 9)), own.eval()(random(5, 9)))


def collection(**options):
    tables = QuantEmbeddingBagCollection([5, 1, 40], 3, multi=[False, False, True], bits=4, **options)
    with torch.no_grad():
        tables.weight.copy_(random(46, 3, seed=1))
    return tables


IDS = torch.tensor([[0, 0], [4, 0], [0, 0]])
BAGS = [(torch.tensor([39, 3, 3]), torch.tensor([0, 1, 1]))]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"quantizer": name} for name in [*QUANTIZERS, "naive", "lsq"]]
    + [
        {"scale_period": 1},
        {"small_table_bits": 8, "small_table_rows": 10},
        {"forward_rounding": "stochastic"},
    ],
)
def test_tables_train_unquantized_and_are_evaluated_in_their_bits(options, sparse):
    tables, plain = collection(sparse=sparse, **options), QuantEmbeddingBagCollection(
        [5, 1, 40], 3, multi=[False, False, True], bits=32, sparse=sparse
    )  # fmt: skip
    plain.load_state_dict({"weight": tables.weight.detach()}, strict=False)
    tables.train_with_bits(32)
    for ids, bags in ((IDS, BAGS), (IDS[:0], [(BAGS[0][0][:0], BAGS[0][1][:0])])):
        for each in (tables, plain):
            each.zero_grad()
            (each(ids, bags) ** 2).sum().backward()
        assert torch.equal(tables(ids, bags), plain(ids, bags))
        assert torch.equal(tables.weight.grad.to_dense(), plain.weight.grad.to_dense())
    if options.get("quantizer") != "lsq":
        assert tables.clamps.take() == (0, 0)  # nothing is quantized, so nothing is clamped
    fresh = collection(sparse=sparse, **options)
    assert torch.equal(tables.eval()(IDS, BAGS), fresh.eval()(IDS, BAGS))
    assert not torch.equal(tables(IDS, BAGS), plain(IDS, BAGS))


@pytest.mark.parametrize("kind", [QuantEmbedding, QuantEmbeddingBag])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"quantizer": "mse"}])
def test_a_single_table_too(kind, sparse, options):
    table = kind(6, 3, bits=4, sparse=sparse, **options)
    plain = (nn.Embedding if kind is QuantEmbedding else nn.EmbeddingBag)(
        6, 3, sparse=sparse, **({"padding_idx": 0} if "padding_idx" in options else {})
    )
    plain.load_state_dict({"weight": table.weight.detach()})
    table.train_with_bits(32)
    ids = torch.tensor([[0, 5], [2, 2]])
    for each in (table, plain):
        each(ids).square().sum().backward()
    torch.testing.assert_close(table(ids), plain(ids), rtol=1e-6, atol=0)
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad.to_dense(), rtol=1e-6, atol=0)
    table.train_with_bits(None)
    assert not torch.equal(table(ids), plain(ids))


@pytest.mark.parametrize("period", ["rescan_period", "scale_period"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_scales_are_those_of_the_weights_when_quantization_begins(period, size):
    tables = collection(**{period: 1000})
    tables.only_looked_up_rows_change()
    tables.train_with_bits(32)
    tables(IDS, BAGS).sum().backward()
    with torch.no_grad():
        tables.weight.mul_(size)  # all of them: a scale of earlier rows would be too large or too small
    tables.train_with_bits(None)
    weight = ref.array(tables.weight)
    scale = ref.scale_from_max([abs(part).max() for part in np.split(weight, [5, 6])], 4)
    np.testing.assert_array_equal(ref.array(tables.scale), scale.astype(np.float64))
    values = ref.array(tables(IDS, BAGS))[:, 0]
    rows = weight[IDS[:, 0].numpy()]
    ref.assert_within(values, ref.fake_quantize(rows, scale[0], 4), 1e-6 * abs(rows) + ref.slack(rows, scale[0], 4))


def test_a_learned_scale_starts_from_the_trained_weights():
    layer = make(7, 5, bits=4, quantizer="lsq")
    layer.train_with_bits(32)
    layer(random(2, 7)).sum().backward()
    assert layer.weight_fake_quantizer.scale.grad is None
    with torch.no_grad():
        layer.weight.mul_(10)
    layer.train_with_bits(None)
    expected = 2 * abs(ref.array(layer.weight)).mean(1) / 7**0.5
    np.testing.assert_allclose(ref.array(layer.weight_fake_quantizer.scale), expected, rtol=1e-6)


def test_a_copy_trains_with_the_same_bits():
    layer = make(7, 5, bits=4)
    layer.train_with_bits(8)
    assert torch.equal(copy.deepcopy(layer)(random(2, 7)), layer(random(2, 7)))


def test_bits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="bits is 3, expected None or one of 2, 4, 8, 16, 32"):
        make(7, 5, bits=4).train_with_bits(3)
    with pytest.raises(ValueError, match="bits is 8, expected None or one of 32"):
        collection().train_with_bits(8)
    with pytest.raises(ValueError, match="bits is 8, but the layer is not quantized; expected None"):
        make(7, 5, bits=32).train_with_bits(8)
