"""Whole training steps against float64 and each other, in compiled code and in plain torch."""

import pytest
import torch

import reference as ref
from conftest import tiny
from dqrm.config import ModelConfig
from dqrm.models.dlrm import DLRM
from dqrm.training.step import TrainStep
from training.test_bf16 import MODELS, error, make_batch
from training.test_bf16 import build as make_model

SMALL = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))


# ---- against float64


@pytest.mark.parametrize("name", MODELS)
def test_a_step_moves_every_parameter_as_float64_autograd_says(path, name):
    model = make_model(name, precision="fp32")
    step, batch = TrainStep(model, tiny()), make_batch(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = step.forward(batch)
    _, exact_loss, gradients = ref.dlrm(model, batch.dense, batch.ids, batch.bags, batch.labels)
    assert float(loss.detach()) == pytest.approx(float(exact_loss), rel=1e-6)
    step.backward(loss)
    step.update(0.5)
    for parameter_name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[parameter_name]) < 1e-5, parameter_name
        expected = before[parameter_name].double() - 0.5 * gradients[parameter_name]
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6, msg=parameter_name)


def losses_of_20_steps(name="bags", precision="fp32", **options):
    torch.manual_seed(0)
    model = make_model(name, precision=precision, **options)
    step = TrainStep(model, tiny(period=3))
    losses = [float(step(make_batch(model, 128, seed), 0.1)) for seed in range(20)]
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16", "table_dtype": torch.bfloat16}], ids=["fp32", "bf16"])
def test_two_runs_are_the_same_bit_for_bit(path, options):
    one, two = losses_of_20_steps(**options), losses_of_20_steps(**options)
    assert one[0] == two[0]
    assert one[0][-1] < one[0][0]
    for a, b in zip(one[1], two[1]):
        assert torch.equal(a, b)


# ---- what a module of layers promises besides speed


def small_batch():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10).view(5, 2) % 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_cast_to_another_dtype_still_predicts(path, dtype):
    model, (dense, ids) = DLRM(3, [7, 9], config=SMALL).eval(), small_batch()
    expected = model(dense, ids)
    found = model.to(dtype)(dense.to(dtype), ids)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


def test_autocast_trains(path):
    model, (dense, ids) = DLRM(3, [7, 9], config=SMALL), small_batch()
    expected = model(dense, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(dense, ids)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooks_of_the_layers_are_called(path):
    model, seen = DLRM(3, [7, 9], config=SMALL), []
    for layer in [*model.bottom, *model.top]:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    model(*small_batch())
    assert seen == [*model.bottom, *model.top]


def test_a_layer_put_in_place_of_another_is_used(path):
    model = DLRM(3, [7, 9], config=SMALL)
    model.top[2] = torch.nn.Linear(8, 1)
    with torch.no_grad():
        model.top[2].weight.zero_()
        model.top[2].bias.fill_(3)
    out = model(*small_batch())
    assert out.shape == (5,)
    assert (out == 3).all()
