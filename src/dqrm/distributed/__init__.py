"""What crosses the wire between ranks, and the same on one machine: codecs, sparse and dense exchange, simulation."""

import os


def launched() -> bool:
    """Whether the environment says, as torchrun sets it, that this process is one of several ranks."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1
