"""What gives the input of a linear layer its values on a few bits: a child module, `activation_fake_quantizer`.

To add one: subclass `ActivationFakeQuantizer` and enter it in `config.ACTIVATION_QUANTIZERS`;
`QATConfig.activation_quantizer` then names it. Its largest value may be learned: a parameter instead of a buffer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqrm.quant.config import ACTIVATION_QUANTIZERS, QATConfig, registered
from dqrm.quant.uniform import check_floats, fake_quantize, scale_from_max


class ActivationFakeQuantizer(nn.Module):
    """The range of one layer's inputs, and the values that it gives.

    A subclass registers `maximum` in its constructor, a float32 zero without dimensions, as a buffer or a parameter;
    it is above 0 once a training batch has shown a range. Packed layers hold its scale, and quantize inputs by
    `uniform.fake_quantize` on it: what `forward` gives in evaluation must be that.

    Args:
        bits: of the inputs: 2, 4, 8 or 16.
    """

    maximum: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Inputs as they are multiplied: floats of any shape, kept with their dtype."""
        raise NotImplementedError

    def scale(self) -> Tensor:
        """The scale of evaluation: float32 without dimensions, no gradient.

        Raises:
            ValueError: no training step has shown a range.
        """
        if not self.maximum > 0:
            raise ValueError(
                "the inputs of a linear layer are to be quantized, but their range is unknown before a training step"
            )
        return scale_from_max(self.maximum.detach(), self.bits)

    def reset(self) -> None:
        """Weights without a range are loaded: it starts again with the next training batch."""
        self.maximum.detach().zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves but never casts."""

        def moved(tensor: Tensor) -> Tensor:
            new: Tensor = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)


class RunningMax(ActivationFakeQuantizer):
    """The largest magnitude of any training batch so far."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("maximum", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """In training, the range is widened first. The gradient passes unchanged."""
        check_floats("input", x)
        if x.numel() == 0:
            return x
        largest = torch.maximum(self.maximum, x.detach().abs().amax().float())
        if self.training:
            self.maximum.copy_(largest)
        # Before any training step there is no range yet: take this batch's.
        used = torch.where(self.maximum > 0, self.maximum, largest)
        return fake_quantize(x, scale_from_max(used, self.bits), self.bits)


def new_activation_quantizer(qat: QATConfig) -> ActivationFakeQuantizer:
    """The activation quantizer that a configuration names."""
    quantizer: ActivationFakeQuantizer = registered(qat.activation_quantizer, ACTIVATION_QUANTIZERS)(
        qat.activation_bits
    )
    return quantizer
