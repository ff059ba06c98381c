"""PACT against the formulas of its paper in float64: values, gradients, where alpha starts; layers with it."""

import copy

import pytest
import torch
from torch import nn

import dqrm
import reference as ref
from dqrm.quant.learned import PACT
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mlp import QuantMLP
from learned_helpers import check, double, far, passing, weights_on

BITS = pytest.mark.parametrize("bits", ref.BITS)


def pact(x, alpha, levels):
    """PACT (arXiv 1805.06085), equations 1 to 3, for x >= 0 on so many levels above 0."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    return passing((y * levels / alpha).round() * alpha / levels, y)


@BITS
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (0, 3), (4, 3, 2)])
def test_pact_has_the_papers_values_and_gradients(bits, shape):
    """For inputs of at least 0, on the levels of signed codes."""
    alpha, levels = 1.7, ref.levels(bits)
    x = weights_on(alpha / levels, bits, *shape, seed=bits).abs()
    module = PACT(bits)
    far(module.maximum, alpha)
    x.requires_grad_()
    out = module(x)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    (out * grad).sum().backward()
    wide, a = double(x), double(torch.tensor(alpha))
    expected = pact(wide, a, levels)
    (expected * grad).sum().backward()
    check(out, expected)
    check(x.grad, wide.grad)
    if out.numel():
        check(module.maximum.grad, a.grad, 1e-4)


def test_pact_below_0_clips_at_the_lowest_code():
    module = PACT(4)
    far(module.maximum, 0.7)
    x = torch.tensor([-5.0, -0.8, -0.33, 0.7, 9.0], requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out, torch.tensor([-0.8, -0.8, -0.3, 0.7, 0.7]))
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [0, 0, 100, 0, 0]
    assert module.maximum.grad.item() == pytest.approx(11000 - 11 * 8 / 7)


def test_alpha_starts_from_the_first_batch_that_has_one_and_stays_above_0():
    module = PACT(8)
    assert torch.equal(module(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert module(torch.zeros(0, 2)).shape == (0, 2)
    with pytest.raises(ValueError, match="their range is unknown before a training step"):
        module.scale()
    torch.testing.assert_close(module.eval()(torch.tensor([2.0])), torch.tensor([2.0]))  # of this batch, not kept
    assert module.maximum == 0
    module.train()(torch.tensor([-3.0, 1.0]))
    assert module.maximum == 3
    module(torch.tensor([50.0]))
    assert module.maximum == 3  # learned from here on
    far(module.maximum)
    assert module.scale() == pytest.approx(1.5 / 127)
    far(module.maximum)
    assert module.state_dict()["maximum"] == 1.5
    assert copy.deepcopy(module).double().maximum.dtype == torch.float32


def test_a_layer_with_pact_trains_saves_and_packs():
    torch.manual_seed(0)
    options = {"activation_bits": 4, "activation_quantizer": "pact", "quantizer": "lsq"}
    model = QuantMLP(QuantLinear(6, 8, **options), nn.ReLU(), QuantLinear(8, 2, **options))
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if "activation" in name} == {
        "0.activation_fake_quantizer.maximum", "2.activation_fake_quantizer.maximum",
    }  # fmt: skip
    optimizer = torch.optim.SGD(parameters.values(), 0.05)
    x, y = torch.randn(40, 6), torch.randn(40, 2)
    starts = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        starts.append(model[2].activation_max.item())
    assert len(set(starts)) > 10  # alpha learns
    other = QuantMLP(QuantLinear(6, 8, **options), nn.ReLU(), QuantLinear(8, 2, **options))
    other.load_state_dict(model.state_dict())
    expected = model.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(dqrm.convert(model)(x), expected)
    other.load_state_dict({name: value for name, value in other.state_dict().items() if "fake" not in name})
    assert other[0].activation_max == 0  # an unquantized model's weights: the range starts again


def test_ranges_of_before_there_was_a_child_load():
    layer, other = QuantLinear(3, 2, activation_bits=8), QuantLinear(3, 2, activation_bits=8)
    layer(torch.tensor([[5.0, -1.0, 0.0]]))
    new, old = "activation_fake_quantizer.maximum", "activation_max"
    state = {name.replace(new, old): value for name, value in layer.state_dict().items()}
    assert "activation_max" in state
    other.load_state_dict(state)
    assert other.activation_max == 5
