"""Quantization-aware training for any module: swap the layers, train as before."""

import warnings
from collections.abc import Callable

from torch import nn

from dqrm.quant.clamping import Clamps
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection, refuse_unsupported
from dqrm.quant.linear import QuantLinear
from dqrm.quant.ranges import TableScales

_SWAPS: dict[type, type] = {nn.Linear: QuantLinear, nn.Embedding: QuantEmbedding, nn.EmbeddingBag: QuantEmbeddingBag}


def prepare_qat(
    model: nn.Module,
    config: QATConfig | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Make every `nn.Linear`, `nn.Embedding` and `nn.EmbeddingBag` of `model` quantization-aware, in place.

    A module keeps its identity, name, parameters, hooks and device; only its class changes. An optimizer built before
    still holds the right parameters, tied weights stay tied, and a state dict of the unprepared model still loads.
    Subclasses of those layers are left alone, since their own forward would be lost (lazy layers; in
    `nn.MultiheadAttention` the output projection, and its input projection is no layer at all); so is what is prepared
    already. Where that leaves nothing quantized, a warning says so.
    A parent that reads `child.weight` instead of calling the child goes around the quantization. The one in torch that
    does, `nn.TransformerEncoderLayer` in evaluation, has that path switched off.

    Args:
        model: any module; returned.
        config: bits, granularity and when scales are refreshed; default INT4 with scales that clamp no weight.
        filter: called as filter(name, module); False leaves that module as it is.

    Raises:
        ValueError: a layer uses an option that a quantized table cannot have; names the layer. Nothing is swapped then.
    """
    config = config or QATConfig()
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in _SWAPS and (filter is None or filter(name, module))
    ]
    if not chosen and not any(isinstance(module, (QuantLinear, TableScales)) for module in model.modules()):
        warnings.warn("prepare_qat found no nn.Linear, nn.Embedding or nn.EmbeddingBag to quantize", stacklevel=2)
    for name, module in chosen:  # refuse before anything is changed
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            try:
                refuse_unsupported(module)
            except ValueError as error:
                raise ValueError(f"module '{name}': {error}") from None
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the flag by which it and nn.TransformerEncoder allow their fused path
    clamps = Clamps()
    for _, module in chosen:
        module.__class__ = _SWAPS[type(module)]
        if isinstance(module, QuantLinear):
            module._init_quantization(
                config.effective_mlp_bits, config.linear_granularity, config.bias_bits, config.activation_bits
            )
        elif isinstance(module, (QuantEmbedding, QuantEmbeddingBag)):
            module._init_quantization(
                config.effective_table_bits, config.scale_period, config.scale_refresh, config.rescan_period
            )
            module.clamps = clamps  # one warning for all of them
    return model


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that the weights of `model` need at the bits they are trained in, computed from shapes.

    Quantized weights count bits/8 bytes each plus 4 per scale, everything else its own dtype.

    Returns:
        {'tables': bytes, 'mlp': bytes (weights and biases of everything that is no table), 'total': bytes}.
    """
    sizes = {"tables": 0, "mlp": 0}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part = (
                "tables" if isinstance(module, (nn.Embedding, nn.EmbeddingBag, QuantEmbeddingBagCollection)) else "mlp"
            )
            bits, scales = 8 * parameter.element_size(), 0
            if name == "weight" and isinstance(module, (QuantLinear, TableScales)) and module.bits != 32:
                bits = module.bits
                scales = len(module.weight_scale() if isinstance(module, QuantLinear) else module.scale)
            sizes[part] += -(-parameter.numel() * bits // 8) + 4 * scales
    return {**sizes, "total": sum(sizes.values())}
