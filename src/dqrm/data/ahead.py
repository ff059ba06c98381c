"""Prefetching: the next item is computed in a thread while the current one is used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each computed while its predecessor is used; at most one more is in memory."""
    end = object()
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        waiting = thread.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
    finally:
        # Not waited for: the garbage collector may end what an error left, and may do so while a thread is starting.
        thread.shutdown(wait=False)
