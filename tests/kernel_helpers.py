"""The compiled kernels beside plain torch: both paths, odd numbers, and inputs for them."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from dqrm import kernels
from dqrm.quant.embedding import QuantEmbeddingBagCollection

NATIVE = pytest.mark.skipif(not kernels.native(), reason="the kernels cannot be built here")
PATHS = pytest.mark.parametrize("path", [pytest.param("native", marks=NATIVE), "plain"])
ODD = [0.0, -0.0, 1e-45, 1e-30, -1e-8, 1.0, -1e30, 3.4e38, float("inf"), -float("inf"), float("nan")]

ROW_GRADIENTS = {
    "none": (torch.zeros(0, dtype=torch.int64), 3),
    "one": (torch.tensor([4]), 16),
    "all the same": (torch.full((129,), 7), 17),
    "hot row": (torch.where(torch.arange(700) % 3 > 0, 5, torch.arange(700)), 3),
    "random": (torch.randint(40, (500,), generator=torch.Generator().manual_seed(3)), 16),
    "wide": (torch.randint(900, (600,), generator=torch.Generator().manual_seed(4)), 64),
    "falling": (torch.arange(300).flip(0), 1),
}


@contextmanager
def on(path):
    """Run in compiled code, or as on a machine without a compiler."""
    backends = [backend for backend in kernels.BACKENDS if path == "native" or backend is kernels.plain]
    with patch.object(kernels, "BACKENDS", backends):
        yield


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(one, two):
    """The same numbers, NaN for NaN."""
    assert (one is None) == (two is None)
    if one is None:
        return
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    assert torch.equal(torch.isnan(one), torch.isnan(two))
    assert torch.equal(torch.where(torch.isnan(one), 0, one), torch.where(torch.isnan(two), 0, two))


def both(function):
    """What `function` gives natively, after it gave the same in plain torch."""
    with on("plain"):
        plain = function()
    with on("native"):
        native = function()
    for one, two in zip(plain, native, strict=True):
        same(one, two)
    return native


def here(tensor):
    """On the device on which new tensors are made now."""
    return tensor.to(torch.get_default_device())


def random_rows(rows, dim, seed=0, dtype=torch.float32):
    return here(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype))


def collection(table_rows, dim, *, odd=False, dtype=torch.float32, **options):
    weight = random_rows(sum(table_rows), dim, seed=dim)
    if odd:
        choice = torch.randint(len(ODD), weight.shape, generator=torch.Generator().manual_seed(1))
        weight = torch.tensor(ODD)[choice]
    return QuantEmbeddingBagCollection(table_rows, dim, _weight=weight.to(dtype), **options)


def random_ids(table_rows, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(rows, (batch,), generator=generator, device="cpu") for rows in table_rows]
    return here(torch.stack(columns, 1).to(dtype))
