"""`dqrm serve` on the command line."""

from typing import Any

import click

from dqrm.flags import GroupedCommand, config_options, given
from dqrm.options import build
from dqrm.server.config import ServeConfig


@click.command(cls=GroupedCommand, short_help="Serve exported models over HTTP: tensors and raw rows.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@config_options(("How it listens, batches and reloads", ServeConfig))
def serve(models: tuple[str, ...], **flags: Any) -> None:
    """Serve the exported files MODEL (name.dqrm, or NAME=FILE) over HTTP: the Open Inference Protocol v2, and raw rows
    at /score.

    SIGHUP reloads the files. SIGTERM and Ctrl-C answer what was accepted, then end.
    """
    config = build(ServeConfig, given(flags), "serve")

    from dqrm.console import messages
    from dqrm.server.run import serve as run

    messages.print("Opening and verifying ...")
    run(models, config, lambda address: messages.print(f"Serving on {address}; Ctrl-C ends it."))
