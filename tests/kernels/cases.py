"""Calls of the operations on inputs of all kinds, which `test_operations.py` makes on each backend: their list."""

import pytest
import torch

from kernel_helpers import ODD, here
from selection import pairwise

FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
CASES = []


def case(*grid, rtol=0.0, atol=0.0):
    """The function named as the operation gives all that the operation gives or writes, for each point of the grid."""

    def add(function):
        quick = set(pairwise(grid))
        for number, point in enumerate(grid):
            name = "-".join(getattr(value, "__name__", str(value)) for value in (function, *point))
            marks = () if number in quick else pytest.mark.product
            CASES.append(pytest.param(function, point, (rtol, atol), id=name, marks=marks))
        return function

    return add


def odd(*shape, dtype=FP32, seed=1):
    choice = torch.randint(len(ODD), shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return torch.tensor(ODD)[here(choice)].to(dtype)
