"""Every operation on every backend that is registered, against plain torch; and how a backend is chosen."""

import inspect
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dqrm import kernels
from dqrm.kernels import plain
from kernel_helpers import NATIVE, random_rows, same, threads
from kernels import table_cases, tier_cases  # noqa: F401 (list their cases)
from kernels.cases import CASES
from kernels.layer_cases import blocks_and_values, message_of, nibbles


def name_of(backend):
    return backend.__name__.rpartition(".")[2]


def close(one, two, tolerance):
    if one is None or tolerance == (0, 0):
        same(one, two)
    else:
        torch.testing.assert_close(one, two, rtol=tolerance[0], atol=tolerance[1], equal_nan=True)


@pytest.mark.parametrize("backend", [backend for backend in kernels.BACKENDS if backend is not plain], ids=name_of)
@pytest.mark.parametrize(("function", "point", "tolerance"), CASES)
def test_a_backend_gives_what_plain_torch_gives(backend, function, point, tolerance):
    with torch.device(getattr(backend, "DEVICE", "cpu")):
        with patch.object(kernels, "BACKENDS", [backend]):
            found = function(*point)
        with patch.object(kernels, "BACKENDS", []):
            expected = function(*point)
    for one, two in zip(found or (), expected or (), strict=True):
        close(one, two, tolerance)


@pytest.mark.parametrize("backend", kernels.BACKENDS, ids=name_of)
def test_operations_have_the_arguments_that_their_list_says(backend):
    for name, listed in kernels.OPERATIONS.items():
        if hasattr(backend, name):
            assert inspect.signature(getattr(backend, name)) == inspect.signature(listed), name
    assert all(hasattr(plain, name) for name in kernels.OPERATIONS)
    assert {param.values[0].__name__.rstrip("_") for param in CASES} == set(kernels.OPERATIONS)


def calls(function, point):
    """What `takes` is asked while the function runs."""
    asked = []
    spy = SimpleNamespace(takes=lambda *arguments: asked.append(arguments))
    with patch.object(kernels, "BACKENDS", [spy]):
        function(*point)
    return asked


@NATIVE
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_the_cpu_backend_takes_what_its_code_can_read_and_nothing_else(name):
    """Else it would read or write other memory."""
    points = [param.values[:2] for param in CASES if param.values[0].__name__ == name]
    taken = [asked for asked in calls(*points[-1]) + calls(*points[len(points) // 2]) if asked[0] == name]
    assert any(kernels.cpu.takes(*asked) for asked in taken)
    for _, *tensors in taken:
        for position, tensor in enumerate(tensors):
            if tensor is None or isinstance(tensor, kernels.Tiers) or tensor.numel() < 2:
                continue
            spaced = torch.stack([tensor, tensor], -1)[..., 0]
            for other in (spaced, tensor.double(), tensor.to("meta"), tensor.clone().as_subclass(Other)):
                assert not kernels.cpu.takes(name, *tensors[:position], other, *tensors[position + 1 :]), position


class Other(torch.Tensor):
    pass


def test_a_backend_from_outside_computes_what_it_takes():
    took = []

    def takes(operation, *tensors):
        return operation in ("pack_nibbles", "block_scales") and all(t is None or t.is_cpu for t in tensors)

    def pack_nibbles(codes):
        took.append("pack_nibbles")
        return plain.pack_nibbles(codes)

    def block_scales(x, blocks, bits, residual=None):
        took.append("block_scales")
        return plain.block_scales(x, blocks, bits, residual)

    mine = SimpleNamespace(takes=takes, pack_nibbles=pack_nibbles, block_scales=block_scales)
    with patch.object(kernels, "BACKENDS", [mine, *kernels.BACKENDS]):
        codes = kernels.unpack_nibbles(kernels.pack_nibbles(nibbles(17)), 17)  # the second by another backend
        assert kernels.choose("unpack_nibbles", codes) is not mine
        (message, _), *_ = message_of(kernels.encode_rows, 9, False, (torch.int8, 4), None)
        kernels.block_scales(*blocks_and_values("ragged", False, random_rows)[:2], 4)
    assert torch.equal(codes, nibbles(17))
    assert took == ["pack_nibbles", "block_scales"]
    assert len(message) > 4


def test_a_traced_model_takes_plain_torch():
    chosen = []

    def forward(x):
        chosen.append(kernels.choose("quantize_weights", x))
        return x + 1

    torch.jit.trace(forward, torch.zeros(2, 2), check_trace=False)
    with patch("torch.compiler.is_compiling", lambda: True):
        forward(torch.zeros(2, 2))
    assert chosen == [plain, plain]


@NATIVE
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_any_number_of_threads_gives_the_same_bits(name):
    points = [param.values[:2] for param in CASES if param.values[0].__name__ == name]
    for function, point in points[:: max(1, len(points) // 10)]:
        with threads(1):
            expected = function(*point)
        with threads(3):
            for one, two in zip(function(*point), expected, strict=True):
                same(one, two)
