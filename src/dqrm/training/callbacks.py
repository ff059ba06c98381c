"""Callbacks of a training run, given as objects (`dqrm.train(..., callbacks=[...])`), or by name in
the configuration (`training.callbacks`), as

    class PrintLoss(Callback):
        def on_step_end(self, trainer, loss):
            if trainer.state.step % 1000 == 0:
                trainer.log(f"loss {float(loss):.4f}")

    CALLBACKS["print_loss"] = PrintLoss
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dqrm.errors import UserError
from dqrm.options import coerce, did_you_mean, registered

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer


class Callback:
    """Hooks of a training run; override those that you need. Where there are several ranks, all ranks call them.

    `trainer` has `model`, `optimizers` (of the tables, of everything else), `state` (step, epoch, ...; set
    `state.finished` to end the run after this step), `config`, `dataset`, `world` and `log`.
    """

    @property
    def name(self) -> str:
        """Key of its state in checkpoints, by default the class's name; unique among the callbacks of a run."""
        return type(self).__name__

    def on_epoch_start(self, trainer: "Trainer") -> None:
        """Before the first step of epoch `trainer.state.epoch` (from 0); not when a run resumes within one."""

    def on_step_end(self, trainer: "Trainer", loss: Tensor) -> None:
        """After the update of step `trainer.state.step` (from 1), before the evaluation and checkpoint due at it.

        Args:
            loss: mean over the batch, a scalar without a graph on the model's device; with several ranks this rank's
                share of it; all shares add up to it.
        """

    def on_evaluation(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """After an evaluation on validation, before the checkpoint that it entails; see `metrics.click_metrics`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, saved with each checkpoint (of rank 0): names to tensors or JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class RedrawTables(Callback):
    """Redraw large tables at the start of each epoch but the first, and reset their optimizer state.

    Embeddings of rare ids overfit in the second epoch, the rest of the model does not (MEDA, arXiv 2305.19531).

    Args:
        min_rows: tables with at least this number of rows are redrawn.
    """

    def __init__(self, min_rows: int = 10_000) -> None:
        self.min_rows = min_rows

    def on_epoch_start(self, trainer: "Trainer") -> None:
        model, epoch, start = trainer.model, trainer.state.epoch, 0
        if epoch == 0:
            return
        large = [number for number, rows in enumerate(model.tables.table_rows) if rows >= self.min_rows]
        model.redraw_tables(trainer.config.training.seed, epoch, large)
        for number, rows in enumerate(model.tables.table_rows):
            if number in large:
                trainer.optimizers[0].reset_rows(slice(start, start + rows))
            start += rows


CALLBACKS: dict[str, Callable[..., Callback]] = {"redraw_tables": RedrawTables}
"""By name, what makes a callback of the options that a configuration gives it."""


def build_callbacks(named: Sequence[str], given: Sequence[Callback] = ()) -> list[Callback]:
    """The callbacks of a run.

    Args:
        named: as in `TrainingConfig.callbacks`: a name of `CALLBACKS`, and ':option=value' for each keyword argument.
        given: objects.

    Raises:
        UserError: an unknown name or option, a value of the wrong type, an object that is not a Callback, or two
            callbacks of the same name.
    """
    callbacks = [*map(_build, named), *given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks: got a {type(callback).__name__}, expected instances of dqrm.Callback")
    names = [callback.name for callback in callbacks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"callbacks: two of them are named {twice[0]}; give one another `name`")
    return callbacks


def _build(text: str) -> Callback:
    name, *pairs = text.split(":")
    make = registered("callbacks", name, CALLBACKS)
    known = inspect.signature(make, eval_str=True).parameters
    options = {}
    for option, separator, value in (pair.partition("=") for pair in pairs):
        if not separator:
            raise UserError(f"callbacks: got {text!r}, expected NAME:OPTION=VALUE:...")
        if option not in known:
            raise UserError(f"callbacks: {name} has no option '{option}'{did_you_mean(option, known)}")
        wanted = known[option].annotation
        options[option] = value if wanted is inspect.Parameter.empty else coerce(f"{name}:{option}", value, wanted)
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"callbacks: {text}: {error}") from None


def overriding(callbacks: Sequence[Callback], hook: str) -> list[Callable[..., None]]:
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
