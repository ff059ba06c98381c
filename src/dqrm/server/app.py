"""The application: routes of the Open Inference Protocol v2, `/score`, `/metrics` and the page.

GET  /v2/health/live, /v2/health/ready             is the process up; should requests come here
GET  /v2                                           the server's metadata
GET  /v2/models/NAME[/versions/V][/ready]          a model's metadata; is it ready
POST /v2/models/NAME[/versions/V]/infer            tensors -> logits and probabilities
POST /score[/NAME]                                 raw rows -> probabilities
GET  /metrics, /, /models                          for Prometheus; the page, and what it shows
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from dqrm import __version__
from dqrm.server import page, protocol
from dqrm.server.batching import Batcher, Work
from dqrm.server.body import parse_json
from dqrm.server.config import ServeConfig
from dqrm.server.endpoint import Answer, Call, Endpoint, Handler, Observer
from dqrm.server.errors import Refusal
from dqrm.server.repository import Repository
from dqrm.server.scoring import TensorGroup, check_rows, row_group
from dqrm.server.version import OUTPUTS, Scores, Version

# Larger bodies are parsed in a thread, so that the event loop goes on.
_SMALL = 1 << 16
_LENGTH = b"inference-header-content-length"


class Service:
    """The handlers of all routes, on the models of a repository."""

    def __init__(self, repository: Repository, batcher: Batcher, config: ServeConfig, observer: Observer) -> None:
        self.repository, self.batcher, self.config, self.observer = repository, batcher, config, observer

    async def live(self, call: Call) -> Answer:
        """GET /v2/health/live"""
        return Answer.json({"live": True})

    async def ready(self, call: Call) -> Answer:
        """GET /v2/health/ready"""
        ready = self.repository.ready
        return Answer.json({"ready": ready}, 200 if ready else 503)

    async def server(self, call: Call) -> Answer:
        """GET /v2"""
        return Answer.json({"name": "dqrm", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model(self, call: Call) -> Answer:
        """GET /v2/models/NAME"""
        version = self._version(call)
        return Answer.json(
            {
                "name": version.name,
                "versions": [version.id],
                "platform": "dqrm",
                "inputs": [port.describe() for port in version.inputs],
                "outputs": [port.describe() for port in OUTPUTS],
            }
        )

    async def model_ready(self, call: Call) -> Answer:
        """GET /v2/models/NAME/ready"""
        version = self._version(call)
        ready = version.failed is None and not self.repository.draining
        return Answer.json({"name": version.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, call: Call) -> Answer:
        """POST /v2/models/NAME/infer"""
        version = self._version(call)
        length = call.headers.get(_LENGTH)
        text = None if length is None else length.decode("latin-1")
        body = await call.body()
        request = await self._parsed(len(body), lambda: protocol.parse(body, text, version))
        work = self.batcher.submit(TensorGroup(version), request.tensors, len(request.tensors))
        scores = await self._scores(call, version, work)
        data, head = protocol.respond(request, scores, version)
        answer = Answer(data, headers=[_timing(work)])
        if head is not None:
            answer.content_type = b"application/octet-stream"
            answer.headers.append((b"inference-header-content-length", str(head).encode()))
        return answer

    async def score(self, call: Call) -> Answer:
        """POST /score and /score/NAME"""
        name = call.parameter("model")
        version = self.repository.only() if name is None else self.repository.get(name)
        call.note["model"] = version.name
        body = await call.body()
        rows = await self._parsed(len(body), lambda: check_rows(parse_json(body)))
        unknown = self.observer.metrics.unknown
        group = row_group(version, rows, lambda column, count: unknown.labels(version.name, column).inc(count))
        work = self.batcher.submit(group, rows, len(rows))
        scores = await self._scores(call, version, work)
        found = {"model": version.name, "version": version.id, "probabilities": scores.probability.tolist()}
        return Answer(json.dumps(found).encode(), headers=[_timing(work)])

    async def metrics(self, call: Call) -> Answer:
        """GET /metrics"""
        metrics = self.observer.metrics
        metrics.queue_rows.set(self.batcher.rows)
        return Answer(metrics.text(), metrics.content_type.encode())

    async def models(self, call: Call) -> Answer:
        """GET /models: what the page shows."""
        versions = list(self.repository.versions.values())
        loop = asyncio.get_running_loop()
        return Answer.json(await loop.run_in_executor(None, lambda: [page.describe(version) for version in versions]))

    async def page(self, call: Call) -> Answer:
        """GET /"""
        return Answer(page.html(), b"text/html; charset=utf-8", headers=[page.POLICY])

    def _version(self, call: Call) -> Version:
        version = self.repository.get(call.parameter("model") or "", call.parameter("version"))
        call.note["model"] = version.name
        return version

    async def _parsed(self, size: int, parse: Callable[[], Any]) -> Any:
        if size <= _SMALL:
            return parse()
        return await asyncio.get_running_loop().run_in_executor(None, parse)

    async def _scores(self, call: Call, version: Version, work: Work) -> Scores:
        call.note.update(version=version.id, rows=work.rows)
        scores: Scores = await work.future
        self.observer.metrics.rows.labels(version.name).inc(work.rows)
        return scores


def _timing(work: Work) -> tuple[bytes, bytes]:
    return b"server-timing", b"queue;dur=%.3f, model;dur=%.3f" % (1e3 * work.waited, 1e3 * work.took)


def build_app(service: Service) -> Starlette:
    """The ASGI application."""
    routes = []

    def add(path: str, handler: Handler, *methods: str) -> None:
        routes.append(Route(path, Endpoint(path, handler, service.config, service.observer), methods=list(methods)))

    # The most frequent first: they are matched in order.
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add(f"{path}/infer", service.infer, "POST")
    for path in ("/score", "/score/{model}"):
        add(path, service.score, "POST")
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add(f"{path}/ready", service.model_ready, "GET")
        add(path, service.model, "GET")
    add("/v2/health/live", service.live, "GET")
    add("/v2/health/ready", service.ready, "GET")
    add("/v2", service.server, "GET")
    add("/metrics", service.metrics, "GET")
    if service.config.page:
        add("/", service.page, "GET")
        add("/models", service.models, "GET")
    app = Starlette(routes=routes, exception_handlers={404: _other(service, 404), 405: _other(service, 405)})
    app.router.redirect_slashes = False
    return app


def _other(service: Service, status: int) -> Any:
    """The answer for a path, or a method of a path, that does not exist."""

    async def handler(call: Call) -> Answer:
        path, method = call.scope["path"][:80], call.scope["method"]
        raise Refusal(status, f"there is no {method} {path}, expected a path as GET /v2 or POST /score")

    endpoint = Endpoint("other", handler, service.config, service.observer)

    async def answer(request: Any, error: Exception) -> Any:
        return endpoint

    return answer
