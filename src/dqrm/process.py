"""How a command ends: errors, warnings, Ctrl-C and SIGTERM, each with one sentence and one exit code."""

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from dqrm.distributed import launched
from dqrm.errors import NotVerified, UserError

STOPPED = 130
"""The exit code after Ctrl-C or SIGTERM."""
# Seconds until a signal that came during an import is looked at again.
_AGAIN = 0.02


def run_command(command: click.Command, name: str) -> None:
    """Run a command line to its end; invalid input gives one sentence on standard error and exit code 2.

    Ctrl-C and SIGTERM raise KeyboardInterrupt where the command is, so that it removes what is half written, and then
    end it with one sentence and exit code 130. Training stops cleanly instead (`training.environment.stop_signals`).
    """
    asked = threading.Event()
    with _short_warnings():
        try:
            try:
                with _terminations(asked):
                    _exit(command.main(prog_name=name, standalone_mode=False) or 0)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException:  # polars' panics, too
                if asked.is_set():  # what was stopped failed of it, as C code does that calls back into Python
                    raise KeyboardInterrupt from None
                raise
        except click.ClickException as error:
            error.show()
            _exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"{name}: stopped; nothing half-written is left", err=True)
            _exit(STOPPED)
        except UserError as error:
            click.echo(f"{name}: {error}", err=True)
            _exit(2)
        except OSError as error:  # a full disk, a folder that may not be written
            if error.errno == errno.EPIPE:  # whoever read our output has seen enough
                sys.stderr.close()
                sys.exit(1)
            click.echo(f"{name}: {error.filename or 'input or output'}: {error.strerror or error}", err=True)
            _exit(1)
        except SystemExit as ended:
            if not launched() or not (ended.code is None or isinstance(ended.code, int)):
                raise
            _exit(ended.code or 0)


@contextmanager
def _terminations(asked: threading.Event) -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does: both set `asked` and raise KeyboardInterrupt.

    Not while a module is imported, but as soon as it is: packages swallow it there, are left half imported, or abort
    the process. Not in ranks that torchrun started: one that waits for another in torch's C++ would hear of it much too
    late.
    """
    if launched() or threading.current_thread() is not threading.main_thread():
        yield
        return

    alarm = getattr(signal, "SIGALRM", None)  # Windows has none
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, alarm) if number is not None]

    def stop(number: int, frame: Any) -> None:
        asked.set()
        if alarm is not None and _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Inside, our own warnings are sentences as errors are."""
    before = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if issubclass(category, NotVerified):
            click.echo(f"dqrm: {message}", err=True)
        else:
            before(message, category, *rest, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _exit(code: int) -> None:
    """End with `code`; as one of several ranks without Python's own way out.

    There, threads of torch's process groups can still want the interpreter, and then the process aborts, or waits for a
    rank that is gone.
    """
    if not launched():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
