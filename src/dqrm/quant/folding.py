"""Batch normalization after a quantized linear layer, folded into its packed form for inference.

In evaluation y = g * (x W^T + b - m) / sqrt(v + eps) + h is linear in each channel, so with f = g / sqrt(v + eps)

    y = x (f W)^T + (f (b - m) + h)

A row of W is its codes times the row's scale: f goes into the scale, and the codes stay those that training used.
Nothing is quantized a second time, so the folded layer gives what evaluation gave, up to the order of float operations.
"""

import torch
from torch import nn

from dqrm.quant.packed import PackedLinear


@torch.no_grad()
def fold_batch_norm(layer: PackedLinear, norm: nn.BatchNorm1d) -> PackedLinear:
    """A packed layer equivalent to `layer` followed by `norm` in evaluation.

    Raises:
        ValueError: `norm` keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "batch normalization without running statistics cannot be folded; use track_running_stats=True"
        )
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.double()
    before = 0.0 if layer.bias is None else layer.bias.double()
    bias = factor * (before - norm.running_mean.double()) + (0.0 if norm.bias is None else norm.bias.double())
    plain = layer.bits == 32
    return PackedLinear(
        layer.in_features,
        layer.out_features,
        bits=layer.bits,
        codes=(layer.codes.double() * factor[:, None]).float() if plain else layer.codes,
        scale=layer.scale if plain else (layer.scale.double() * factor).float(),
        bias=bias.float(),
        activation_bits=layer.activation_bits,
        activation_scale=layer.activation_scale,
    )
