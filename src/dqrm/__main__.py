"""`python -m dqrm`, and the command `dqrm`.

What is imported here must be next to nothing: until the command line is there to answer Ctrl-C, it ends the process.
"""

import os
import signal
from typing import Any


def _stop(number: int, frame: Any) -> None:
    """End at once, as every command ends after Ctrl-C: nothing has begun yet."""
    os.write(2, b"dqrm: stopped; nothing half-written is left\n")
    os._exit(130)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _stop)
    from dqrm.cli import main as run

    run()


if __name__ == "__main__":
    main()
