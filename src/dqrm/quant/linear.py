"""A linear layer whose weight is quantized each time it is used."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqrm import kernels
from dqrm.quant.activations import ActivationFakeQuantizer, new_activation_quantizer
from dqrm.quant.config import QATConfig, take_qat
from dqrm.quant.groups import Groups
from dqrm.quant.quantizer import FakeQuantized, WeightFakeQuantizer
from dqrm.quant.uniform import code_limits, fake_quantize, scale_from_max


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
        qat: a `QATConfig`; or, one by one, `bits`, `quantizer`, `bias_bits`, `activation_bits` and
            `activation_quantizer` as there, and granularity: 'channel' (one scale per output row) or 'tensor' (one for
            the whole weight).

    Raises:
        ValueError: an unsupported number of bits or granularity.
    """

    activation_fake_quantizer: ActivationFakeQuantizer

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
            with self.weight.device:
                self.activation_fake_quantizer = new_activation_quantizer(qat).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.bits != 32:
            self.weight_fake_quantizer.before_forward(weight)
            bias = self.quantized_bias()
            weight = self._quantized_weight()
        return F.linear(self.quantized_input(input), weight, bias)

    def _quantized_weight(self) -> Tensor:
        """The weight as it is multiplied, where it has a quantizer."""
        bits, weight = self.bits_in_use, self.weight
        if bits == self.bits:
            return self.weight_fake_quantizer.fake_quantize(weight)
        quantized: Tensor = weight
        if bits != 32:
            quantized = _FakeQuantizeWeight.apply(weight, bits, self.granularity == "channel")
        return quantized

    def quantized_bias(self) -> Tensor | None:
        """The bias, fake-quantized if configured, unless its weight is not: [outputs], or None."""
        bias: Tensor | None = self.bias
        if bias is None or self.bias_bits == 32 or self.bits_in_use == 32:
            return bias
        if self.bits_in_use == self.bits:
            return fake_quantize(bias, self.current_scale(), self.bias_bits)
        return fake_quantize(
            bias, weight_scale(self.weight, self.bits_in_use, self.granularity == "channel"), self.bias_bits
        )

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input as it is multiplied; in training, it may change the range of its quantizer."""
        return x if self.activation_bits == 32 else self.activation_fake_quantizer(x)

    @property
    def activation_max(self) -> Tensor:
        """The largest input that is not clipped: float32 without dimensions; 0 until a training batch has shown one."""
        return self.activation_fake_quantizer.maximum

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.activation_bits != 32:
            inside = f"{prefix}activation_fake_quantizer."
            if prefix + "activation_max" in state_dict:  # where it was before there was such a child
                state_dict[inside + "maximum"] = state_dict.pop(prefix + "activation_max")
            if inside + "maximum" not in state_dict:
                if prefix + "weight" in state_dict:  # an unquantized model's: the range starts anew
                    self.activation_fake_quantizer.reset()
                state_dict[inside + "maximum"] = self.activation_fake_quantizer.maximum.detach()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, granularity={self.granularity}"
