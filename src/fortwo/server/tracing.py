"""Spans of OpenTelemetry for requests and for generations, by its semantic conventions for HTTP and for generative AI.

Without an exporter (`server.telemetry`) a span is an empty object. No span has a prompt, a reply, a query or a header.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fortwo.errors import FortwoError
from fortwo.prompts import Generation, Prompt

TRACER = trace.get_tracer("fortwo")
PATH_CHARACTERS = 256  # of a path, which a client may make as long as it likes
_PROPAGATOR = TraceContextTextMapPropagator()


def remote_context(headers: Mapping[str, str]) -> Context:
    """The context of a request: the span of its header traceparent (W3C), or none. The request before it on the same
    connection may have left one."""
    found = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
    return _PROPAGATOR.extract(found, Context()) if found else Context()


def end_server_span(
    span: Span, scope: Mapping[str, Any], method: str, route: str, status: str, request_id: str
) -> None:
    """Give the span of a request its name and what is known at its end. status: a number, or a word if there was no
    response."""
    if not span.is_recording():
        return
    has_route = scope.get("route") is not None
    span.update_name(f"{method} {route}" if has_route else method)
    server = scope.get("server") or ("", None)
    attributes = {
        "http.request.method": method if method != "other" else "_OTHER",
        "url.path": scope["path"][:PATH_CHARACTERS].encode(errors="backslashreplace").decode(),
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope.get("http_version", ""),
        "server.address": server[0],
        "http.response.header.x-request-id": [request_id],
    }
    if has_route:
        attributes["http.route"] = route
    if server[1] is not None:
        attributes["server.port"] = server[1]
    if status.isdigit():
        attributes["http.response.status_code"] = int(status)
    if not status.isdigit() or status >= "500":
        attributes["error.type"] = status
        span.set_status(Status(StatusCode.ERROR))
    span.set_attributes(attributes)


class GenerationSpan:
    """The span of the replies to one request.

    model: the name that was asked for; prompts: at least one; choices: how many replies each of them has in a row;
    began: when the request was admitted, in Unix nanoseconds."""

    def __init__(self, model: str, prompts: Sequence[Prompt], choices: int, began: int) -> None:
        operation, sampling = _operation(prompts[0]), prompts[0].sampling
        self._span = TRACER.start_span(f"{operation} {model}", kind=SpanKind.INTERNAL, start_time=began)
        self._first, self._began = True, began
        if self._span.is_recording():
            asked = {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "fortwo",
                "gen_ai.request.model": model,
                "gen_ai.response.model": prompts[0].base,
                "fortwo.adapter.digest": prompts[0].adapter,
                "gen_ai.request.choice.count": choices,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.seed": sampling.seed,
            }
            self._span.set_attributes({name: value for name, value in asked.items() if value is not None})

    def token(self) -> None:
        """Called for each piece of a reply, on any thread: the first one is an event."""
        if self._first:
            self._first = False
            seconds = (time.time_ns() - self._began) / 1e9
            self._span.add_event("gen_ai.first_token", {"gen_ai.server.time_to_first_token": seconds})

    def end(self, usage: Mapping[str, Any], generations: Sequence[Generation], failure: FortwoError | None) -> None:
        """usage: OpenAI's usage object; failure: why the request failed, if it did. Only the first call counts."""
        if not self._span.is_recording():
            return
        reasons = [one.finish_reason for one in generations]
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
                "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "gen_ai.response.finish_reasons": [reason or "cancelled" for reason in reasons],
            }
        )
        if failure is not None:
            self._span.set_attribute("error.type", failure.code)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _operation(prompt: Prompt) -> str:
    """Its well-known name in the conventions."""
    if prompt.embed:
        return "embeddings"
    return "text_completion" if prompt.continues else "chat"
