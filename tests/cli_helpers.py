"""Running the command line in the process of the tests."""

import sys
from typing import Any
from unittest import mock

from dqrm.cli import main


def command(capsys: Any, *arguments: Any) -> tuple[Any, str, str]:
    """Exit code, standard output and standard error of `dqrm` with these arguments."""
    code: Any = 0
    with mock.patch.object(sys, "argv", ["dqrm", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return (code, *capsys.readouterr())
