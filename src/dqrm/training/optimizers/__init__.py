"""Update rules for sparse gradients, one file for each family, and the register that names them.

`base` says what they share. The MLP gets torch's optimizer of the same family.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from dqrm.config import OptimizerConfig
from dqrm.options import registered
from dqrm.training.optimizers.adam import SparseAdam
from dqrm.training.optimizers.base import SparseOptimizer
from dqrm.training.optimizers.dense_adam import DenseAdam
from dqrm.training.optimizers.frequency import CounterAdagrad, FrequencyAdagrad
from dqrm.training.optimizers.simple import SparseAdagrad, SparseSGD

__all__ = [
    "OPTIMIZERS", "CounterAdagrad", "DenseAdam", "FrequencyAdagrad", "Pair", "SparseAdagrad", "SparseAdam",
    "SparseOptimizer", "SparseSGD", "build_optimizers", "learning_rate",
]  # fmt: skip

Pair = tuple[SparseOptimizer, Optimizer]


def _sgd(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int) -> Pair:
    rate = config.rate
    mlp = torch.optim.SGD(others, rate, weight_decay=config.mlp_l2, fused=bool(others))
    return SparseSGD(tables, rate, config.table_l2, seed), mlp


def _adagrad(
    tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int, *, rowwise: bool = False
) -> Pair:
    rate, eps = config.rate, config.adagrad_eps
    return SparseAdagrad(tables, rate, config.table_l2, eps, rowwise, seed), _torch_adagrad(others, config)


def _counter_adagrad(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int) -> Pair:
    options = config.rate, config.table_l2, config.adagrad_eps, config.count_halflife
    return CounterAdagrad(tables, *options, seed), _torch_adagrad(others, config)


def _frequency_adagrad(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int) -> Pair:
    options = config.rate, config.table_l2, config.adagrad_eps
    return FrequencyAdagrad(tables, *options, seed), _torch_adagrad(others, config)


def _torch_adagrad(others: list[Any], config: OptimizerConfig) -> Optimizer:
    return torch.optim.Adagrad(others, config.rate, eps=config.adagrad_eps, weight_decay=config.mlp_l2)


def _adam(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int, *, rowwise: bool = False) -> Pair:
    rate, betas, eps = config.rate, (config.adam_beta1, config.adam_beta2), config.adam_eps
    return SparseAdam(tables, rate, betas, eps, config.table_l2, rowwise, seed), _torch_adam(others, config)


def _dense_adam(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int) -> Pair:
    rate, betas, eps = config.rate, (config.adam_beta1, config.adam_beta2), config.adam_eps
    return DenseAdam(tables, rate, betas, eps, config.table_l2, seed), _torch_adam(others, config)


def _torch_adam(others: list[Any], config: OptimizerConfig) -> Optimizer:
    """With its state from the start: a rank that resumes receives each tensor of it."""
    betas = (config.adam_beta1, config.adam_beta2)
    mlp = torch.optim.Adam(others, config.rate, betas, config.adam_eps, config.mlp_l2)
    for weight in (weight for group in mlp.param_groups for weight in group["params"]):
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        mlp.state[weight] = {"step": torch.zeros(()), **moments}
    return mlp


OPTIMIZERS: dict[str, Callable[[list[Any], list[Any], OptimizerConfig, int], Pair]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": partial(_adagrad, rowwise=True),
    "counter_adagrad": _counter_adagrad,
    "frequency_adagrad": _frequency_adagrad,
    "adam": _adam,
    "rowwise_adam": partial(_adam, rowwise=True),
    "dense_adam": _dense_adam,
}
"""Constructors by name: (tables, others, configuration, seed) -> optimizers (of the tables, of everything else).
`others` are parameters, or parameter groups of torch where quantizers have learned values (`parameter_groups`)."""


def build_optimizers(tables: list[Any], others: list[Any], config: OptimizerConfig, seed: int = 0) -> Pair:
    """One optimizer for the tables (sparse gradients) and one for everything else.

    Raises:
        UserError: no optimizer of that name is registered.
    """
    return registered("optimizer", config.rule, OPTIMIZERS)(tables, others, config, seed)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The learning rate of training step `step` (counted from 0), before any drop on a plateau.

    DLRM's policy: linear warm-up over `warmup_steps`; from `decay_start_step` on, quadratic decay over `decay_steps`:
    rate * ((start + decay_steps - step) / decay_steps)**2, and its last value afterwards, so never exactly 0.
    """
    rate = config.rate
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    if config.decay_steps and step >= config.decay_start_step:
        left = max(config.decay_start_step + config.decay_steps - step, 1)
        return float(rate * (left / config.decay_steps) ** 2)
    return rate
