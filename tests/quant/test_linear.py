"""QuantLinear against the float64 reference: weights per channel and per tensor, biases, activations."""

import numpy as np
import pytest
import torch
from torch import nn

import reference as ref
from dqrm.quant.linear import QuantLinear

ALL_BITS = [*ref.BITS, 32]
GRANULARITIES = ["channel", "tensor"]
DENORMAL = 1e-44  # below the normal numbers float32 has an absolute step, 1.4e-45


def make(inputs, outputs, seed=0, factor=1.0, **options):
    module = QuantLinear(inputs, outputs, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * factor)
    return module


def random(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_scale(module, bits, granularity):
    """[out, 1] or [1, 1], from the float32 weights of now."""
    size = abs(module.weight.detach().numpy())
    return ref.scale_from_max(size.max(axis=1 if granularity == "channel" else (0, 1), keepdims=True), bits)


def check(module, x, *, bits, granularity="channel", bias_bits=32):
    """Forward and gradients equal the reference's at the quantized weights."""
    x = x.requires_grad_()
    out = module(x)
    scale = weight_scale(module, bits, granularity) if bits < 32 else None
    weight = ref.array(module.weight)
    values, ties = ref.fake_quantize(weight, scale, bits), ref.slack(weight, scale, bits)
    bias = np.zeros(weight.shape[0])
    if module.bias is not None:
        bias_scale = None if bias_bits == 32 else np.broadcast_to(scale, (weight.shape[0], 1))[:, 0]
        bias = ref.fake_quantize(ref.array(module.bias), bias_scale, bias_bits)
    inputs = ref.array(x)
    tolerance = abs(inputs) @ (2e-6 * abs(values) + ties).T + 1e-6 * abs(bias) + DENORMAL
    ref.assert_within(ref.array(out), inputs @ values.T + bias, tolerance)

    grad_out = random(*out.shape, seed=8)
    out.backward(grad_out)
    grads = ref.array(grad_out)
    flat_grads, flat_inputs = grads.reshape(-1, weight.shape[0]), inputs.reshape(-1, weight.shape[1])
    ref.assert_within(ref.array(x.grad), grads @ values, abs(grads) @ (2e-6 * abs(values) + ties) + DENORMAL)
    tolerance = 2e-6 * (abs(flat_grads).T @ abs(flat_inputs))
    ref.assert_within(ref.array(module.weight.grad), flat_grads.T @ flat_inputs, tolerance)
    if module.bias is not None:
        tolerance = 2e-6 * abs(flat_grads).sum(axis=0)
        ref.assert_within(ref.array(module.bias.grad), flat_grads.sum(axis=0), tolerance)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (7, 1), (13, 17), (64, 3)])
def test_step_equals_the_reference(bits, granularity, bias, inputs, outputs):
    module = make(inputs, outputs, bias=bias, bits=bits, granularity=granularity)
    check(module, random(9, inputs), bits=bits, granularity=granularity)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6), (2, 0, 6)])
def test_any_shape_of_batch(bits, shape):
    check(make(6, 4, bits=bits), random(*shape), bits=bits)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("factor", [1e-41, 1e-25, 1e-3, 1e25])
def test_extreme_weights(bits, granularity, factor):
    check(
        make(5, 3, factor=factor, bits=bits, granularity=granularity), random(4, 5), bits=bits, granularity=granularity
    )


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_zero_channel_gives_its_bias(bits, granularity):
    module = make(5, 3, bits=bits, granularity=granularity)
    with torch.no_grad():
        module.weight[1] = 0
    out = module(random(4, 5))
    assert torch.isfinite(out).all()
    assert torch.equal(out[:, 1], module.bias[1].expand(4))
    check(module, random(4, 5), bits=bits, granularity=granularity)


def test_per_channel_keeps_a_small_channel_that_per_tensor_loses():
    weight = torch.tensor([[7000.0, 1000.0], [7.0, 3.0]])
    channel, tensor = (QuantLinear(2, 2, bias=False, bits=4, granularity=g) for g in GRANULARITIES)
    for module in (channel, tensor):
        module.load_state_dict({"weight": weight}, strict=False)
    assert torch.equal(channel(torch.eye(2)).t(), weight)
    assert torch.equal(tensor(torch.eye(2)).t(), torch.tensor([[7000.0, 1000.0], [0.0, 0.0]]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_scale_follows_the_weights_at_every_forward(training):
    module = make(6, 4, bits=4).train(training)
    for factor in (1.0, 10.0, 0.01):
        with torch.no_grad():
            module.weight.mul_(factor)
        check(module, random(3, 6), bits=4)
        module.zero_grad()


# --- biases


@pytest.mark.parametrize("bias_bits", ref.BITS)
@pytest.mark.parametrize("bits", ref.BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantized_biases_equal_the_reference(bias_bits, bits, granularity):
    """Weights of 0.1 and biases of 1 saturate most biases at low widths; the gradient passes all the same."""
    module = make(6, 9, bits=bits, granularity=granularity, bias_bits=bias_bits)
    with torch.no_grad():
        module.weight.mul_(0.1)
    x = random(4, 6)
    size = abs(module.weight.detach().numpy()).max(axis=1 if granularity == "channel" else None, keepdims=True)
    scale = np.broadcast_to(ref.scale_from_max(size, bits), (9, 1))[:, 0]
    assert not ref.near_tie(ref.array(module.bias), scale, bias_bits).any(), "choose another seed"
    check(module, x, bits=bits, granularity=granularity, bias_bits=bias_bits)


def test_a_bias_beyond_its_rows_weights_saturates():
    module = QuantLinear(1, 3, bits=4, bias_bits=4)
    with torch.no_grad():
        module.weight.fill_(7.0)
        module.bias.copy_(torch.tensor([50.0, -50.0, 2.6]))
    assert module(torch.zeros(1, 1)).tolist() == [[7.0, -8.0, 3.0]]


def test_biases_stay_float_by_default():
    module = make(3, 4, bits=2)
    assert torch.equal(module(torch.zeros(2, 3)), module.bias.expand(2, 4))


# --- activations


def activation_reference(x, max_abs, bits):
    return torch.from_numpy(ref.fake_quantize(x.numpy(), ref.scale_from_max(max_abs, bits), bits)).float()


@pytest.mark.parametrize("bits", ref.BITS)
def test_activations_use_a_running_maximum(bits):
    module, plain = make(5, 3, bits=32, activation_bits=bits), make(5, 3, bits=32)
    maximum = 0.0
    for seed, factor in enumerate((1.0, 0.5, 3.0, 0.1)):
        x = random(7, 5, seed=10 * bits + seed) * factor
        maximum = max(maximum, x.abs().max().item())
        assert not ref.near_tie(x.numpy(), ref.scale_from_max(maximum, bits), bits).any(), "choose another seed"
        torch.testing.assert_close(module(x), plain(activation_reference(x, maximum, bits)))
        assert module.activation_max.item() == pytest.approx(maximum, rel=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_evaluation_keeps_the_maximum_and_clamps(bits):
    module, plain = make(5, 3, bits=4, activation_bits=bits), make(5, 3, bits=4)
    module(torch.tensor([[2.0, -1.0, 0.0, 0.5, 0.1]]))
    x = torch.tensor([[80.0, -80.0, 0.3, 2.0, -2.0]])
    out = module.eval()(x)
    assert module.activation_max.item() == 2.0
    torch.testing.assert_close(out, plain(activation_reference(x, 2.0, bits)))


def test_gradient_passes_quantized_activations_also_beyond_the_clamp():
    module = make(2, 3, bits=32, activation_bits=4)
    module(torch.tensor([[1.0, -1.0]]))
    x = torch.tensor([[50.0, -0.2]], requires_grad=True)
    module.eval()(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.detach().sum(dim=0, keepdim=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_activations_of_zeros_and_of_nothing(shape):
    module = make(5, 3, bits=4, activation_bits=8)
    assert torch.equal(module(torch.zeros(shape)), module.bias.expand(shape[0], 3))


def test_the_activation_maximum_is_saved():
    module, other = make(5, 3, bits=4, activation_bits=8), make(5, 3, bits=4, activation_bits=8)
    x = random(7, 5)
    expected = module(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.eval()(x), expected)
    assert other.activation_max.item() == module.activation_max.item()


# --- a drop-in


def test_32_bits_are_the_parent():
    torch.manual_seed(0)
    parent = nn.Linear(6, 4)
    torch.manual_seed(0)
    module = QuantLinear(6, 4, bits=32)
    x = random(5, 6)
    assert isinstance(module, nn.Linear)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert torch.equal(module(x), parent(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0)])
def test_layers_without_inputs_or_outputs(inputs, outputs, granularity):
    module = make(inputs, outputs, bits=4, granularity=granularity)
    assert torch.equal(module(torch.ones(2, inputs)), module.bias.expand(2, outputs))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 3}, "3"),
        ({"bits": 0}, "0"),
        ({"granularity": "row"}, "row"),
        ({"bias_bits": 5}, "bias_bits"),
        ({"activation_bits": 7}, "activation_bits"),
    ],
)
def test_wrong_arguments_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        QuantLinear(2, 3, **options)


def test_quantized_training_fits_a_line():
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    target = x @ torch.tensor([[1.0], [-0.5], [0.25], [2.0]]) + 0.3
    model = nn.Sequential(QuantLinear(4, 16, bits=4), nn.ReLU(), QuantLinear(16, 1, bits=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
