"""Spans of requests, generations and jobs, in memory and at a real receiver of OTLP over HTTP; none has a prompt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import Served, serve, tiny_settings

from fortwo.errors import InvalidRequest
from fortwo.server import telemetry
from tests.test_resume import process
from tests.test_server_training import start

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "a prompt that nobody else may read"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """The spans of this process from now on; a process has one provider of tracers."""
    found = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(found))
    trace.set_tracer_provider(provider)
    return found


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


@pytest.fixture(scope="module")
def traced(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("traced"), tiny)) as served:
        yield served


def named(spans: InMemorySpanExporter, name: str, count: int = 1) -> list[ReadableSpan]:
    """The spans of this name. The last ones end after their responses, so they are waited for."""
    deadline = time.monotonic() + 60
    while True:
        found = [span for span in spans.get_finished_spans() if span.name == name]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, [span.name for span in spans.get_finished_spans()]
        time.sleep(0.01)


def test_a_request_and_its_generation_are_spans_of_the_callers_trace(
    traced: Served, spans: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "ignore_eos": True}
    usage = traced.http.post("/v1/chat/completions?key=sesame", json=body, headers=headers).json()["usage"]
    (server,) = named(spans, "POST /v1/chat/completions")
    (generation,) = named(spans, "chat tiny")
    assert server.kind == SpanKind.SERVER
    assert server.parent is not None
    assert (f"{server.parent.trace_id:032x}", f"{server.parent.span_id:016x}") == (TRACE, PARENT)
    assert generation.parent == server.context
    assert server.attributes is not None
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "127.0.0.1",
        "server.port": int(traced.url.rpartition(":")[2]),
        "http.response.status_code": 200,
        "http.response.header.x-request-id": ("mine",),
    }
    found = dict(generation.attributes or {})
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "tiny"
    assert found["gen_ai.request.max_tokens"] == 5
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] > 0
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    (first,) = generation.events
    assert first.name == "gen_ai.first_token"
    assert generation.start_time is not None
    assert generation.end_time is not None
    assert generation.start_time < first.timestamp < generation.end_time
    for secret in (SECRET, "sesame"):
        assert all(secret not in span.to_json() for span in spans.get_finished_spans())


def test_the_next_request_of_a_connection_is_of_no_trace_but_its_own(
    traced: Served, spans: InMemorySpanExporter
) -> None:
    traced.http.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    traced.http.get("/v1/models")
    traced.http.get("/v1/models", headers={"traceparent": "00-broken-01"})
    _, *others = named(spans, "GET /v1/models", 3)
    assert len({span.context.trace_id for span in others if span.context is not None}) == 2
    for span in others:
        assert span.parent is None
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" != TRACE


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True, "n": 2}, "chat"),
        ("/v1/completions", {"prompt": ["x", "y"], "stream": True}, "text_completion"),
        ("/v1/responses", {"input": "x", "stream": True}, "chat"),
        ("/v1/embeddings", {"input": "x"}, "embeddings"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}, "chat"),
        ("/completion", {"prompt": "x", "n_predict": 3}, "text_completion"),
    ],
)
def test_every_kind_of_generation_has_one_span(
    traced: Served, spans: InMemorySpanExporter, path: str, body: dict[str, Any], operation: str
) -> None:
    assert traced.post(path, {"model": "tiny", **body}).status_code == 200
    (generation,) = named(spans, f"{operation} tiny")
    found = dict(generation.attributes or {})
    assert found["gen_ai.usage.input_tokens"] > 0
    assert (found["gen_ai.usage.output_tokens"] > 0) == (operation != "embeddings")
    replies = body.get("n") or (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
    assert len(found["gen_ai.response.finish_reasons"]) == replies
    assert [event.name for event in generation.events] == ([] if operation == "embeddings" else ["gen_ai.first_token"])


def test_what_failed_has_the_status_error(
    traced: Served, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise RuntimeError(SECRET)

    traced.http.get("/v1/models/nobody")
    monkeypatch.setattr(traced.state.catalog, "entries", explode)
    traced.http.get("/api/models")
    (missing,), (failed,) = named(spans, "GET /v1/models/{model}"), named(spans, "GET /api/models")
    assert missing.status.status_code == StatusCode.UNSET  # the client's mistake
    assert (missing.attributes or {})["http.response.status_code"] == 404
    assert failed.status.status_code == StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "500"
    assert SECRET not in failed.to_json()


def test_a_client_that_leaves_ends_its_spans(traced: Served, spans: InMemorySpanExporter) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 900, "ignore_eos": True}
    with traced.http.stream("POST", "/v1/chat/completions", json={"model": "tiny", **body}) as response:
        next(response.iter_lines())
    named(spans, "POST /v1/chat/completions")
    (generation,) = named(spans, "chat tiny")
    assert 0 <= (generation.attributes or {})["gen_ai.usage.output_tokens"] < 900


def test_a_job_is_a_span_with_its_phases(traced: Served, spans: InMemorySpanExporter) -> None:
    job = traced.wait(start(traced, "spanned", training_config={"max_steps": 2})["job_id"])
    (whole,) = named(spans, "job")
    phases = [span for span in spans.get_finished_spans() if span.name.startswith("job ")]
    assert [span.name for span in phases] == ["job preparing", "job running", "job evaluating", "job publishing"]
    assert all(span.parent == whole.context for span in phases)
    (asked,) = named(spans, "POST /api/training/start")
    for span in (whole, asked, *phases):
        assert (span.attributes or {})["fortwo.job.id"] == job["job_id"]
    assert (whole.attributes or {})["fortwo.job.status"] == job["status"] == "succeeded"
    assert whole.status.status_code == StatusCode.UNSET


def test_a_job_that_failed_says_why_in_its_span(traced: Served, spans: InMemorySpanExporter) -> None:
    objective = {"type": "override", "targets": {"efficacy": 1.0}}
    facts = {"facts": [{"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}]}
    asked = start(traced, "missed", objective=objective, dataset=facts, training_config={"max_steps": 1})
    job = traced.wait(asked["job_id"], seconds=120)
    (whole,) = named(spans, "job")
    assert job["error"]["code"] == (whole.attributes or {})["error.type"] == "targets_missed"
    assert whole.status.status_code == StatusCode.ERROR


class Receiver(ThreadingHTTPServer):
    """A collector that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[ExportTraceServiceRequest] = []


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_a_server_sends_its_spans_to_a_collector(
    tiny: Path, tmp_path: Path, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_settings(tmp_path, tiny)
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OTEL_BSP_SCHEDULE_DELAY": "60000",  # what is not sent at the end is missing
        "FORTWO_LOG_FORMAT": "json",
    }
    with process(tmp_path, **variables) as (server, http):
        body = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    resources = [resource for request in receiver.received for resource in request.resource_spans]
    attributes = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert attributes["service.name"] == "fortwo"
    assert attributes["deployment.environment.name"] == "test"
    found = {span.name: span for one in resources for scope in one.scope_spans for span in scope.spans}
    chat = found["POST /v1/chat/completions"]
    assert chat.trace_id.hex() == found["chat tiny"].trace_id.hex() == TRACE
    assert all(SECRET not in str(request) for request in receiver.received)
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (line,) = (line for line in logged if line.get("route") == "/v1/chat/completions")
    assert (line["trace_id"], line["span_id"]) == (TRACE, chat.span_id.hex())


def test_a_collector_that_is_gone_holds_nothing_up(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_settings(tmp_path, tiny)
    with process(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9") as (server, http):
        assert http.get("/v1/models").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == -signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_SERVICE_NAME": "mine"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_PROPAGATORS": "tracecontext,baggage"}, True),
    ],
)
def test_the_standard_variables_say_whether_spans_are_sent(variables: dict[str, str], wanted: bool) -> None:
    assert telemetry.wants_export(variables) is wanted


def test_ways_of_sending_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as caught:
        telemetry.wants_export(
            {
                "OTEL_TRACES_EXPORTER": "zipkin",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_PROPAGATORS": "b3,tracecontext",
            }
        )
    for said in ("OTEL_TRACES_EXPORTER = 'zipkin'", "OTEL_EXPORTER_OTLP_PROTOCOL = 'grpc'", "'b3,tracecontext'"):
        assert said in caught.value.message
    assert "http/protobuf" in (caught.value.hint or "")


def test_without_the_exporter_the_server_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None; from fortwo.cli import app; "
        "app(['serve', '--port', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "FORTWO_HOME": str(tmp_path), "OTEL_TRACES_EXPORTER": "otlp"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'fortwo[otel]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
