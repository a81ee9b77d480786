"""The native API: adapters, and training jobs with their events."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from fortwo.adapters.reader import Damage
from fortwo.data.preview import preview
from fortwo.errors import Conflict, InvalidAdapter, NotFound
from fortwo.hub.datasets import DatasetReference, find
from fortwo.jobs.store import Job
from fortwo.records import AdapterVersion, Json
from fortwo.server import sse
from fortwo.server.idempotency import key_of
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep
from fortwo.server.workers import Check
from fortwo.train.next_try import next_try
from fortwo.train.plan import to_json
from fortwo.train.repeat import request_of
from fortwo.train.request import TrainingRequest

LARGEST_ID = 2**63 - 1  # that a database can hold

router = APIRouter(prefix="/api", route_class=JsonRoute)


@router.get("/adapters", tags=["adapters"], summary="All versions of all adapters")
def adapters(state: AppStateDep) -> Json:
    """`damaged` lists files of adapters that cannot be read, each with a remedy; `deleted` what can be restored."""
    found = {name: state.adapters.inspect(name) for name in state.adapters.names()}
    return {
        "adapters": [version_body(state, version) for versions, _ in found.values() for version in versions],
        "damaged": [body for name, (_, damage) in found.items() for body in _damaged(name, damage)],
        "deleted": state.adapters.deleted(),
    }


@router.get("/adapters/{name}", tags=["adapters"], summary="An adapter and its versions, or one as name@version")
def adapter(state: AppStateDep, name: str) -> Json:
    """`manifest` is that of the named version, or of the current one, or null."""
    bare, at, _ = name.partition("@")
    named = state.adapters.get(name) if at else None
    if not state.adapters.has(bare):
        state.adapters.get(bare)  # raises NotFound
    versions, damage = state.adapters.inspect(bare)
    current = next((version for version in versions if version.current), None)
    shown = current if named is None else named
    return {
        "name": bare,
        "current": None if current is None else current.version,
        "manifest": None if shown is None else shown.manifest,
        "versions": [version_body(state, version) for version in versions],
        "damaged": _damaged(bare, damage),
    }


def _damaged(name: str, damage: list[Damage]) -> list[Json]:
    """version: None for the file that says which version is current."""
    return [
        {"name": name, "version": version, "message": error.message, "hint": error.hint} for version, error in damage
    ]


@router.delete("/adapters/{name}", tags=["adapters"], summary="Delete an adapter, or one version as name@version")
async def delete_adapter(request: Request, state: AppStateDep, name: str, permanently: bool = False) -> Json:
    """A deleted version can be restored for some days, unless it is deleted permanently."""
    await state.control.run(request, lambda _: state.registry.delete_adapter(name, permanently=permanently))
    return {"name": name, "deleted": True}


@router.post("/adapters/{name}/load", tags=["adapters"], summary="Load an adapter, and its base if necessary")
async def load_adapter(request: Request, state: AppStateDep, name: str) -> Json:
    return await state.control.run(request, lambda _: version_body(state, state.registry.load_adapter(name)))


@router.post("/adapters/{name}/unload", tags=["adapters"], summary="Unload an adapter; it stays on disk")
async def unload_adapter(request: Request, state: AppStateDep, name: str) -> Json:
    await state.control.run(request, lambda _: state.registry.unload_adapter(name))
    return await run_in_threadpool(lambda: version_body(state, state.adapters.get(name)))


@router.post("/adapters/{name}/rollback", tags=["adapters"], summary="Make the previous version current again")
def rollback(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.rollback(name))


@router.get(
    "/adapters/{name}/report", tags=["adapters"], summary="The evaluation's report, the plan, the actual values"
)
def report(state: AppStateDep, name: str, version: Annotated[int | None, Query(ge=1)] = None) -> Json:
    """That of the named version (by `version` or as name@version), or of the latest one, current or not."""
    found = reported_version(state, name if version is None else f"{name}@{version}")
    of_manifest = {key: found.manifest[key] for key in ("report", "plan", "actual")}
    return {"name": found.name, "version": found.version} | of_manifest


def reported_version(state: AppState, name: str) -> AdapterVersion:
    """The version whose report `name` means: name@version, or the latest one. Raises NotFound if it has none."""
    if "@" in name:
        found = state.adapters.get(name)
    elif whole := state.adapters.versions(name):
        found = whole[-1]
    else:
        raise InvalidAdapter(
            f"Every version of adapter {name!r} is damaged on disk.",
            param="name",
            hint=f"Restore {state.settings.adapters_dir / name} from a backup, or delete it and train it again.",
        )
    if found.manifest.get("report") is None:
        raise NotFound(f"{found.id} has no report.", param="name", hint="Only adapters trained here have one.")
    return found


@router.post("/training/plan", tags=["training"], summary="The plan for a training request, without starting it")
async def plan(request: Request, state: AppStateDep, body: TrainingRequest) -> Json:
    readers = state.readers(*body.datasets.values())
    return await readers.run(request, lambda check: to_json(state.runner.plan(body, check)))


@router.post("/training/start", tags=["training"], status_code=202, summary="Plan and queue a training job")
async def start(request: Request, state: AppStateDep, body: TrainingRequest) -> Json:
    key = key_of(request, await request.body())

    def submit(check: Check) -> Json:
        return state.answers.once(key, lambda also: state.runner.submit(body, check, also=also), _started)

    return await state.readers(*body.datasets.values()).run(request, submit)


def _started(job: Job) -> Json:
    return {"job_id": job.id, "status": job.status, "plan": job.plan}


class PreviewRequest(BaseModel):
    """model: None for the server's default model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Json = Field(description='One of {"path"}, {"file_id"}, {"hub"}, {"examples"}, {"facts"}.')
    model: str | None = Field(None, min_length=1, description="The model whose tokenizer and chat template are used.")
    rows: int = Field(5, ge=1, le=100, description="The number of rows to show, from the first.")


@router.post("/data/preview", tags=["training"], summary="The first rows of a dataset as they are trained on")
async def preview_data(request: Request, state: AppStateDep, body: PreviewRequest) -> Json:
    """Rows as segments with role, supervised, tokens and text. No model is loaded."""
    model = state.settings.default_model if body.model is None else body.model

    def work(check: Check) -> Json:
        source, folders = state.files.source(body.dataset, state.settings.allowed_data_dirs, check)
        return asdict(preview(source, folders, state.catalog, model, body.rows, check))

    return await state.readers(body.dataset).run(request, work)


@router.get("/data/hub", tags=["training"], summary="What would be downloaded for a dataset of the Hugging Face hub")
async def hub_dataset(
    request: Request,
    state: AppStateDep,
    hub: Annotated[str, Query(min_length=1, description="OWNER/NAME, with @REVISION and :FILE or :CONFIG/SPLIT.")],
) -> Json:
    """The commit, the licence, and the files with their sizes. Nothing is downloaded."""
    return await state.planning.run(request, lambda _: find(DatasetReference.parse(hub)).body())


@router.get("/training/jobs", tags=["training"], summary="Jobs, newest first")
def jobs(state: AppStateDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    return {"jobs": [job_body(state, job) for job in state.jobs.jobs(limit)]}


@router.get("/training/jobs/{job_id}", tags=["training"], summary="One job")
def job(state: AppStateDep, job_id: str) -> Json:
    return job_body(state, state.jobs.get(job_id))


@router.post("/training/jobs/{job_id}/cancel", tags=["training"], summary="Cancel a job and delete its checkpoints")
async def cancel(request: Request, state: AppStateDep, job_id: str) -> Json:
    return await state.control.run(request, lambda _: job_body(state, state.runner.cancel(job_id)))


@router.post("/training/jobs/{job_id}/pause", tags=["training"], summary="Pause a job with a checkpoint")
async def pause(request: Request, state: AppStateDep, job_id: str) -> Json:
    """The job stops after its current step, and the next job in the queue begins. A queued job leaves the queue."""
    return await state.control.run(request, lambda _: job_body(state, state.runner.pause(job_id)))


@router.post("/training/jobs/{job_id}/resume", tags=["training"], summary="Queue a job again, from its last checkpoint")
async def resume(request: Request, state: AppStateDep, job_id: str) -> Json:
    """For a paused, failed or cancelled job; without a checkpoint it starts from the beginning."""
    return await state.control.run(request, lambda _: job_body(state, state.runner.resume(job_id)))


@router.post("/training/jobs/{job_id}/run-next", tags=["training"], summary="Put a queued job at the head of the queue")
def run_next(state: AppStateDep, job_id: str) -> Json:
    state.jobs.put_first(job_id)
    return job_body(state, state.jobs.get(job_id))


@router.get("/training/jobs/{job_id}/request", tags=["training"], summary="The request of a job, to be sent again")
def job_request(state: AppStateDep, job_id: str) -> Json:
    """The body of /api/training/start with the rows and the settings that were given. Of a large file it has the
    path, or the id of an uploaded one."""
    return _request(state, state.jobs.get(job_id))


@router.get("/training/jobs/{job_id}/next-try", tags=["training"], summary="The request of a failed job, changed")
def job_next_try(state: AppStateDep, job_id: str) -> Json:
    """`request` is a body of /api/training/start without the given settings that the diagnosis blames; `changes` lists
    them as {setting, value}, with null where the plan decides. Raises Conflict for a job that has not failed."""
    job = state.jobs.get(job_id)
    if job.status != "failed":
        raise Conflict(
            f"The status of job {job_id} is {job.status}.", param="job_id", hint="Only a failed job has a next try."
        )
    findings = (job.report or {}).get("diagnosis", [])
    codes = [one["code"] for one in (*findings, *([] if job.error is None else [job.error]))]
    body, changes = next_try(_request(state, job), codes)
    return {"request": body, "changes": changes}


def _request(state: AppState, job: Job) -> Json:
    body = request_of(job.plan, state.jobs.dataset(job.id))
    sources = {field: body[field] for field in ("dataset", "validation_dataset") if field in body}
    return body | {field: state.files.as_given(source) for field, source in sources.items()}


@router.get(
    "/training/jobs/{job_id}/events", tags=["training"], response_model=None, summary="Events as they happen (SSE)"
)
async def events(
    state: AppStateDep, job_id: str, last_event_id: Annotated[int, Header(ge=0, le=LARGEST_ID)] = 0
) -> Response:
    """Every event after Last-Event-ID, then those to come. The stream ends when the job has ended or is paused.

    204 tells a browser's EventSource, which reconnects by itself, that no more events will come.
    """
    feeds = state.job_events
    feeds.open(job_id)
    try:
        over = (await feeds.read(job_id, last_event_id)).over
    except BaseException:
        feeds.release(job_id)
        raise
    if over:
        feeds.release(job_id)
        return Response(status_code=204)
    return sse.EventStream(feeds.stream(job_id, last_event_id), on_close=partial(feeds.release, job_id))


def version_body(state: AppState, version: AdapterVersion) -> Json:
    loaded = state.registry.state().adapters.get(version.digest)
    return {
        "name": version.name,
        "version": version.version,
        "current": version.current,
        "tags": version.tags,
        "protected": version.protected,
        "parent": version.manifest.get("parent"),
        "state": "on disk" if loaded is None else "loaded",
        "base_model": version.base_model,
        "base_digest": version.base_digest,
        "digest": version.digest,
        "created_at": version.created_at,
        "bytes": None if loaded is None else loaded.bytes,
    }


def job_body(state: AppState, job: Job) -> Json:
    """queue_position: of a queued job, 1 for the next one; otherwise null. checkpoints: oldest first, each with its
    name as `model` of a chat request; none once the job is done."""
    body = asdict(job)
    del body["queued_at"], body["owner"]
    checkpoints = [
        {"step": version.version, "model": version.id, "created_at": version.created_at}
        for version in state.checkpoints.of_job(job.id)
    ]
    place = queue_position(state.jobs.queue(), job.id) if job.status == "queued" else None
    return {"job_id": body.pop("id"), **body, "queue_position": place, "checkpoints": checkpoints}


def queue_position(queue: list[str], job_id: str) -> int | None:
    """1 for the next job; None for one that is in another server's queue, or has just left this one."""
    return queue.index(job_id) + 1 if job_id in queue else None
