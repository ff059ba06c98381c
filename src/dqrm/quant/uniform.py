"""The symmetric uniform quantizer: scale, codes, values.

With k bits, n = 2**(k-1) - 1 and, for weights w that share one scale (DQRM paper):

    scale = max(max|w|, 1e-8) / n        code = clamp(round(w / scale), -n - 1, n)        value = code * scale

`round` is half to even. The floor of 1e-8 gives an all-zero range a scale that yields zeros instead of NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqrm.quant.config import BITS

SMALLEST_MAXIMUM = 1e-8


def code_limits(bits: int) -> tuple[int, int]:
    """(lowest, highest) code of a signed `bits`-bit number: (-8, 7) for 4 bits.

    Raises:
        ValueError: `bits` is not 2, 4, 8 or 16.
    """
    if bits not in BITS or bits == 32:
        raise ValueError(
            f"bits is {bits!r}, expected 2, 4, 8 or 16 (32 means not quantized, and then there are no codes)"
        )
    n = 2 ** (bits - 1) - 1
    return -n - 1, n


def no_tensor(name: str, given: Any) -> str:
    """The message about an argument that is not a tensor."""
    what = f"a {type(given).__module__}.{type(given).__name__}".replace("builtins.", "")
    how = f"torch.from_numpy({name})" if type(given).__module__ == "numpy" else f"torch.tensor({name})"
    return f"{name} is {what}, expected a torch.Tensor" + ("" if given is None else f"; use {how}")


def check_floats(name: str, x: Any) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless its numbers are floating-point."""
    if not isinstance(x, Tensor):
        raise TypeError(no_tensor(name, x))
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, expected floating-point numbers such as torch.float32")


def check_dtype(name: str, x: Any, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless x is a tensor, ValueError unless it is of one of the dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(no_tensor(name, x))
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")


def check_bits(name: str, bits: int) -> None:
    """Raise ValueError, naming the argument, unless `bits` is 2, 4, 8, 16 or 32 (not quantized)."""
    if bits not in BITS:
        raise ValueError(f"{name} is {bits!r}, expected one of {', '.join(map(str, BITS))}")


def scale_from_max(max_abs: Tensor, bits: int) -> Tensor:
    """The scale of weights whose largest magnitude is `max_abs`: float32, same shape. NaN stays NaN."""
    return max_abs.float().clamp(min=SMALLEST_MAXIMUM) / code_limits(bits)[1]


def quantize(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Codes of `x` on `scale` (broadcast against x): int8, or int16 for 16 bits.

    Args:
        zero_point: int32, broadcast: the code of 0.0, which is added to round(x / scale); None: 0.

    Raises:
        ValueError: `bits` is not 2, 4, 8 or 16, or x is not a floating-point tensor.
    """
    check_floats("x", x)
    low, high = code_limits(bits)
    codes = (x.float() / scale).round_()
    codes = codes if zero_point is None else codes.add_(zero_point)
    return codes.clamp_(low, high).to(torch.int16 if bits == 16 else torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Values of `codes`, signed integers, on `scale` (broadcast): float32. `zero_point`: as of `quantize`.

    Raises:
        ValueError: codes of the wrong dtype.
    """
    check_dtype("codes", codes, torch.int8, torch.int16, torch.int32, torch.int64)
    return (codes.float() if zero_point is None else codes.float() - zero_point) * scale


def highest_codes(bits: Sequence[int]) -> Tensor:
    """The highest code of each of several bit widths: int32 [N]; of 32 bits, which have no codes, 0."""
    return torch.tensor([0 if one == 32 else code_limits(one)[1] for one in bits], dtype=torch.int32)


class _FakeQuantize(torch.autograd.Function):
    """dequantize(quantize(x)) forward; the straight-through estimator (STE) backward: the gradient passes unchanged."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, scale: Tensor, low: Any, high: Any, noise: Tensor | None, zero_point: Tensor | None
    ) -> Tensor:
        codes = x.float() / scale
        codes = codes.round_() if noise is None else codes.add_(noise).floor_()
        if zero_point is None:
            return codes.clamp_(low, high).mul_(scale).to(x.dtype)
        return codes.add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * 5


def fake_quantize(
    x: Tensor, scale: Tensor, bits: int, noise: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """`x` rounded to the values that its codes stand for; same shape and dtype.

    The gradient passes unchanged, also where a code was clamped (DQRM paper); `scale` gets none.
    With 32 bits `x` itself is returned.

    Args:
        noise: float32, as `x`, uniform between 0 and 1: rounds stochastically, floor(x / scale + noise). None: half to
            even.
        zero_point: int32, broadcast as `scale`: the code of 0.0; None: 0.

    Raises:
        ValueError: `bits` is not 2, 4, 8, 16 or 32, or x is not a floating-point tensor.
    """
    check_floats("x", x)
    if bits == 32:
        return x
    low, high = code_limits(bits)
    return _FakeQuantize.apply(x, scale.detach(), low, high, noise, zero_point)


def fake_quantize_groups(x: Tensor, scale: Tensor, highest: Tensor, noise: Tensor | None = None) -> Tensor:
    """`fake_quantize` of groups of several bit widths: x [..., groups, dim], scale float32 [groups].

    Args:
        highest: int32 [groups], as `highest_codes` gives them; where it is 0, `x` stays.
    """
    check_floats("x", x)
    high = highest[:, None].float()
    return torch.where(high == 0, x, _FakeQuantize.apply(x, scale.detach()[:, None], -high - 1, high, noise, None))
