"""Reports of jobs and of versions as HTML pages."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from fortwo.records import Json
from fortwo.server.native import reported_version
from fortwo.server.report_page import ReportPage
from fortwo.server.state import AppState, AppStateDep

PAGE_OF_EVENTS = 1000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

router = APIRouter(prefix="/api", default_response_class=HTMLResponse)


@router.get("/training/jobs/{job_id}/report.html", tags=["training"], summary="A job's report as one HTML page")
def job_report(state: AppStateDep, job_id: str) -> HTMLResponse:
    """Verdict, metrics, curves, transcripts, plan against actual values and settings, as far as there are any yet. The
    page loads nothing from anywhere."""
    job = state.jobs.get(job_id)
    name = job.adapter_name if job.adapter is None else f"{job.adapter['name']}@{job.adapter['version']}"
    made = job.created_at if job.finished_at is None else job.finished_at
    page = ReportPage(name, job.status, made, job.plan, job.actual, job.report, job.error, *_curves(state, job_id))
    return _response(page)


@router.get("/adapters/{name}/report.html", tags=["adapters"], summary="A version's report as one HTML page")
def version_report(state: AppStateDep, name: str) -> HTMLResponse:
    """That of name@version, or of the latest one, current or not. The curves are there as long as the job is in the
    database."""
    version = reported_version(state, name)
    manifest = version.manifest
    status = "current" if version.current else "not current"
    plan, actual, report = (manifest[key] for key in ("plan", "actual", "report"))
    curves = _curves(state, manifest.get("job_id"))
    return _response(ReportPage(version.id, status, version.created_at, plan, actual, report, None, *curves))


def _curves(state: AppState, job_id: str | None) -> tuple[list[Json], list[Json]]:
    """The data of the job's steps and evaluations; none if the database does not have it."""
    steps: list[Json] = []
    evaluations: list[Json] = []
    last, more = 0, job_id is not None
    while more:
        assert job_id is not None
        events = state.jobs.events(job_id, last, PAGE_OF_EVENTS, types=("step", "metrics"))
        steps += [event.data for event in events if event.type == "step"]
        evaluations += [event.data for event in events if event.type == "metrics"]
        more = len(events) == PAGE_OF_EVENTS
        last = events[-1].id if events else last
    return steps, evaluations


def _response(page: ReportPage) -> HTMLResponse:
    return HTMLResponse(page.html().encode(errors="backslashreplace"), headers=HEADERS)
