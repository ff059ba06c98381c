"""How `dqrm serve` listens, batches and reloads: the fields of the command line. Imports no torch."""

from dataclasses import dataclass

from dqrm.options import at_least


@dataclass(frozen=True)
class ServeConfig:
    """How `dqrm serve` listens, batches and reloads.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of this machine."""
    port: int = 8000
    """Port to listen on; 0: any free one, which is printed."""
    watch: float = 0.0
    """Seconds between looks at the files: one that was replaced is reloaded; 0: on SIGHUP only."""
    batching: bool = True
    """Score the requests that came in while the last batch ran as one batch; else one by one."""
    batch_rows: int = 1024
    """Rows of a batch, at most."""
    queue_rows: int = 8192
    """Rows that may wait; more are refused with status 429. Also the most rows of one request."""
    max_request_bytes: int = 16 * 2**20
    """Bytes of a request's body, at most."""
    request_timeout: float = 10.0
    """Seconds that a client has to send the head of a request, and as many for its body."""
    drain_seconds: float = 0.5
    """Seconds after SIGTERM in which requests are still accepted, while readiness is already refused."""
    shutdown_timeout: float = 30.0
    """Seconds after that in which accepted requests are answered, at most."""
    threads: int = 1
    """CPU threads for arithmetic; 0: torch's default."""
    in_memory: bool = False
    """Read the tables into memory too, so that later changes of the file in place have no effect."""
    verify: bool = True
    """Compare model and vocabularies with their checksums before they are served."""
    data: str | None = None
    """The dataset folder to take vocabularies from, of an artifact without them."""
    page: bool = True
    """Serve a page at / that describes the models and scores a row; it shows ids of the vocabularies."""
    access_log: bool = True
    """Write a line of JSON per request to standard output; without ids, values, addresses or names of users."""

    def __post_init__(self) -> None:
        at_least(self, watch=0, batch_rows=1, queue_rows=1, max_request_bytes=1, drain_seconds=0, threads=0)
        at_least(self, request_timeout=0.1, shutdown_timeout=0.1)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")
