"""Straight-through pieces of the formulas of LSQ and PACT in float64, and weights to try them on; nothing of dqrm."""

import torch

import reference as ref


def passing(value, gradient):
    """`value`, whose gradient is that of `gradient`."""
    return (value - gradient).detach() + gradient


def double(tensor):
    return tensor.detach().double().requires_grad_()


def weights_on(step, bits, *shape, seed=0, beyond=1.3):
    """Float32 weights that are away from ties on the step [..., 1], some of them clamped."""
    random = torch.Generator().manual_seed(seed)
    reach = (ref.levels(bits) + 1) * beyond
    codes = ((torch.rand(shape, generator=random) * 2 - 1) * reach).round()
    return ((codes + (torch.rand(shape, generator=random) - 0.5) * 0.8) * step).float()


def check(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.detach(), rtol=tolerance, atol=tolerance)


def far(parameter, value=-100.0):
    with torch.no_grad():
        parameter.fill_(value)
