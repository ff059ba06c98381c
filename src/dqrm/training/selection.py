"""Choosing by validation figures: whether what was asked for can act on this data, before the first step."""

import numpy as np

from dqrm.config import Config
from dqrm.data.dataset import Dataset
from dqrm.errors import UserError
from dqrm.training.metrics import groups_with_both_labels


def check_selection(config: Config, dataset: Dataset) -> list[str]:
    """What the user should hear before training: early stopping, or a falling learning rate, that can never act.

    Raises:
        UserError: select_by, early_stopping or plateau_factor need a figure that this data cannot give.
    """
    options, rows = config.training, dataset.rows["validation"]
    if options.select_by == "gauc":
        _check_gauc(dataset)
    waits = {"early_stopping": options.early_stopping}
    if config.optimizer.plateau_factor < 1:
        waits["plateau_patience"] = config.optimizer.plateau_patience
    asked = {name: wait for name, wait in waits.items() if wait}
    if not asked:
        return []
    name = next(iter(asked))
    clicks = dataset.info["clicks"]["validation"]
    if not rows:
        raise UserError(
            f"{name} is {asked[name]}, but {dataset.path} has no validation rows to judge by; prepare the data with "
            "some, or leave it out"
        )
    if options.select_by == "auc" and clicks in (0, rows):
        raise UserError(
            f"{name} is {asked[name]}, but all {rows} validation rows of {dataset.path} have the label "
            f"{int(clicks > 0)}, so there is no AUC to judge by; select_by log_loss needs none"
        )
    count = evaluations(config, dataset.rows["train"])
    does = {"early_stopping": "it will never stop the run early", "plateau_patience": "the learning rate will not drop"}
    return [
        f"{name} is {wait}, but the run has {count} evaluation{'s' * (count != 1)} (epochs {options.epochs}, "
        f"eval_every {options.eval_every}, max_steps {options.max_steps}) and it can act from {wait + 2} on: "
        f"{does[name]}; set eval_every, or train for more epochs"
        for name, wait in asked.items()
        if count < wait + 2  # the first one is the best so far, and after the last there is nothing to change
    ]


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


def _check_gauc(dataset: Dataset) -> None:
    if dataset.group is None:
        raise UserError(
            f"select_by is gauc, but {dataset.path} has no group column; prepare the data with --group, as --group user"
        )
    part = dataset.split("validation")
    groups = part.groups()
    if part.rows and groups is not None and not groups_with_both_labels(np.asarray(part.labels()), groups):
        raise UserError(
            f"select_by is gauc, but in {dataset.path} no {dataset.group} of the validation split has rows of both "
            "labels; select_by auc or log_loss needs none"
        )
