"""What uvicorn's protocols leave open: clients that send the head of a request slowly or without end, and requests
that are on their way when the server shuts down.
"""

import asyncio
import json
from typing import Any

_HEAD_BYTES = 1 << 16
# Seconds in which an idle connection is still listened to at shutdown.
_LINGER = 0.25


class Guard:
    """Mixed into a protocol of uvicorn's; uses its attributes `transport`, `loop` and `cycle` (the current request).

    Attributes:
        head_seconds: that a client has to send a request's head.
    """

    head_seconds = 10.0
    transport: Any
    loop: Any
    cycle: Any
    _timer: asyncio.TimerHandle | None = None
    _received = 0
    _ending = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)  # type: ignore[misc]
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        before, waiting = self.cycle, self._idle
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not before:
            self._received = 0
            self._stop_timer()
            if self._ending:
                self.cycle.keep_alive = False
        elif waiting and not self.transport.is_closing():
            self._received += len(data)
            if self._received > _HEAD_BYTES:
                self._refuse(431, "Request Header Fields Too Large", f"a head of more than {_HEAD_BYTES} bytes")
            elif self._timer is None:
                self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_timer()
        super().connection_lost(exc)  # type: ignore[misc]

    def shutdown(self) -> None:
        """Called by the server when it ends: answer what is on its way, then close."""
        self._ending = True
        if self._idle:
            self.loop.call_later(_LINGER, super().shutdown)  # type: ignore[misc]
        else:
            super().shutdown()  # type: ignore[misc]

    @property
    def _idle(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        what = f"no complete head of a request after {self.head_seconds:g} seconds"
        self._refuse(408, "Request Timeout", what)

    def _refuse(self, status: int, phrase: str, what: str) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps({"error": f"{what}, expected less" if status == 431 else f"{what}, expected it sooner"})
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()


def guarded(base: type, head_seconds: float) -> type:
    """A protocol of uvicorn's with the guard."""
    return type(f"Guarded{base.__name__}", (Guard, base), {"head_seconds": head_seconds})
