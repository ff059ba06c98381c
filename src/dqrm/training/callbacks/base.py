"""The hooks of a training run, and their state in its checkpoints."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqrm.config import Config
from dqrm.errors import UserError

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer


class Callback:
    """Hooks of a training run; override those that you need. Where there are several ranks, all ranks call them.

    `trainer` has `model`, `optimizers` (of the tables, of everything else), `state` (step, epoch, ...; set
    `state.finished` to end the run after this step), `config`, `dataset`, `world` and `log`, and `record` for lines
    of metrics.jsonl.

    Attributes:
        whole_tables: whether it uses the tables' weights or bits, `trainer.model.tables`, which a rank has not where
            they are sharded; such a run is then refused.
    """

    whole_tables: bool = False

    @property
    def name(self) -> str:
        """Key of its state in checkpoints, by default the class's name; unique among the callbacks of a run."""
        return type(self).__name__

    def check(self, config: Config) -> None:
        """Before a new run's folder is made, not when a run resumes: raise UserError if a run of this configuration,
        in which batch size, learning rate and epochs are resolved, cannot begin."""

    def on_epoch_start(self, trainer: "Trainer") -> None:
        """Before the first step of epoch `trainer.state.epoch` (from 0); not when a run resumes within one."""

    def on_step_end(self, trainer: "Trainer", loss: Tensor) -> None:
        """After the update of step `trainer.state.step` (from 1), before the evaluation and checkpoint due at it.

        Args:
            loss: mean over the batch, a scalar without a graph on the model's device; with several ranks this rank's
                share of it; all shares add up to it.
        """

    def evaluation_counts(self, trainer: "Trainer") -> bool:
        """Whether an evaluation without improvement counts for patience, early stopping and a drop of the learning
        rate; not where training is yet to change. A new best one is chosen in any case."""
        return True

    def on_evaluation(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """After an evaluation on validation, before the checkpoint that it entails; see `metrics.click_metrics`."""

    def evaluated_weights(self, trainer: "Trainer") -> AbstractContextManager[None]:
        """Inside, `trainer.model` has the weights that are evaluated, saved and exported, in place of those that
        training goes on with; entered for each evaluation and each checkpoint."""
        return nullcontext()

    def on_resume(self, trainer: "Trainer") -> None:
        """A run goes on from a checkpoint, whose weights (see `evaluated_weights`) and state are loaded."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, saved with each checkpoint (of rank 0): names to tensors or JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def weights_but_tables(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics of everything but the tables, by name: the tensors themselves."""
    tables = {id(parameter) for parameter in model.get_submodule("tables").parameters()}
    weights = {name: each.data for name, each in model.named_parameters() if id(each) not in tables}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            weights |= {f"{path}.{name}": getattr(module, name) for name in ("running_mean", "running_var")}
    return weights


def overriding(callbacks: Sequence[Callback], hook: str) -> list[Callable[..., Any]]:
    """The methods `hook` of the callbacks that override it."""
    return [getattr(each, hook) for each in callbacks if getattr(type(each), hook) is not getattr(Callback, hook)]


def save_callbacks(callbacks: Sequence[Callback]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Their states: JSON values by callback and name, and tensors by 'callback/name'.

    Raises:
        UserError: a value is neither.
    """
    values: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for callback in callbacks:
        state = callback.state_dict()
        values[callback.name] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        tensors |= {f"{callback.name}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        for name, value in values[callback.name].items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"callback {callback.name}: '{name}' of its state_dict is a {type(value).__name__}, expected a "
                    f"tensor or a JSON value ({error})"
                ) from None
    return values, tensors


def load_callbacks(
    callbacks: Sequence[Callback], values: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `save_callbacks` gave; a callback without saved state starts fresh.

    Raises:
        UserError: a callback of the saved run is missing: without it the resumed run would differ.
    """
    known = {callback.name: callback for callback in callbacks}
    if missing := [name for name in values if name not in known]:
        raise UserError(
            f"the run was trained with the callback {missing[0]}, which is missing; resume it in Python with "
            f"dqrm.resume(..., callbacks=[...]), as it was started"
        )
    for name, state in values.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        known[name].load_state_dict({**state, **own})
