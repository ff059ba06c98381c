"""A linear layer whose weight is quantized each time it is used."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm.quant.uniform import check_bits, fake_quantize, scale_from_max


class QuantLinear(nn.Linear):
    """`nn.Linear` on a fake-quantized weight: one scale per output channel, recomputed each forward (it is small).

    forward: float [..., in_features] -> float [..., out_features]. From the DQRM paper. The bias stays FP32 by
    default: on the scale of its weight row, as in the DQRM reference, a bias beyond 8/7 of the row's largest weight
    saturates.

    Args:
        bits: 2, 4, 8, 16, or 32 for no quantization of the weight.
        granularity: 'channel' (one scale per output row) or 'tensor' (one for the whole weight).
        bias_bits: below 32, the bias is quantized on its weight row's scale.
        activation_bits: below 32, the input is quantized on the largest magnitude that training has shown so far.

    Raises:
        ValueError: another number of bits or another granularity.
    """

    bits: int
    activation_max: Tensor

    def __init__(
        self,
        *args: Any,
        bits: int = 4,
        granularity: str = "channel",
        bias_bits: int = 32,
        activation_bits: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_quantization(bits, granularity, bias_bits, activation_bits)

    def _init_quantization(self, bits: int, granularity: str, bias_bits: int, activation_bits: int) -> None:
        if granularity not in ("channel", "tensor"):
            raise ValueError(f"granularity is {granularity!r}, expected 'channel' or 'tensor'")
        for name, width in (("bits", bits), ("bias_bits", bias_bits), ("activation_bits", activation_bits)):
            check_bits(name, width)
        if bias_bits != 32 and bits == 32:
            raise ValueError(
                f"bias_bits is {bias_bits}, but a bias has a scale only where the weight has one (bits is 32)"
            )
        self.bits, self.granularity, self.bias_bits, self.activation_bits = (
            bits,
            granularity,
            bias_bits,
            activation_bits,
        )
        if activation_bits != 32:
            self.register_buffer("activation_max", torch.zeros((), device=self.weight.device))

    def weight_scale(self) -> Tensor:
        """Scale of the weight: float32 [out_features], or [1] per tensor."""
        magnitude, by_channel = self.weight.detach().abs(), self.granularity == "channel"
        if magnitude.numel() == 0:  # no inputs or no outputs: nothing to take a maximum of
            return scale_from_max(magnitude.new_zeros(self.out_features if by_channel else 1), self.bits)
        return scale_from_max(magnitude.amax(1) if by_channel else magnitude.amax().view(1), self.bits)

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.bits != 32:
            scale = self.weight_scale()
            weight = fake_quantize(weight, scale[:, None], self.bits)
            if bias is not None:
                bias = fake_quantize(bias, scale, self.bias_bits)
        return F.linear(self._quantized_input(input), weight, bias)

    def _quantized_input(self, x: Tensor) -> Tensor:
        if self.activation_bits == 32 or x.numel() == 0:
            return x
        largest = torch.maximum(self.activation_max, x.detach().abs().amax().float())
        if self.training:
            self.activation_max.copy_(largest)
        # Before any training step there is no range yet: take this batch's.
        used = torch.where(self.activation_max > 0, self.activation_max, largest)
        return fake_quantize(x, scale_from_max(used, self.activation_bits), self.activation_bits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing = rest[2]  # (local_metadata, strict, missing_keys, ...)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "activation_max" in missing:  # an unquantized model's weights: the range starts anew
            missing.remove(prefix + "activation_max")
            self.activation_max.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, granularity={self.granularity}"
