"""`dqrm serve`: the process that listens, from its start to its last answer."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import torch

from dqrm.errors import UserError
from dqrm.server.config import ServeConfig

try:
    import uvicorn

    from dqrm.server.app import Service, build_app
    from dqrm.server.batching import Batcher
    from dqrm.server.connections import guarded
    from dqrm.server.endpoint import Observer
    from dqrm.server.log import JsonLines
    from dqrm.server.metrics import Metrics
    from dqrm.server.repository import Repository, named_paths
except ImportError as missing:
    if (missing.name or "").partition(".")[0] not in ("uvicorn", "starlette", "prometheus_client"):
        raise
    raise UserError("serving needs the extra dqrm[serve]: pip install 'dqrm[serve]'") from None

_BACKLOG = 2048
# Seconds after which an idle connection is closed: longer than load balancers keep theirs, as a rule 60.
_KEEP_ALIVE = 75


class Server(uvicorn.Server):
    """uvicorn's server with our models and signals: SIGHUP reloads, SIGTERM and SIGINT drain, then end.

    Args:
        models: by name or path, as `named_paths` takes them. started: told the address, once requests are accepted.

    Raises:
        UserError: a model cannot be opened, or the address cannot be listened on.
    """

    def __init__(
        self,
        models: Sequence[str],
        options: ServeConfig,
        stream: TextIO | None = None,
        started: Callable[[str], None] | None = None,
    ) -> None:
        self.options, self._tell_started = options, started or (lambda address: None)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.lines, self.metrics = JsonLines(stream or sys.stdout), Metrics()
        self.repository = Repository(named_paths(models), options, self._event)
        for version in self.repository.versions.values():
            self.metrics.version.labels(version.name, version.id).set(1)
        self.listener = _listen(options)
        self.batcher = Batcher(
            options.batch_rows, options.queue_rows, options.batching, self.metrics.batch_rows.observe
        )
        observer = Observer(self.metrics, self.lines, options.access_log)
        service = Service(self.repository, self.batcher, options, observer)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its warnings are answers of ours
        config = uvicorn.Config(
            build_app(service), lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, backlog=_BACKLOG, timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=options.shutdown_timeout,
        )  # fmt: skip
        config.load()
        config.http_protocol_class = guarded(config.http_protocol_class, options.request_timeout)
        super().__init__(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve_all(self) -> None:
        """Serve until a signal, or `end`; every accepted request is answered."""
        try:
            self.run(sockets=[self.listener])
        finally:
            self.batcher.close()
            self.repository.close()
            self.lines.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self.loop = loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.end)
            loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self.repository.reload(changed_only=False)))
        if self.options.watch:
            self._start(self.repository.watch(self.options.watch))
        self._event("started", {"address": self.address, "models": {
            version.name: version.id for version in self.repository.versions.values()}})  # fmt: skip
        self._tell_started(self.address)

    def end(self) -> None:
        """Refuse readiness, then connections, and answer what was accepted; the second call gives up on that."""
        if self.repository.draining:
            self.should_exit = self.force_exit = True
            return
        self.repository.draining = True
        self._event("draining", {})
        asyncio.get_running_loop().call_later(self.options.drain_seconds, self._exit)

    def _exit(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self.repository.draining = True
        for task in self._tasks:
            task.cancel()
        await super().shutdown(sockets)
        self._event("ended", {})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn; ours are handled by the loop."""
        yield

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _event(self, event: str, about: dict[str, Any]) -> None:
        self.lines.write(event=event, **about)
        if event == "reloaded":
            self.metrics.reloads.labels(about["model"], "loaded").inc()
            with contextlib.suppress(KeyError):
                self.metrics.version.remove(about["model"], about["before"])
            self.metrics.version.labels(about["model"], about["version"]).set(1)
        elif event == "reload failed":
            self.metrics.reloads.labels(about["model"], "failed").inc()


def _listen(options: ServeConfig) -> socket.socket:
    """A socket that listens; the port is taken before requests are accepted."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.create_server(address[:2], family=family, backlog=_BACKLOG, reuse_port=False)
    except OSError as error:
        raise UserError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from None
    made.set_inheritable(False)
    return made


def serve(models: Sequence[str], options: ServeConfig, started: Callable[[str], None] | None = None) -> None:
    """Serve artifacts until SIGTERM or Ctrl-C.

    Args:
        models: NAME=FILE, or FILE, whose name is then the file's without its suffix. started: told the address.

    Raises:
        UserError: the extra is missing, a model cannot be opened, or the address cannot be listened on.
    """
    # What is imported is no garbage, and looking through it takes 0.1 s, in which no request is answered. Not what is
    # opened after it: models that are replaced must be found.
    gc.collect()
    gc.freeze()
    Server(models, options, started=started).serve_all()
