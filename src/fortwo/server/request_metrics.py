"""Counts the requests of a server for GET /metrics: by method, template of the route, and status.

Labels never hold what a client wrote, so their number is bounded and they tell nothing.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo.server.errors import METHODS

SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)
NO_ROUTE = "none"  # refused before it was routed, or a file of the page
DISCONNECTED = "disconnected"  # in place of a status

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


class RequestMetricsMiddleware:
    """ASGI middleware: counts each request when it has ended, by the template of its route."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = DISCONNECTED, time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.count(method, route, status, time.perf_counter() - began)
