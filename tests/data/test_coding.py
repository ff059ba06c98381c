"""Codes of numbers against numpy's own."""

import numpy as np
import pytest

from dqrm.data.coding import code_numbers

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize(
    "numbers",
    [
        np.array([7], np.uint32),
        np.array([5, 5, 5], np.uint32),
        np.array([2**32 - 1, 0, 2**31, 0, 2**32 - 1], np.uint32),
        DRAW.integers(0, 256, 3000, dtype=np.uint32),
        DRAW.integers(0, 257, 3000, dtype=np.uint32),
        DRAW.integers(0, 2**32, 70_000, dtype=np.uint32),
    ],
    ids=["one", "equal", "ends", "256", "257", "many"],
)
def test_codes_are_numpys(numbers):
    keys, codes = code_numbers(numbers)
    wanted, inverse = np.unique(numbers, return_inverse=True)
    assert keys.to_numpy().tolist() == wanted.tolist()
    assert codes.tolist() == inverse.tolist()
    assert codes.dtype == np.min_scalar_type(len(wanted) - 1)
