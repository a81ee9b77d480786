"""The native API: base models, adapters, and training jobs with their events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from fortwo.data.preview import preview
from fortwo.errors import InvalidAdapter, NotFound
from fortwo.hub.catalog import ModelEntry
from fortwo.jobs.store import Job
from fortwo.records import AdapterVersion, Json
from fortwo.server import sse
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep
from fortwo.train.plan import to_json
from fortwo.train.request import TrainingRequest

POLL_SECONDS = 0.2  # the longest delay of an event

router = APIRouter(prefix="/api", route_class=JsonRoute)


@router.get("/models", tags=["models"], summary="Base models and their state")
def models(state: AppStateDep) -> Json:
    return {"models": [model_body(state, entry) for entry in state.catalog.entries()]}


@router.post("/models/{id}/load", tags=["models"], summary="Load a base model, fetching it first if necessary")
def load_model(state: AppStateDep, id: str) -> Json:
    state.registry.load_base(id)
    return model_body(state, state.catalog.get(id))


@router.post("/models/{id}/unload", tags=["models"], summary="Unload a base model and the adapters on it")
def unload_model(state: AppStateDep, id: str) -> Json:
    state.registry.unload_base(id)
    return model_body(state, state.catalog.get(id))


@router.get("/adapters", tags=["adapters"], summary="All versions of all adapters")
def adapters(state: AppStateDep) -> Json:
    names = state.adapters.names()
    return {"adapters": [version_body(state, version) for name in names for version in state.adapters.versions(name)]}


@router.get("/adapters/{name}", tags=["adapters"], summary="An adapter and its versions, or one as name@version")
def adapter(state: AppStateDep, name: str) -> Json:
    """`manifest` is that of the named version, or of the current one, or null."""
    bare, at, _ = name.partition("@")
    named = state.adapters.get(name) if at else None
    versions = state.adapters.versions(bare)
    current = next((version for version in versions if version.current), None)
    shown = current if named is None else named
    return {
        "name": bare,
        "current": None if current is None else current.version,
        "manifest": None if shown is None else shown.manifest,
        "versions": [version_body(state, version) for version in versions],
    }


@router.delete("/adapters/{name}", tags=["adapters"], summary="Delete an adapter, or one version as name@version")
def delete_adapter(state: AppStateDep, name: str) -> Json:
    state.registry.delete_adapter(name)
    return {"name": name, "deleted": True}


@router.post("/adapters/{name}/load", tags=["adapters"], summary="Load an adapter, and its base if necessary")
def load_adapter(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.registry.load_adapter(name))


@router.post("/adapters/{name}/unload", tags=["adapters"], summary="Unload an adapter; it stays on disk")
def unload_adapter(state: AppStateDep, name: str) -> Json:
    state.registry.unload_adapter(name)
    return version_body(state, state.adapters.get(name))


@router.post("/adapters/{name}/rollback", tags=["adapters"], summary="Make the previous version current again")
def rollback(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.rollback(name))


@router.get(
    "/adapters/{name}/report", tags=["adapters"], summary="The evaluation's report, the plan, the actual values"
)
def report(state: AppStateDep, name: str, version: Annotated[int | None, Query(ge=1)] = None) -> Json:
    """That of the named version (by `version` or as name@version), or of the latest one, current or not."""
    if version is not None:
        found = state.adapters.get(f"{name}@{version}")
    elif "@" in name:
        found = state.adapters.get(name)
    elif whole := state.adapters.versions(name):
        found = whole[-1]
    else:
        raise InvalidAdapter(
            f"Every version of adapter {name!r} is damaged on disk.",
            param="name",
            hint=f"Restore {state.settings.adapters_dir / name} from a backup, or delete it and train it again.",
        )
    manifest = found.manifest
    if manifest.get("report") is None:
        raise NotFound(f"{found.id} has no report.", param="name", hint="Only adapters trained here have one.")
    return {"name": found.name, "version": found.version} | {key: manifest[key] for key in ("report", "plan", "actual")}


@router.post("/training/plan", tags=["training"], summary="The plan for a training request, without starting it")
def plan(state: AppStateDep, body: TrainingRequest) -> Json:
    return to_json(state.runner.plan(body))


@router.post("/training/start", tags=["training"], status_code=202, summary="Plan and queue a training job")
def start(state: AppStateDep, body: TrainingRequest) -> Json:
    job = state.runner.submit(body)
    return {"job_id": job.id, "status": job.status, "plan": job.plan}


class PreviewRequest(BaseModel):
    """model: None for the server's default model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Json = Field(description='One of {"path"}, {"file_id"}, {"examples"}, {"facts"}.')
    model: str | None = Field(None, min_length=1, description="The model whose tokenizer and chat template are used.")
    rows: int = Field(5, ge=1, le=100, description="The number of rows to show, from the first.")


@router.post("/data/preview", tags=["training"], summary="The first rows of a dataset as they are trained on")
def preview_data(state: AppStateDep, body: PreviewRequest) -> Json:
    """Rows as segments with role, supervised, tokens and text. No model is loaded."""
    model = state.settings.default_model if body.model is None else body.model
    return asdict(preview(body.dataset, state.settings.allowed_data_dirs, state.catalog, model, body.rows))


@router.get("/training/jobs", tags=["training"], summary="Jobs, newest first")
def jobs(state: AppStateDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    return {"jobs": [job_body(state, job) for job in state.jobs.jobs(limit)]}


@router.get("/training/jobs/{job_id}", tags=["training"], summary="One job")
def job(state: AppStateDep, job_id: str) -> Json:
    return job_body(state, state.jobs.get(job_id))


@router.post("/training/jobs/{job_id}/cancel", tags=["training"], summary="Cancel a job and delete its checkpoints")
def cancel(state: AppStateDep, job_id: str) -> Json:
    return job_body(state, state.runner.cancel(job_id))


@router.post("/training/jobs/{job_id}/pause", tags=["training"], summary="Pause a job with a checkpoint")
def pause(state: AppStateDep, job_id: str) -> Json:
    """The job stops after its current step, and the next job in the queue begins. A queued job leaves the queue."""
    return job_body(state, state.runner.pause(job_id))


@router.post("/training/jobs/{job_id}/resume", tags=["training"], summary="Queue a job again, from its last checkpoint")
def resume(state: AppStateDep, job_id: str) -> Json:
    """For a paused, failed or cancelled job; without a checkpoint it starts from the beginning."""
    return job_body(state, state.runner.resume(job_id))


@router.get(
    "/training/jobs/{job_id}/events", tags=["training"], response_model=None, summary="Events as they happen (SSE)"
)
async def events(state: AppStateDep, job_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> Response:
    """Every event after Last-Event-ID, then those to come. The stream ends when the job has ended or is paused.

    204 tells a browser's EventSource, which reconnects by itself, that no more events will come.
    """
    ended_or_paused = (await run_in_threadpool(state.jobs.get, job_id)).ended_or_paused
    if ended_or_paused and not await run_in_threadpool(state.jobs.events, job_id, last_event_id, 1):
        return Response(status_code=204)
    return sse.EventStream(_events(state, job_id, last_event_id))


async def _events(state: AppState, job_id: str, last: int) -> AsyncIterator[bytes]:
    while not state.admission.closed:
        # The status is read first, because a job's last event is written together with its last status.
        ended_or_paused = (await run_in_threadpool(state.jobs.get, job_id)).ended_or_paused
        while news := await run_in_threadpool(state.jobs.events, job_id, last):
            for event in news:
                data = asdict(event)
                del data["job_id"]
                yield sse.encode(data, id=event.id, event=event.type)
            last = news[-1].id
        if ended_or_paused:
            return
        await anyio.sleep(POLL_SECONDS)


def model_body(state: AppState, entry: ModelEntry) -> Json:
    """state: not fetched, on disk, loading or loaded. bytes: the size in memory if it is loaded, otherwise on disk."""
    loaded = state.registry.state().models.get(entry.id)
    info = state.catalog.model_info(entry.id)
    return {
        "id": entry.id,
        "state": loaded.state if loaded is not None else "not fetched" if info is None else "on disk",
        "source": entry.source,
        "description": entry.description,
        "origin": entry.origin,
        "digest": None if info is None else info.digest,
        "parameters": None if info is None else info.parameters,
        "bytes": loaded.bytes if loaded is not None else None if info is None else info.bytes,
    }


def version_body(state: AppState, version: AdapterVersion) -> Json:
    loaded = state.registry.state().adapters.get(version.digest)
    return {
        "name": version.name,
        "version": version.version,
        "current": version.current,
        "state": "on disk" if loaded is None else "loaded",
        "base_model": version.base_model,
        "base_digest": version.base_digest,
        "digest": version.digest,
        "created_at": version.created_at,
        "bytes": None if loaded is None else loaded.bytes,
    }


def job_body(state: AppState, job: Job) -> Json:
    """checkpoints: oldest first, each with its name as `model` of a chat request; none once the job is done."""
    body = asdict(job)
    del body["queued_at"]
    checkpoints = [
        {"step": version.version, "model": version.id, "created_at": version.created_at}
        for version in state.checkpoints.of_job(job.id)
    ]
    return {"job_id": body.pop("id"), **body, "checkpoints": checkpoints}
