"""What `/metrics` tells Prometheus. No label holds an id or a value of a request."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one server."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dqrm_requests", "Answered requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "dqrm_request_seconds", "From the head of a request to its answer", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.rows = Counter("dqrm_rows", "Scored rows", ["model"], registry=registry)
        self.batch_rows = Histogram("dqrm_batch_rows", "Rows of a batch", buckets=_ROWS, registry=registry)
        self.queue_rows = Gauge("dqrm_queue_rows", "Rows that wait", registry=registry)
        self.unknown = Counter(
            "dqrm_unknown_ids", "Ids that are in no row of the vocabulary", ["model", "column"], registry=registry
        )
        self.reloads = Counter("dqrm_reloads", "Reloads", ["model", "outcome"], registry=registry)
        self.version = Gauge("dqrm_model_info", "The served version", ["model", "version"], registry=registry)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
