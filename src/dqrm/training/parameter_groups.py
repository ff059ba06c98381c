"""Which parameters an optimizer treats otherwise than the rest: what quantizers learn."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dqrm.config import OptimizerConfig
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.quantizer import WeightFakeQuantizer

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: a factor on the learning rate of each step."""


def parameter_groups(model: nn.Module, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[Any]:
    """`parameters` of a model as an optimizer takes them: as they are, or in groups if quantizers have learned values.

    Scales have no L2: it would pull codes apart from their weights. Clipping values of activations have the one of the
    configuration.
    """
    scales = _owned(model, parameters, WeightFakeQuantizer)
    clips = _owned(model, parameters, ActivationFakeQuantizer)
    if not scales and not clips:
        return list(parameters)
    learned = {id(parameter) for parameter in (*scales, *clips)}
    clip_l2 = config.mlp_l2 if config.pact_l2 is None else config.pact_l2
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if id(parameter) not in learned]},
        {"params": scales, "weight_decay": 0.0, RATE_FACTOR: config.scale_rate_factor},
        {"params": clips, "weight_decay": clip_l2, RATE_FACTOR: config.scale_rate_factor},
    ]
    return [group for group in groups if group["params"]]


def _owned(model: nn.Module, parameters: Sequence[nn.Parameter], kind: type[nn.Module]) -> list[nn.Parameter]:
    """Those of the parameters that belong to a module of this kind, in their order."""
    owned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, kind)
        for parameter in module.parameters(recurse=False)
    }
    return [parameter for parameter in parameters if id(parameter) in owned]
