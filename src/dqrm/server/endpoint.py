"""One endpoint of the server as an ASGI application: a handler's answer or refusal, with metrics and a line of log."""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dqrm.errors import UserError
from dqrm.server.body import read_body
from dqrm.server.config import ServeConfig
from dqrm.server.errors import ClientGone, Refusal
from dqrm.server.log import JsonLines
from dqrm.server.metrics import Metrics

_JSON = b"application/json"


@dataclass
class Answer:
    """What a handler answers. headers: besides content-type and content-length."""

    body: bytes
    content_type: bytes = _JSON
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> "Answer":
        """Of a value as JSON."""
        return cls(json.dumps(value).encode(), status=status)

    @classmethod
    def refusal(cls, refused: Refusal) -> "Answer":
        """Of an error: the protocol's object with one sentence."""
        answer = cls.json({"error": refused.sentence}, refused.status)
        if refused.close:
            answer.headers.append((b"connection", b"close"))
        if refused.status == 429:
            answer.headers.append((b"retry-after", b"1"))
        return answer


class Call:
    """A request as a handler sees it. note: what the log tells of it."""

    def __init__(self, scope: Mapping[str, Any], receive: Any, config: ServeConfig) -> None:
        self.scope, self._receive, self._config = scope, receive, config
        self.note: dict[str, Any] = {}

    @cached_property
    def headers(self) -> dict[bytes, bytes]:
        """The request's headers by their names in small letters; of several the last."""
        return dict(self.scope["headers"])

    def parameter(self, name: str) -> str | None:
        """A part of the path."""
        value: str | None = self.scope.get("path_params", {}).get(name)
        return value

    async def body(self) -> bytes:
        """See `body.read_body`."""
        data = await read_body(
            self.headers, self._receive, self._config.max_request_bytes, self._config.request_timeout
        )
        self.note["bytes"] = len(data)
        return data


Handler = Callable[[Call], Awaitable[Answer]]


@dataclass(frozen=True)
class Observer:
    """Where endpoints report."""

    metrics: Metrics
    lines: JsonLines
    access_log: bool

    def report(self, route: str, method: str, status: int, started: float, note: Mapping[str, Any]) -> None:
        """One answered request. route: its pattern, as a path can hold anything."""
        seconds = time.perf_counter() - started
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if self.access_log:
            self.lines.write(route=route, method=method, status=status, ms=round(1e3 * seconds, 3), **note)


class Endpoint:
    """An ASGI application of one route. route: its name in metrics and log."""

    def __init__(self, route: str, handler: Handler, config: ServeConfig, observer: Observer) -> None:
        self._route, self._handler, self._config, self._observer = route, handler, config, observer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; see ASGI."""
        started, call = time.perf_counter(), Call(scope, receive, self._config)
        try:
            answer = await self._handler(call)
        except Refusal as refused:
            answer = Answer.refusal(refused)
        except UserError as error:
            answer = Answer.refusal(Refusal(400, str(error)))
        except ClientGone:
            self._observer.report(self._route, scope["method"], 499, started, call.note)
            return
        except Exception as error:
            # Its text can quote values of the request: only its type and place are told.
            self._observer.lines.write(event="internal error", error=type(error).__name__, where=_where(error))
            answer = Answer.json({"error": "an internal error; the server's log says where"}, 500)
        headers = [(b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())]
        self._observer.report(self._route, scope["method"], answer.status, started, call.note)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers + answer.headers})
        await send({"type": "http.response.body", "body": answer.body})


def _where(error: BaseException) -> str:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
