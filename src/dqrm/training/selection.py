"""Selection by validation metrics: the best checkpoint, early stopping and drops of the learning rate; and a check
before the first step that these options can act on the data.
"""

from typing import Any

import numpy as np

from dqrm.config import Config, TrainingConfig
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.options import registered
from dqrm.training.metrics import METRICS, Metric, groups_with_both_labels
from dqrm.training.state import State


def choose(state: State, metrics: dict[str, Any], train_loss: float, config: Config, counts: bool = True) -> bool:
    """Update the state after an evaluation on validation: a new best, or one more evaluation without improvement, after
    which the learning rate may drop.

    Without validation rows nothing can be selected: the last state is the result.

    Args:
        counts: whether one without improvement is one of those (`Callback.evaluation_counts`).

    Returns:
        Whether it is the best so far; False without a value of the metric.
    """
    options, value = config.training, metrics[config.training.select_by]
    sign = 1 if METRICS[options.select_by].higher_is_better else -1
    best = None if state.best is None else state.best["metrics"][options.select_by]
    better = value is not None and (best is None or sign * value > sign * best)
    if not counts:
        state.uncounted_epoch = state.epoch + 1
    if better or value is None:
        state.best = {"step": state.step, "epoch": state.epoch + 1, "train_loss": train_loss, "metrics": metrics}
        state.without_better = 0
        return better
    if not counts:
        return better
    state.without_better += 1
    if state.without_better % config.optimizer.plateau_patience == 0:
        state.rate_factor *= config.optimizer.plateau_factor
    return better


def stops(state: State, options: TrainingConfig, epoch_ends: bool) -> str | None:
    """The reason for which the run stops early after this evaluation (already in the state), or None."""
    if state.best is None or state.best["metrics"][options.select_by] is None:
        return None
    best, epoch = state.best, state.epoch + 1
    if options.early_stopping and state.without_better >= options.early_stopping:
        waited = f"{state.without_better} evaluation{'s' * (state.without_better > 1)}"
    elif epoch_ends and options.patience and epoch - max(best["epoch"], state.uncounted_epoch) >= options.patience:
        waited = f"{epoch - best['epoch']} epoch{'s' * (epoch > best['epoch'] + 1)}"
    else:
        return None
    return (
        f"Stopped in epoch {epoch}: no better validation {options.select_by} for {waited}; the result is step "
        f"{best['step']} of epoch {best['epoch']} with {best['metrics'][options.select_by]:.4f}"
    )


def chosen_by(state: State, select_by: str) -> str:
    """How the result of a run was selected, in words."""
    if state.best is not None and state.best["metrics"][select_by] is not None:
        return f"best validation {select_by}"
    return "last state (no validation figure)"


def check_selection(config: Config, dataset: Dataset) -> list[str]:
    """Warnings before training: early stopping, or a drop of the learning rate, that can never act.

    Raises:
        UserError: select_by, early_stopping or plateau_factor need a metric that this data cannot give, or there is no
            metric of that name.
    """
    options, rows = config.training, dataset.rows["validation"]
    metric = selecting(options.select_by)
    if metric.needs_group:
        _check_groups(dataset, options.select_by, metric)
    waits = {"early_stopping": options.early_stopping}
    if config.optimizer.plateau_factor < 1:
        waits["plateau_patience"] = config.optimizer.plateau_patience
    asked = {name: wait for name, wait in waits.items() if wait}
    if not asked:
        return []
    name = next(iter(asked))
    if not rows:
        raise UserError(
            f"{name} is {asked[name]}, but {dataset.path} has no validation rows; prepare the data with "
            "some, or leave it out"
        )
    if not has_figure(options.select_by, dataset):
        label = int(dataset.info["clicks"]["validation"] > 0)
        raise UserError(
            f"{name} is {asked[name]}, but all {rows} validation rows of {dataset.path} have the label {label}, so "
            f"{options.select_by} is not defined; use select_by log_loss"
        )
    count = evaluations(config, dataset.rows["train"])
    does = {"early_stopping": "it will never stop the run early", "plateau_patience": "the learning rate will not drop"}
    return [
        f"{name} is {wait}, but the run has {count} evaluation{'s' * (count != 1)} (epochs {options.epochs}, "
        f"eval_every {options.eval_every}, max_steps {options.max_steps}), fewer than the {wait + 2} that it needs: "
        f"{does[name]}; set eval_every, or train for more epochs"
        for name, wait in asked.items()
        if count < wait + 2  # the first one is the best so far, and after the last there is nothing to change
    ]


def has_figure(name: str, dataset: Dataset) -> bool:
    """Whether the metric `select_by` is defined on the validation split; groups are not checked."""
    rows, clicks = dataset.rows["validation"], dataset.info["clicks"]["validation"]
    return rows > 0 and not (selecting(name).needs_both_labels and clicks in (0, rows))


def evaluations(config: Config, rows: int) -> int:
    """How many evaluations on validation a run without early stopping makes: at ends of epochs and every eval_every
    steps, each step counted once."""
    options = config.training
    batches = -(-rows // options.batch_size)
    steps = options.epochs * batches
    if options.max_steps:
        steps = min(steps, options.max_steps)
    ends = {*range(batches, steps + 1, batches), steps}
    between = steps // options.eval_every if options.eval_every else 0
    return len(ends) + between - sum(options.eval_every > 0 and end % options.eval_every == 0 for end in ends)


def selecting(name: str) -> Metric:
    """The metric that `select_by` names.

    Raises:
        UserError: there is no metric of that name, or no checkpoint can be selected by it.
    """
    choices = {each: metric for each, metric in METRICS.items() if metric.higher_is_better is not None}
    return registered("select_by", name, choices)


def _check_groups(dataset: Dataset, name: str, metric: Metric) -> None:
    if dataset.group is None:
        raise UserError(
            f"select_by is {name}, but {dataset.path} has no group column; prepare the data with --group, as --group "
            "user"
        )
    part = dataset.split("validation")
    groups = part.groups()
    if not metric.needs_both_labels or not part.rows or groups is None:
        return
    if not groups_with_both_labels(np.asarray(part.labels()), groups):
        raise UserError(
            f"select_by is {name}, but in {dataset.path} no {dataset.group} of the validation split has rows of both "
            "labels; use select_by auc or log_loss"
        )
