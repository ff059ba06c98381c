"""Communication between ranks, and its simulation in one process: codecs, sparse and dense exchange."""

import os


def launched() -> bool:
    """Whether the environment, as set by torchrun, says that this process is one of several ranks."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1
