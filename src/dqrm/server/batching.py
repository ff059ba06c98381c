"""Dynamic batching without a timer: one worker thread takes what queued while its last batch ran.

A lone request is taken at once. `Batcher.submit` is called on the event loop and never blocks it; results come back
through the loop.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dqrm.errors import UserError
from dqrm.server.errors import Refusal


class Group(Protocol):
    """What may share a batch: requests whose groups are equal."""

    @property
    def key(self) -> Hashable:
        """Equal for requests that may share a batch."""

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        """The result of each payload, in order.

        Raises:
            UserError, Refusal: one of them is invalid.
        """


@dataclass
class Work:
    """A request that waits. waited, took: seconds in the queue and in the batch, once it is done."""

    group: Group
    payload: Any
    rows: int
    future: "asyncio.Future[Any]"
    queued: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    took: float = 0.0


class Batcher:
    """The queue of a process and its worker thread.

    Args:
        batch_rows: of a batch, at most; a request of more is a batch of its own.
        queue_rows: that may wait. batching: False scores requests one by one.
        observe: called in the worker with the rows of each batch.
    """

    def __init__(
        self, batch_rows: int, queue_rows: int, batching: bool = True, observe: Callable[[int], None] | None = None
    ) -> None:
        self._batch_rows, self._queue_rows, self._batching = batch_rows, queue_rows, batching
        self._observe = observe or (lambda rows: None)
        # Of each group what waits, oldest first; groups take turns.
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._changed, self._closed = threading.Condition(), False
        self.rows = 0
        self._thread = threading.Thread(target=self._work, name="dqrm-inference", daemon=True)
        self._thread.start()

    def submit(self, group: Group, payload: Any, rows: int) -> Work:
        """Queue a request of the running event loop; its future holds the result or the error.

        Raises:
            Refusal: the queue is full (429), or cannot hold a request of so many rows (413).
        """
        if rows > self._queue_rows:
            raise Refusal(413, f"the request has {rows} rows, expected at most {self._queue_rows}")
        work = Work(group, payload, rows, asyncio.get_running_loop().create_future())
        with self._changed:
            if self.rows + rows > self._queue_rows:
                raise Refusal(429, f"{self.rows} rows wait already, of at most {self._queue_rows}; try again later")
            self.rows += rows
            self._waiting.setdefault(group.key, deque()).append(work)
            self._changed.notify()
        return work

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            started = time.perf_counter()
            results = _run(batch)
            took = time.perf_counter() - started
            for work in batch:
                work.waited, work.took = started - work.queued, took
            self._observe(sum(work.rows for work in batch))
            loop = batch[0].future.get_loop()
            try:
                loop.call_soon_threadsafe(_deliver, batch, results)
            except RuntimeError:  # the loop was closed: nobody waits any more
                continue

    def _take(self) -> list[Work]:
        """The next batch, waiting for one; empty at the end."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            key = next(iter(self._waiting))
            waiting = self._waiting.pop(key)
            batch = [waiting.popleft()]
            rows = batch[0].rows
            while self._batching and waiting and rows + waiting[0].rows <= self._batch_rows:
                rows += waiting[0].rows
                batch.append(waiting.popleft())
            if waiting:
                self._waiting[key] = waiting
            self.rows -= rows
            return batch


def _run(batch: list[Work]) -> list[Any]:
    """The result of each request, or its error: one that is invalid does not fail the others."""
    try:
        return batch[0].group.run([work.payload for work in batch])
    except BaseException as error:  # polars' panics, too
        if len(batch) == 1 or not isinstance(error, (UserError, Refusal)):
            return [error] * len(batch)
    return [result for work in batch for result in _run([work])]


def _deliver(batch: list[Work], results: list[Any]) -> None:
    for work, result in zip(batch, results):
        if work.future.done():
            continue
        if isinstance(result, BaseException):
            # StopIteration and the like cannot be set on a future.
            work.future.set_exception(result if isinstance(result, Exception) else RuntimeError(type(result).__name__))
        else:
            work.future.set_result(result)
