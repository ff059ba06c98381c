"""A stack of quantized linear layers with ReLU between them, as one autograd function.

Each layer is a matrix product and one pass over the result, so that a quantized MLP costs about as much as an
unquantized one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqrm import kernels
from dqrm.quant.linear import QuantLinear
from dqrm.quant.packed import PackedLinear
from dqrm.quant.uniform import check_floats, code_limits

# Multiplications below which converting to bf16 and back costs more than multiplying faster gains (measured).
_WORTH_BF16 = 4_000_000


class _Layer(NamedTuple):
    bits: int
    per_channel: bool
    relu: bool
    bf16: bool


class _Layers(torch.autograd.Function):
    """Quantized linear layers, each with or without ReLU: float [B, inputs] -> [B, outputs]. Backward: STE.

    In bf16 the codes are multiplied and the result is scaled, so the quantized weight loses nothing; sums are FP32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[_Layer], *parameters: Tensor) -> Tensor:
        saved: list[Tensor | None] = []
        halves = [
            layer.bf16 and len(x) * weight.numel() >= _WORTH_BF16 for layer, weight in zip(layers, parameters[::2])
        ]
        # 16-bit codes do not fit bf16: there the weight itself is rounded.
        chosen = [
            number for number, (layer, bf16) in enumerate(zip(layers, halves))
            if layer.bits != 32 and not (bf16 and layer.bits == 16)
        ]  # fmt: skip
        formats = [
            (layers[number].per_channel, code_limits(layers[number].bits)[1], halves[number]) for number in chosen
        ]
        weights = [parameters[2 * number] for number in chosen]
        quantized = dict(zip(chosen, kernels.quantize_weights(weights, formats)))
        for number, (layer, bf16) in enumerate(zip(layers, halves)):
            weight, bias = parameters[2 * number : 2 * number + 2]
            used, scale = quantized.get(number, (weight, None))
            if bf16:
                x, used = x.bfloat16(), used.bfloat16()
                scale = weight.new_ones(1) if scale is None else scale
                y = x.mm(used.t())
                y = kernels.finish_linear(y, scale, bias, layer.relu)
            else:
                x, scale = x.float(), None
                y = torch.addmm(bias, x, used.t())
                y = y.relu_() if layer.relu else y
            saved += [x, used, scale]
            x = y
        ctx.save_for_backward(*saved, x)
        ctx.layers = layers
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, layers = ctx.saved_tensors, ctx.layers
        y, grad = saved[-1], grads[0].contiguous()
        gradients: list[Tensor | None] = []
        for number in range(len(layers) - 1, -1, -1):
            x, used, scale = saved[3 * number : 3 * number + 3]
            grad = grad.to(used.dtype)
            shown = y if layers[number].relu else None
            # The next layer may have converted y to another dtype; zeros stay zeros.
            if shown is not None and shown.dtype != grad.dtype:
                shown = shown.to(grad.dtype)
            grad, scaled, bias_grad = kernels.start_linear(grad, shown, scale)
            gradients += [bias_grad, grad.t().mm(x)]
            if number:
                grad = scaled.mm(used)
            y = x
        x_grad = scaled.mm(used) if ctx.needs_input_grad[0] else None
        return x_grad, None, *reversed(gradients)


class QuantMLP(nn.Sequential):
    """`QuantLinear` layers, each but possibly the last followed by `nn.ReLU`.

    Attributes:
        bf16: in training, multiply large layers in bf16, except a last layer without ReLU, whose output is the logit.
            The result is bf16 then. Evaluation is always FP32, like exported models.
    """

    bf16 = False

    def forward(self, x: Tensor) -> Tensor:
        """float [B, inputs] -> [B, outputs]; not differentiable twice.

        Layers that were replaced, have hooks, are no longer float32 or have a quantizer that is not `fusible` run one
        by one.
        """
        check_floats("x", x)
        modules = list(self)
        if modules and type(modules[0]) is PackedLinear:
            return self._packed(x, modules)
        if x.dim() != 2 or not all(map(_fusible, modules)):
            return super().forward(x)
        layers: list[_Layer] = []
        parameters: list[Tensor] = []
        for module, following in zip(modules, [*modules[1:], None]):
            if not isinstance(module, QuantLinear):
                if layers and layers[-1].relu:
                    continue
                return super().forward(x)  # a ReLU that follows no layer
            if module.activation_bits != 32:  # its input must be quantized first: finish what is before it
                if layers:
                    x, layers, parameters = _Layers.apply(x, layers, *parameters), [], []
                x = module.quantized_input(x.float())
            relu = isinstance(following, nn.ReLU)
            bf16 = self.bf16 and self.training and relu
            layers.append(_Layer(module.bits_in_use, module.granularity == "channel", relu, bf16))
            bias = module.quantized_bias()
            parameters += [module.weight, module.weight.new_zeros(module.out_features) if bias is None else bias]
        result: Tensor = _Layers.apply(x, layers, *parameters)
        return result

    def _packed(self, x: Tensor, modules: list[nn.Module]) -> Tensor:
        ours = False  # whether x was created here, so that it may be overwritten
        for module in modules:
            plain = not _hooked(module)
            if plain and ours and type(module) is nn.ReLU:
                x = x.relu_()
            elif plain and type(module) is PackedLinear:
                x = module.forward(x)  # bypasses __call__, which costs as much as a small product
            else:
                x = module(x)
            ours = plain and type(module) is PackedLinear
        return x


def _fusible(module: nn.Module) -> bool:
    if _hooked(module):
        return False
    if type(module) is not QuantLinear:
        return type(module) is nn.ReLU
    # Not by attribute: nn.Module.__getattr__ is called so often in a step that it shows in the step time.
    weight: Any = module._parameters["weight"]
    quantizer: Any = module._modules["weight_fake_quantizer"]
    fusible: bool = weight.dtype == torch.float32 and quantizer.fusible
    return fusible


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
