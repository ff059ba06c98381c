"""`dqrm prepare` on the command line: in one go or in parts, and what it prints."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dqrm.console import bars, messages, print_json
from dqrm.data.config import PrepareConfig
from dqrm.data.parts import merge_parts, prepare_part
from dqrm.data.prepare import prepare
from dqrm.errors import UserError
from dqrm.info import print_dataset, warn_of_data
from dqrm.process import STOPPED


def run_prepare(
    sources: Sequence[str], output: str, config: PrepareConfig, part: str | None, merge: bool, as_json: bool
) -> None:
    """Prepare the log, or do what is next for one part of it, or for all of them.

    Raises:
        UserError: as `prepare`, `prepare_part` and `merge_parts`.
    """
    if part and merge:
        raise UserError(f"got --part {part} and --merge, expected one of them: --merge is for all parts")
    told: str | None = None
    try:
        with bars(quiet=as_json) as progress:
            if part:
                told, dataset = prepare_part(sources, output, part, config, progress)
            elif merge:
                told, dataset = merge_parts(sources, output, config, progress)
            else:
                dataset = prepare(sources, output, config, progress, log=progress.log)
    except KeyboardInterrupt:
        if not Path(f"{output.rstrip('/')}.partial").exists():
            raise
        messages.print("Stopped; run the same command again to resume.")
        sys.exit(STOPPED)
    if told and not as_json:
        messages.print(told)
    if dataset is not None:
        warn_of_data(dataset)
    if as_json:
        print_json(dataset.describe() if dataset else {"done": told})
    elif dataset is not None:
        print_dataset(dataset)
