"""The symmetric uniform quantizer: scale, codes, values. The only place in the package that rounds a number.

With k bits, n = 2**(k-1) - 1 and, for weights w that share one scale (DQRM paper):

    scale = max(max|w|, 1e-8) / n        code = clamp(round(w / scale), -n - 1, n)        value = code * scale

`round` is half to even. The floor of 1e-8 gives an all-zero range a scale that yields zeros instead of NaN.
"""

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


def check_bits(name: str, bits: int) -> None:
    """Raise ValueError, naming the argument, unless `bits` is 2, 4, 8, 16 or 32 (not quantized)."""
    if bits not in BITS:
        raise ValueError(f"{name} is {bits!r}, expected one of {', '.join(map(str, BITS))}")


def scale_from_max(max_abs: Tensor, bits: int) -> Tensor:
    """The scale of weights whose largest magnitude is `max_abs`: float32, same shape. NaN stays NaN."""
    return max_abs.float().clamp(min=SMALLEST_MAXIMUM) / code_limits(bits)[1]


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of `x` on `scale` (broadcast against x): int8, or int16 for 16 bits.

    Raises:
        ValueError: `bits` is not 2, 4, 8 or 16.
    """
    low, high = code_limits(bits)
    return (x.float() / scale).round_().clamp_(low, high).to(torch.int16 if bits == 16 else torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of integer `codes` on `scale` (broadcast): float32."""
    return codes.float() * scale


class _FakeQuantize(torch.autograd.Function):
    """dequantize(quantize(x)) forward; the straight-through estimator (STE) backward: the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return (x.float() / scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`x` rounded to the values that its codes stand for; same shape and dtype.

    The gradient passes unchanged, also where a code was clamped (DQRM paper); `scale` gets none.
    With 32 bits `x` itself is returned.

    Raises:
        ValueError: `bits` is not 2, 4, 8, 16 or 32.
    """
    if bits == 32:
        return x
    low, high = code_limits(bits)
    return _FakeQuantize.apply(x, scale.detach(), low, high)
