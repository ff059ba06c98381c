"""Callbacks of a training run, given as objects (`dqrm.train(..., callbacks=[...])`), or by name in
the configuration (`training.callbacks`), as

    class PrintLoss(Callback):
        def on_step_end(self, trainer, loss):
            if trainer.state.step % 1000 == 0:
                trainer.log(f"loss {float(loss):.4f}")

    CALLBACKS["print_loss"] = PrintLoss
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dqrm.errors import UserError
from dqrm.options import coerce, did_you_mean, registered
from dqrm.training.callbacks.base import Callback, load_callbacks, overriding, save_callbacks
from dqrm.training.callbacks.ema import EMA
from dqrm.training.callbacks.record_histograms import RecordHistograms
from dqrm.training.callbacks.redraw_tables import RedrawTables
from dqrm.training.callbacks.stage_bits import StageBits

__all__ = [
    "CALLBACKS", "EMA", "Callback", "RecordHistograms", "RedrawTables", "StageBits", "build_callbacks",
    "load_callbacks", "overriding", "save_callbacks",
]  # fmt: skip

CALLBACKS: dict[str, Callable[..., Callback]] = {
    "redraw_tables": RedrawTables,
    "ema": EMA,
    "stage_bits": StageBits,
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
