"""Counts the requests of a server for GET /metrics: by method, template of the route, and status.

Labels never hold what a client wrote, so their number is bounded and they tell nothing.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which says when it began


class RequestMetrics:
    """Counts the requests of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("method", "route")
        self._requests = Counter(
            "fortwo_requests", "Requests that have ended.", (*labels, "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "fortwo_request_seconds", "How long requests took.", labels, buckets=SECONDS, registry=self.registry
        )

    def count(self, method: str, route: str, status: str, seconds: float) -> None:
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(method, route).observe(seconds)
