"""A linear layer whose weight is quantized each time it is used."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm import kernels
from dqrm.quant.config import QATConfig, take_qat
from dqrm.quant.quantizer import FakeQuantized, Groups, WeightFakeQuantizer
from dqrm.quant.uniform import check_floats, code_limits, fake_quantize, scale_from_max


def weight_scale(weight: Tensor, bits: int, per_channel: bool) -> Tensor:
    """Scale of a linear layer's weight [outputs, inputs]: float32 [outputs], or [1] per tensor."""
    return scale_from_max(Groups(len(weight) if per_channel else 1).largest(weight), bits)


class _FakeQuantizeWeight(torch.autograd.Function):
    """The weight's values forward, STE backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, per_channel: bool) -> Tensor:
        ((values, _),) = kernels.quantize_weights([weight], [(per_channel, code_limits(bits)[1], False)])
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class LinearMax(WeightFakeQuantizer):
    """The scales of the largest magnitudes, computed at each forward (a linear layer's weight is small)."""

    fusible = uniform = True

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.per_channel = qat.linear_granularity == "channel"

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        if self.stochastic and self.training:
            self._tick()

    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        pass

    def current_scale(self, weight: Tensor) -> Tensor:
        return weight_scale(weight, self.bits, self.per_channel)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        if self.stochastic:
            return self.values_of(values, self.current_scale(values.detach()))
        quantized: Tensor = _FakeQuantizeWeight.apply(values, self.bits, self.per_channel)
        return quantized


class QuantLinear(FakeQuantized, nn.Linear):
    """`nn.Linear` on a fake-quantized weight: one scale per output channel, recomputed each forward (it is small).

    forward: float [..., in_features] -> float [..., out_features]. From the DQRM paper. The bias stays FP32 by
    default: on the scale of its weight row, as in the DQRM reference, a bias beyond 8/7 of the row's largest weight
    saturates.

    Args:
        qat: a `QATConfig`; or, one by one, `bits`, `quantizer`, `bias_bits` and `activation_bits` as there, and
            granularity: 'channel' (one scale per output row) or 'tensor' (one for the whole weight).

    Raises:
        ValueError: an unsupported number of bits or granularity.
    """

    bits: int
    activation_max: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "granularity" in kwargs:
            kwargs["linear_granularity"] = kwargs.pop("granularity")
        qat = take_qat(kwargs)
        super().__init__(*args, **kwargs)
        self._init_quantization(qat)

    def _init_quantization(self, qat: QATConfig) -> None:
        self.granularity, self.bias_bits, self.activation_bits = (
            qat.linear_granularity,
            qat.bias_bits,
            qat.activation_bits,
        )
        groups = Groups(self.out_features if self.granularity == "channel" else 1)
        self._add_quantizer(qat, qat.effective_mlp_bits, groups)
        if self.activation_bits != 32:
            self.register_buffer("activation_max", torch.zeros((), device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.bits != 32:
            self.weight_fake_quantizer.before_forward(weight)
            bias = self.quantized_bias()
            weight = self.weight_fake_quantizer.fake_quantize(weight)
        return F.linear(self.quantized_input(input), weight, bias)

    def quantized_bias(self) -> Tensor | None:
        """The bias, fake-quantized if configured: [outputs], or None."""
        bias: Tensor | None = self.bias
        if bias is None or self.bias_bits == 32:
            return bias
        return fake_quantize(bias, self.current_scale(), self.bias_bits)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input, fake-quantized if configured; in training, it updates the running maximum."""
        if self.activation_bits == 32:
            return x
        check_floats("input", x)
        if x.numel() == 0:
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
        if prefix + "activation_max" in missing:  # an unquantized model's weights: reset the range
            missing.remove(prefix + "activation_max")
            self.activation_max.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, granularity={self.granularity}"
