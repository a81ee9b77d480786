"""Spans of OpenTelemetry for jobs: one for each run of a job, and in it one for each of its phases. All have the job's
id, as has the span of the request that made the job."""

from __future__ import annotations

from types import TracebackType

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode

from fortwo.jobs.store import Job
from fortwo.records import Json

JOB_ID = "fortwo.job.id"
_TRACER = trace.get_tracer("fortwo")


def name_request_of(job_id: str) -> None:
    """Note in the current span, which is that of a request, the job that it made."""
    trace.get_current_span().set_attribute(JOB_ID, job_id)


class JobSpan:
    """The span of one run of a job, from entering the context to leaving it; what the job does there belongs to it."""

    def __init__(self, job: Job) -> None:
        self._attributes = {JOB_ID: job.id, "gen_ai.request.model": job.model, "fortwo.adapter.name": job.adapter_name}
        self._span: Span = trace.INVALID_SPAN
        self._phase: tuple[str, Span] | None = None

    def __enter__(self) -> JobSpan:
        self._span = _TRACER.start_span("job", Context(), attributes=self._attributes)
        self._token = context.attach(trace.set_span_in_context(self._span))
        self.enter_phase("preparing")
        return self

    def enter_phase(self, name: str) -> None:
        """End the phase before, unless it is the same."""
        if self._phase is not None and self._phase[0] == name:
            return
        self._end_phase()
        inside = trace.set_span_in_context(self._span)
        self._phase = name, _TRACER.start_span(f"job {name}", inside, attributes=self._attributes)

    def note_end(self, status: str, error: Json | None = None) -> None:
        """How this run of the job ended: the job's status, and its error."""
        self._span.set_attribute("fortwo.job.status", status)
        if error is not None:
            self._span.set_attribute("error.type", error["code"])
            self._span.set_status(Status(StatusCode.ERROR))

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase[1].end()
            self._phase = None

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_phase()
        self._span.end()
        context.detach(self._token)
