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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqrm.errors import UserError
from dqrm.options import coerce, did_you_mean, registered

if TYPE_CHECKING:
    from dqrm.training.loop import Trainer
    from dqrm.training.run import Run


class Callback:
    """Hooks of a training run; override those that you need. Where there are several ranks, all ranks call them.

    `trainer` has `model`, `optimizers` (of the tables, of everything else), `state` (step, epoch, ...; set
    `state.finished` to end the run after this step), `config`, `dataset`, `world` and `log`.
    """

    @property
    def name(self) -> str:
        """Key of its state in checkpoints, by default the class's name; unique among the callbacks of a run."""
        return type(self).__name__

    def check(self) -> None:
        """Before a new run's folder is made, not when a run resumes: raise UserError if the run cannot begin."""

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


class RedrawTables(Callback):
    """Redraw large tables at the start of each epoch but the first, and reset their optimizer state.

    Embeddings of rare ids overfit in the second epoch, and the other layers adapt to a new embedding space: MEDA (arXiv
    2305.19531), which draws all tables. Values depend on seed, epoch and table, so all ranks and a resumed run draw the
    same; scales are computed from the new values.

    Args:
        min_rows: tables with at least this number of rows are redrawn.
    """

    def __init__(self, min_rows: int = 10_000) -> None:
        if min_rows < 0:
            raise ValueError(f"min_rows is {min_rows}, expected 0 (all tables) or more")
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
        scale = model.tables.weight_fake_quantizer.scale
        for value in trainer.optimizers[1].state.get(scale, {}).values():  # of a learned scale
            if isinstance(value, Tensor) and value.shape == scale.shape:
                value[large] = 0


def weights_but_tables(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics of everything but the tables, by name: the tensors themselves."""
    tables = {id(parameter) for parameter in model.get_submodule("tables").parameters()}
    weights = {name: each.data for name, each in model.named_parameters() if id(each) not in tables}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            weights |= {f"{path}.{name}": getattr(module, name) for name in ("running_mean", "running_var")}
    return weights


class WarmStart(Callback):
    """Begin with all weights but the tables' of an earlier run, as for the data of a new day.

    The MLP adapts to a new embedding space, whatever the ids of the new data are: what MEDA's continual variant (arXiv
    2407.01607) rests on. The paper keeps as many embedding spaces as there are epochs per day; here each day's tables
    are drawn by the seed of its run.

    Args:
        run: a run folder that all ranks see, of the same architecture and as many columns; its best checkpoint is read.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def _open(self) -> "Run":
        from dqrm.training.run import Run

        return Run.open(self.run)

    def check(self) -> None:
        self._open()

    @torch.no_grad()
    def on_epoch_start(self, trainer: "Trainer") -> None:
        if trainer.state.epoch:
            return
        earlier = weights_but_tables(self._open().load_model(mapped=True)[0])
        weights = weights_but_tables(trainer.model)
        here, there = (
            {name: weight for name, weight in mine.items() if name not in other or other[name].shape != weight.shape}
            for mine, other in ((weights, earlier), (earlier, weights))
        )
        if here or there:
            raise UserError(
                f"warm_start: {self.run} has {shapes(there)}, expected this run's {shapes(here)}: the same "
                "architecture, as many columns, and the same quantizers where they learn scales"
            )
        for name, weight in weights.items():
            weight.copy_(earlier[name])


def shapes(weights: Mapping[str, Tensor]) -> str:
    """Names and shapes, for people."""
    return ", ".join(f"{name} {list(weight.shape)}" for name, weight in weights.items()) or "no other weights"


class EMA(Callback):
    """Evaluate, select and export an exponential moving average of all weights but the tables'; training goes on with
    its own.

    After each step, average = d * average + (1 - d) * weight, with d = min(decay, (1 + n) / (10 + n)) after n updates,
    so that a short run does not average its initial weights (Polyak averaging with the warm-up of TensorFlow's
    ExponentialMovingAverage). The running statistics of batch normalization are averaged with the weights; scales are
    those of the averages (of quantizers that clip: of their last refresh). In a checkpoint the model's weights are the
    averages, and this state has the others.

    Args:
        decay: of the average, per step, at least 0 and below 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, expected at least 0 and below 1")
        self.decay, self.updates = decay, 0
        # By name, the averages; inside `evaluated_weights`, and when loaded, the weights of training.
        self._held: dict[str, Tensor] = {}
        self._model: torch.nn.Module | None = None
        self._of_model: dict[str, Tensor] = {}

    def _weights(self, model: torch.nn.Module) -> dict[str, Tensor]:
        if self._model is not model:
            self._model, self._of_model = model, weights_but_tables(model)
        return self._of_model

    @torch.no_grad()
    def on_step_end(self, trainer: "Trainer", loss: Tensor) -> None:
        if self._model is not trainer.model:  # the first step of a run
            self.updates = 0
        weights = self._weights(trainer.model)
        if not self.updates:
            self._held = {name: weight.clone() for name, weight in weights.items()}
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in weights.items():
            self._held[name].lerp_(weight, 1 - decay)
        self.updates += 1

    @contextmanager
    def evaluated_weights(self, trainer: "Trainer") -> Iterator[None]:
        self._swap(trainer)
        try:
            yield
        finally:
            self._swap(trainer)

    @torch.no_grad()
    def _swap(self, trainer: "Trainer") -> None:
        if not self.updates:
            return
        for name, weight in self._weights(trainer.model).items():
            held, self._held[name] = self._held[name], weight.clone()
            weight.copy_(held)

    def on_resume(self, trainer: "Trainer") -> None:
        self._swap(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, **self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._held = {name: value for name, value in state.items() if name != "updates"}


CALLBACKS: dict[str, Callable[..., Callback]] = {
    "redraw_tables": RedrawTables,
    "ema": EMA,
    "warm_start": WarmStart,
}
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


# Parameters without a default that a caller by name must give.
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _build(text: str) -> Callback:
    name, *pairs = text.split(":")
    make = registered("callbacks", name, CALLBACKS)
    known = inspect.signature(make, eval_str=True).parameters
    options: dict[str, Any] = {}
    for option, separator, value in (pair.partition("=") for pair in pairs):
        if not separator:
            raise UserError(f"callbacks: got {text!r}, expected NAME:OPTION=VALUE:...")
        if option not in known:
            raise UserError(f"callbacks: {name} has no option '{option}'{did_you_mean(option, known)}")
        if option in options:
            raise UserError(f"callbacks: got {text!r}, which gives {option} twice; expected one value")
        wanted = known[option].annotation
        options[option] = value if wanted is inspect.Parameter.empty else coerce(f"{name}:{option}", value, wanted)
    for option, parameter in known.items():
        needed = parameter.default is parameter.empty and parameter.kind in _NAMED
        if needed and option not in options:
            raise UserError(f"callbacks: got {text!r}, expected {name}:{option}=VALUE")
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"callbacks: {text}: {error}") from None


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
