"""Sends spans to an OpenTelemetry collector, if the standard OTEL_* variables ask for it. The exporter is an extra."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version

from opentelemetry import trace

from fortwo.errors import InvalidRequest, all_of

FLUSH_SECONDS = 5.0  # that a server which ends waits for a collector
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter")


def wants_export(variables: Mapping[str, str]) -> bool:
    """Whether these variables ask for spans to be sent. Raises InvalidRequest, with all findings, for a way of sending
    them that fortwo does not have."""
    given = {name: value.strip() for name, value in variables.items() if name.startswith("OTEL_") and value.strip()}
    if given.get("OTEL_SDK_DISABLED", "").lower() == "true" or given.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    if not any(name in given for name in (*ENDPOINTS, "OTEL_TRACES_EXPORTER")):
        return False
    allowed = {
        "OTEL_TRACES_EXPORTER": {"otlp"},
        **{name: {"http/protobuf"} for name in PROTOCOLS},
        "OTEL_PROPAGATORS": {"tracecontext", "baggage"},
    }
    found = [
        InvalidRequest(
            f"{name} = {given[name]!r} is not supported.",
            param=name,
            hint=f"Set it to {' or '.join(sorted(values, reverse=True))}, or unset it.",
        )
        for name, values in allowed.items()
        if name in given and not {one.strip() for one in given[name].split(",")} <= values
    ]
    if found:
        raise all_of(found)
    return True


def start(variables: Mapping[str, str]) -> Callable[[], None]:
    """Send the spans of this process from now on, if the variables ask for it. Returns what sends the last ones and
    ends it. Raises InvalidRequest as wants_export does, and when the packages are missing."""
    if not wants_export(variables):
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(PACKAGES):
            raise
        raise InvalidRequest(
            "OTEL_* variables ask for spans to be exported, but the exporter of OpenTelemetry is not installed.",
            param="OTEL_EXPORTER_OTLP_ENDPOINT",
            hint="Install it: pip install 'fortwo[otel]'. Or set OTEL_SDK_DISABLED=true.",
        ) from None
    ours = Resource.create({"service.name": "fortwo", "service.version": version("fortwo")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def flush() -> None:
        """A collector that does not answer must not keep the server from ending."""
        ending = threading.Thread(target=provider.shutdown, name="fortwo-spans", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)

    return flush
