"""What is noted of every request: an id, a span, a line in the log, and counts for GET /metrics.

Nothing of it holds what a client wrote, but for the id and the trace that it sent and the path in the span: no query,
no header, no body, no key.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from opentelemetry.trace import SpanKind, use_span
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo import log_context
from fortwo.server.errors import METHODS
from fortwo.server.request_metrics import RequestMetrics
from fortwo.server.tracing import TRACER, end_server_span, remote_context

HEADER = "X-Request-Id"
NO_ROUTE = "none"  # refused before it was routed, or a file of the page
DISCONNECTED = "disconnected"  # in place of a status

access = logging.getLogger("fortwo.access")
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_for(sent: str | None) -> str:
    """The id that the client sent, if it has up to 128 letters, digits and ._:/+=@- alone; otherwise a new one."""
    return sent if sent is not None and _WELL_FORMED.fullmatch(sent) else new_request_id()


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class ObservationMiddleware:
    """ASGI middleware, outside of all others. A request is noted when it has ended, by the template of its route."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_for(headers.get(HEADER))
        log_context.request_id.set(request_id)  # of this task alone
        status, sent, began = DISCONNECTED, 0, time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message)[HEADER] = request_id
            else:
                sent += len(message.get("body", b""))
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "other"
        span = TRACER.start_span(method, remote_context(headers), SpanKind.SERVER)
        with use_span(span, end_on_exit=True, record_exception=False):
            try:
                await self._app(scope, receive, send_and_note)
            finally:
                route, seconds = getattr(scope.get("route"), "path", NO_ROUTE), time.perf_counter() - began
                self._metrics.count(method, route, status, seconds)
                end_server_span(span, scope, method, route, status, request_id)
                _log(method, route, status, seconds, sent)


def _log(method: str, route: str, status: str, seconds: float, sent: int) -> None:
    milliseconds = round(seconds * 1000, 1)
    fields = {"method": method, "route": route, "status": int(status) if status.isdigit() else status}
    access.info(
        "%s %s %s in %g ms, %d bytes",
        *(method, route, status, milliseconds, sent),
        extra=fields | {"milliseconds": milliseconds, "bytes": sent},
    )
