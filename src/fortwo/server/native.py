"""The native API: base models, adapters, and training jobs with their events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse

from fortwo.data.preview import preview
from fortwo.errors import InvalidAdapter, NotFound
from fortwo.hub.catalog import Entry
from fortwo.jobs.store import Event, Job
from fortwo.records import AdapterVersion, Json
from fortwo.server.state import AppStateDep, AppState
from fortwo.train.plan import to_json
from fortwo.train.request import TrainingRequest

POLL_SECONDS = 0.2  # how late an event may be

router = APIRouter(prefix="/api")


@router.get("/models", tags=["models"], summary="Base models: what there is, what is on disk, what is loaded")
def models(state: AppStateDep) -> Json:
    return {"models": [model_body(state, entry) for entry in state.catalog.entries()]}


@router.post("/models/{id}/load", tags=["models"], summary="Load a base model, fetching it first if need be")
def load_model(state: AppStateDep, id: str) -> Json:
    state.registry.load_base(id)
    return model_body(state, state.catalog.get(id))


@router.post("/models/{id}/unload", tags=["models"], summary="Let go of a base model and the adapters on it")
def unload_model(state: AppStateDep, id: str) -> Json:
    state.registry.unload_base(id)
    return model_body(state, state.catalog.get(id))


@router.get("/adapters", tags=["adapters"], summary="All versions of all adapters")
def adapters(state: AppStateDep) -> Json:
    names = state.adapters.names()
    return {"adapters": [version_body(state, one) for name in names for one in state.adapters.versions(name)]}


@router.get("/adapters/{name}", tags=["adapters"], summary="An adapter with its versions, or one as name@version")
def adapter(state: AppStateDep, name: str) -> Json:
    """`manifest` is that of the version named, else of the current one, else null."""
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


@router.post("/adapters/{name}/load", tags=["adapters"], summary="Load an adapter, and its base if need be")
def load_adapter(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.registry.load_adapter(name))


@router.post("/adapters/{name}/unload", tags=["adapters"], summary="Let go of an adapter; it stays on disk")
def unload_adapter(state: AppStateDep, name: str) -> Json:
    state.registry.unload_adapter(name)
    return version_body(state, state.adapters.get(name))


@router.post("/adapters/{name}/rollback", tags=["adapters"], summary="Make the version before current again")
def rollback(state: AppStateDep, name: str) -> Json:
    return version_body(state, state.adapters.rollback(name))


@router.get("/adapters/{name}/report", tags=["adapters"], summary="What the evaluation found, and plan against actual")
def report(state: AppStateDep, name: str, version: Annotated[int | None, Query(ge=1)] = None) -> Json:
    """Of the version named (here, or as name@version), else of the latest, current or not."""
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
        raise NotFound(f"{found.id} has no report.", param="name", hint="Only adapters that were taught here have one.")
    return {"name": found.name, "version": found.version} | {key: manifest[key] for key in ("report", "plan", "actual")}


@router.post("/training/plan", tags=["training"], summary="What a request would do, without doing it")
def plan(state: AppStateDep, body: TrainingRequest) -> Json:
    return to_json(state.runner.plan(body))


@router.post("/training/start", tags=["training"], status_code=202, summary="Plan and queue a training job")
def start(state: AppStateDep, body: TrainingRequest) -> Json:
    job = state.runner.submit(body)
    return {"job_id": job.id, "status": job.status, "plan": job.plan}


class PreviewRequest(BaseModel):
    """`model` None means the server's default model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Json = Field(description='One of {"path"}, {"file_id"}, {"examples"}, {"facts"}.')
    model: str | None = Field(None, min_length=1, description="Whose tokenizer and chat template.")
    rows: int = Field(5, ge=1, le=100, description="How many rows, from the first.")


@router.post(
    "/data/preview", tags=["training"], summary="What the first rows of a dataset are when they are trained on"
)
def preview_data(state: AppStateDep, body: PreviewRequest) -> Json:
    """Rows cut into segments: role, supervised, tokens, text. No model is loaded."""
    model = state.settings.default_model if body.model is None else body.model
    return asdict(preview(body.dataset, state.settings.allowed_data_dirs, state.catalog, model, body.rows))


@router.get("/training/jobs", tags=["training"], summary="Jobs, newest first")
def jobs(state: AppStateDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    return {"jobs": [job_body(state, job) for job in state.jobs.jobs(limit)]}


@router.get("/training/jobs/{job_id}", tags=["training"], summary="One job")
def job(state: AppStateDep, job_id: str) -> Json:
    return job_body(state, state.jobs.get(job_id))


@router.post("/training/jobs/{job_id}/cancel", tags=["training"], summary="Give a job up, with its checkpoints")
def cancel(state: AppStateDep, job_id: str) -> Json:
    return job_body(state, state.runner.cancel(job_id))


@router.post("/training/jobs/{job_id}/pause", tags=["training"], summary="Stop a job for now, with a checkpoint")
def pause(state: AppStateDep, job_id: str) -> Json:
    """Behind the step under way; the next job in the queue begins. A queued job leaves the queue."""
    return job_body(state, state.runner.pause(job_id))


@router.post("/training/jobs/{job_id}/resume", tags=["training"], summary="Queue a job again from its last checkpoint")
def resume(state: AppStateDep, job_id: str) -> Json:
    """A paused job, or one that failed or was cancelled; without a checkpoint it starts from the beginning."""
    return job_body(state, state.runner.resume(job_id))


@router.get(
    "/training/jobs/{job_id}/events", tags=["training"], response_model=None, summary="Events as they happen (SSE)"
)
async def events(state: AppStateDep, job_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> Response:
    """Every event after Last-Event-ID, then those to come; the stream ends when the job has ended or is paused.

    204 tells a browser's EventSource, which connects again by itself, that there is nothing more to come.
    """
    at_rest = (await run_in_threadpool(state.jobs.get, job_id)).at_rest
    if at_rest and not await run_in_threadpool(state.jobs.events, job_id, last_event_id, 1):
        return Response(status_code=204)
    return EventSourceResponse(_follow(state, job_id, last_event_id), sep="\n")


async def _follow(state: AppState, job_id: str, last: int) -> AsyncIterator[Json]:
    while True:
        # The status is read first: a job's last event is written together with its last status.
        at_rest = (await run_in_threadpool(state.jobs.get, job_id)).at_rest
        while news := await run_in_threadpool(state.jobs.events, job_id, last):
            for event in news:
                yield {"id": str(event.id), "event": event.type, "data": json.dumps(event_body(event))}
            last = news[-1].id
        if at_rest:
            return
        await anyio.sleep(POLL_SECONDS)


def model_body(state: AppState, entry: Entry) -> Json:
    """state: not fetched, on disk, loading or loaded. bytes: in memory, of one that is not, on disk."""
    held = state.registry.state().models.get(entry.id)
    card = state.catalog.prepared(entry.id)
    return {
        "id": entry.id,
        "state": held.state if held is not None else "not fetched" if card is None else "on disk",
        "source": entry.source,
        "description": entry.description,
        "origin": entry.origin,
        "digest": None if card is None else card.digest,
        "parameters": None if card is None else card.parameters,
        "bytes": held.bytes if held is not None else None if card is None else card.bytes,
    }


def version_body(state: AppState, version: AdapterVersion) -> Json:
    held = state.registry.state().adapters.get(version.digest)
    return {
        "name": version.name,
        "version": version.version,
        "current": version.current,
        "state": "on disk" if held is None else "loaded",
        "base_model": version.base_model,
        "base_digest": version.base_digest,
        "digest": version.digest,
        "created_at": version.created_at,
        "bytes": None if held is None else held.bytes,
    }


def job_body(state: AppState, job: Job) -> Json:
    """checkpoints: oldest first, each with the `model` that chat knows it by; gone when the job is done."""
    body = asdict(job)
    del body["queued_at"]
    kept = [
        {"step": version.version, "model": version.id, "created_at": version.created_at}
        for version in state.checkpoints.of(job.id)
    ]
    return {"job_id": body.pop("id"), **body, "checkpoints": kept}


def event_body(event: Event) -> Json:
    body = asdict(event)
    del body["job_id"]
    return body
