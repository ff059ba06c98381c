"""Quantization-aware training for any module: `prepare_qat` swaps the layers, `convert` packs them after training."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.clamping import Clamps
from dqrm.quant.config import QATConfig
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection, refuse_unsupported
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mixed import packed_collection
from dqrm.quant.packed import PackedEmbedding, PackedEmbeddingBag, PackedLinear
from dqrm.quant.packing import TableScales, encode, encode_table, joined, storage
from dqrm.quant.quantizer import FakeQuantized, WeightFakeQuantizer

_SWAPS: dict[type, type] = {nn.Linear: QuantLinear, nn.Embedding: QuantEmbedding, nn.EmbeddingBag: QuantEmbeddingBag}


def prepare_qat(
    model: nn.Module,
    config: QATConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Make every `nn.Linear`, `nn.Embedding` and `nn.EmbeddingBag` of `model` quantization-aware, in place.

    A module keeps its identity, name, parameters, hooks and device; only its class changes. An optimizer built before
    still holds the right parameters, tied weights stay tied, and a state dict of the unprepared model still loads.
    Subclasses of those layers are left alone, since their own forward would be lost (lazy layers; in
    `nn.MultiheadAttention` the output projection; its input projection is not a layer); so are layers that are already
    prepared. If nothing is quantized, a warning says so.
    A parent that reads `child.weight` instead of calling the child bypasses the quantization. In torch only
    `nn.TransformerEncoderLayer` does, in evaluation; that path is disabled.

    Args:
        model: any module; returned.
        config: bits, granularity and when scales are refreshed; default INT4 with scales that clamp no weight.
        filter_fn: called as filter_fn(module, fqn), fqn being the module's fully qualified name, as in torchao; False
            leaves that module unchanged.

    Raises:
        ValueError: a layer uses an option that a quantized table cannot have; names the layer. Nothing is swapped then.
    """
    config = config or QATConfig()
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in _SWAPS and (filter_fn is None or filter_fn(module, name))
    ]
    if not chosen and not any(isinstance(module, FakeQuantized) for module in model.modules()):
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
        assert isinstance(module, (QuantLinear, QuantEmbedding, QuantEmbeddingBag))
        module._init_quantization(config)
        clamps.quiet |= module.weight_fake_quantizer.clips
        module.weight_fake_quantizer.clamps = clamps  # one warning for all of them
    return model


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that the weights of `model` need at the bits they are trained in, computed from shapes.

    Quantized weights count bits/8 bytes each plus 4 per scale and 4 per zero point, everything else its own dtype.

    Returns:
        {'tables': bytes, 'mlp': bytes (weights and biases of everything that is not a table), 'total': bytes}.
    """
    sizes = {"tables": 0, "mlp": 0}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Scales: counted with their weight; ranges of activations: no weights.
            if id(parameter) in seen or isinstance(module, (WeightFakeQuantizer, ActivationFakeQuantizer)):
                continue
            seen.add(id(parameter))
            part = (
                "tables" if isinstance(module, (nn.Embedding, nn.EmbeddingBag, QuantEmbeddingBagCollection)) else "mlp"
            )
            full, stored = 8 * parameter.element_size(), [(parameter.numel(), 32, 0)]
            if name == "weight" and isinstance(module, FakeQuantized):
                quantizer, each = module.weight_fake_quantizer, parameter.shape[-1]
                groups = quantizer.groups
                stored = [(parameter.numel(), module.bits, groups.count * quantizer.bytes_per_group)]
                if groups.bits and groups.table_rows:
                    stored = [(rows * each, bits, 4) for rows, bits in zip(groups.table_rows, groups.bits)]
            for count, bits, scales in stored:
                sizes[part] += count * full // 8 if bits == 32 else -(-count * bits // 8) + scales
    return {**sizes, "total": sum(sizes.values())}


@torch.no_grad()
def pack_linear(layer: QuantLinear, scale: Tensor | None = None, bits: int | None = None) -> PackedLinear:
    """The packed form of a trained layer.

    Args:
        scale, bits: of the weight, where they are not the layer's own (quantization after training).

    Raises:
        ValueError: inputs are to be quantized, but their range is unknown because the layer was not trained.
    """
    bits = layer.bits if bits is None else bits
    weight = layer.weight.detach().float()
    if scale is None:
        scale = weight.new_ones(1) if bits == 32 else layer.current_scale()
    bias, activation_scale = layer.quantized_bias(), None
    if layer.activation_bits != 32:
        activation_scale = layer.activation_fake_quantizer.scale()
    return PackedLinear(
        layer.in_features,
        layer.out_features,
        bits=bits,
        codes=encode(weight, scale[:, None], bits),
        scale=scale.clone(),
        bias=None if bias is None else bias.detach().float().clone(),
        activation_bits=layer.activation_bits,
        activation_scale=activation_scale,
    )


def _pack(module: nn.Module) -> nn.Module | None:
    """The packed form of a trained module; None for what is not quantized."""
    if type(module) is QuantLinear:
        return pack_linear(module) if module.bits != 32 else None
    # Exactly these: a subclass may compute something else.
    if type(module) not in (QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection) or module.bits == 32:
        return None
    assert isinstance(module, (QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection))
    scales = module.weight_fake_quantizer.table_scales(module.weight)
    if isinstance(module, QuantEmbeddingBagCollection):
        return _pack_collection(module, scales)
    kind = PackedEmbedding if isinstance(module, QuantEmbedding) else PackedEmbeddingBag
    packed = kind(
        module.num_embeddings, module.embedding_dim, bits=module.bits, **joined(scales),
        codes=encode_table(module.weight.detach(), scales[0], module.bits),
    )  # fmt: skip
    packed.padding_idx, packed.dtype = module.padding_idx, module.weight.dtype
    if isinstance(module, QuantEmbeddingBag):
        packed.mode, packed.include_last_offset = module.mode, module.include_last_offset
    return packed


def _pack_collection(module: QuantEmbeddingBagCollection, scales: list[TableScales]) -> nn.Module:
    def tensors(prefix: str, bits: int, tables: list[int]) -> dict[str, Any]:
        dtype, width = storage(module.embedding_dim, bits)
        table_rows = [module.table_rows[number] for number in tables]
        codes = torch.empty(sum(table_rows), width, dtype=dtype)
        for number, rows in zip(tables, codes.split(table_rows)):
            rows.copy_(encode_table(module.table(number), scales[number], bits))
        return {"codes": codes, **joined([scales[number] for number in tables])}

    return packed_collection(
        module.table_rows, module.embedding_dim, module.table_bits or module.bits, tensors, multi=module.multi,
        pooling=module.pooling,
    )  # fmt: skip


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Turn every quantized layer of `model`, as `prepare_qat` made it, into its packed form for inference, in place.

    A module keeps its identity, name, hooks and other attributes; its FP32 weight is dropped, and its state dict holds
    codes and scales. Layers at 32 bits and subclasses of the layers are left unchanged. The model's outputs in
    evaluation do not change.

    Args:
        model: any module; returned, in eval mode.

    Raises:
        ValueError: a layer quantizes its inputs but was never trained; names it. Nothing is converted then.
    """
    packed: list[tuple[nn.Module, nn.Module]] = []
    for name, module in model.named_modules():
        try:
            form = _pack(module)
        except ValueError as error:
            raise ValueError(f"module '{name}': {error}") from None
        if form is not None:
            device = next(module.parameters()).device
            packed.append((module, form.to(device)))
    for module, form in packed:
        kept = {key: value for key, value in module.__dict__.items() if "hook" in key}
        module.__class__ = type(form)
        module.__dict__.update({**form.__dict__, **kept})
    return model.eval()
