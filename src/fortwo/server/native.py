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
from fortwo.hub.catalog import ModelEntry
from fortwo.jobs.store import Event, Job
from fortwo.records import AdapterVersion, Json
from fortwo.server.house import Here, House
from fortwo.train.plan import to_json
from fortwo.train.request import TrainingRequest

POLL_SECONDS = 0.2  # how late an event may be

router = APIRouter(prefix="/api")


@router.get("/models", tags=["models"], summary="Base models: what there is, what is on disk, what is loaded")
def models(house: Here) -> Json:
    return {"models": [model_body(house, entry) for entry in house.catalog.entries()]}


@router.post("/models/{id}/load", tags=["models"], summary="Load a base model, fetching it first if need be")
def load_model(house: Here, id: str) -> Json:
    house.residents.load_base(id)
    return model_body(house, house.catalog.get(id))


@router.post("/models/{id}/unload", tags=["models"], summary="Let go of a base model and the adapters on it")
def unload_model(house: Here, id: str) -> Json:
    house.residents.unload_base(id)
    return model_body(house, house.catalog.get(id))


@router.get("/adapters", tags=["adapters"], summary="All versions of all adapters")
def adapters(house: Here) -> Json:
    names = house.adapters.names()
    return {"adapters": [version_body(house, one) for name in names for one in house.adapters.versions(name)]}


@router.get("/adapters/{name}", tags=["adapters"], summary="An adapter with its versions, or one as name@version")
def adapter(house: Here, name: str) -> Json:
    """`manifest` is that of the version named, else of the current one, else null."""
    bare, at, _ = name.partition("@")
    named = house.adapters.get(name) if at else None
    versions = house.adapters.versions(bare)
    current = next((version for version in versions if version.current), None)
    shown = current if named is None else named
    return {
        "name": bare,
        "current": None if current is None else current.version,
        "manifest": None if shown is None else shown.manifest,
        "versions": [version_body(house, version) for version in versions],
    }


@router.delete("/adapters/{name}", tags=["adapters"], summary="Delete an adapter, or one version as name@version")
def delete_adapter(house: Here, name: str) -> Json:
    house.residents.delete_adapter(name)
    return {"name": name, "deleted": True}


@router.post("/adapters/{name}/load", tags=["adapters"], summary="Load an adapter, and its base if need be")
def load_adapter(house: Here, name: str) -> Json:
    return version_body(house, house.residents.load_adapter(name))


@router.post("/adapters/{name}/unload", tags=["adapters"], summary="Let go of an adapter; it stays on disk")
def unload_adapter(house: Here, name: str) -> Json:
    house.residents.unload_adapter(name)
    return version_body(house, house.adapters.get(name))


@router.post("/adapters/{name}/rollback", tags=["adapters"], summary="Make the version before current again")
def rollback(house: Here, name: str) -> Json:
    return version_body(house, house.adapters.rollback(name))


@router.get("/adapters/{name}/report", tags=["adapters"], summary="What the evaluation found, and plan against actual")
def report(house: Here, name: str, version: Annotated[int | None, Query(ge=1)] = None) -> Json:
    """Of the version named (here, or as name@version), else of the latest, current or not."""
    if version is not None:
        found = house.adapters.get(f"{name}@{version}")
    elif "@" in name:
        found = house.adapters.get(name)
    elif whole := house.adapters.versions(name):
        found = whole[-1]
    else:
        raise InvalidAdapter(
            f"Every version of adapter {name!r} is damaged on disk.",
            param="name",
            hint=f"Restore {house.settings.adapters_dir / name} from a backup, or delete it and train it again.",
        )
    manifest = found.manifest
    if manifest.get("report") is None:
        raise NotFound(f"{found.id} has no report.", param="name", hint="Only adapters that were taught here have one.")
    return {"name": found.name, "version": found.version} | {key: manifest[key] for key in ("report", "plan", "actual")}


@router.post("/training/plan", tags=["training"], summary="What a request would do, without doing it")
def plan(house: Here, body: TrainingRequest) -> Json:
    return to_json(house.runner.plan(body))


@router.post("/training/start", tags=["training"], status_code=202, summary="Plan and queue a training job")
def start(house: Here, body: TrainingRequest) -> Json:
    job = house.runner.submit(body)
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
def preview_data(house: Here, body: PreviewRequest) -> Json:
    """Rows cut into segments: role, supervised, tokens, text. No model is loaded."""
    model = house.settings.default_model if body.model is None else body.model
    return asdict(preview(body.dataset, house.settings.allowed_data_dirs, house.catalog, model, body.rows))


@router.get("/training/jobs", tags=["training"], summary="Jobs, newest first")
def jobs(house: Here, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    return {"jobs": [job_body(house, job) for job in house.jobs.jobs(limit)]}


@router.get("/training/jobs/{job_id}", tags=["training"], summary="One job")
def job(house: Here, job_id: str) -> Json:
    return job_body(house, house.jobs.get(job_id))


@router.post("/training/jobs/{job_id}/cancel", tags=["training"], summary="Give a job up, with its checkpoints")
def cancel(house: Here, job_id: str) -> Json:
    return job_body(house, house.runner.cancel(job_id))


@router.post("/training/jobs/{job_id}/pause", tags=["training"], summary="Stop a job for now, with a checkpoint")
def pause(house: Here, job_id: str) -> Json:
    """Behind the step under way; the next job in the queue begins. A queued job leaves the queue."""
    return job_body(house, house.runner.pause(job_id))


@router.post("/training/jobs/{job_id}/resume", tags=["training"], summary="Queue a job again from its last checkpoint")
def resume(house: Here, job_id: str) -> Json:
    """A paused job, or one that failed or was cancelled; without a checkpoint it starts from the beginning."""
    return job_body(house, house.runner.resume(job_id))


@router.get(
    "/training/jobs/{job_id}/events", tags=["training"], response_model=None, summary="Events as they happen (SSE)"
)
async def events(house: Here, job_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> Response:
    """Every event after Last-Event-ID, then those to come; the stream ends when the job has ended or is paused.

    204 tells a browser's EventSource, which connects again by itself, that there is nothing more to come.
    """
    ended_or_paused = (await run_in_threadpool(house.jobs.get, job_id)).ended_or_paused
    if ended_or_paused and not await run_in_threadpool(house.jobs.events, job_id, last_event_id, 1):
        return Response(status_code=204)
    return EventSourceResponse(_follow(house, job_id, last_event_id), sep="\n")


async def _follow(house: House, job_id: str, last: int) -> AsyncIterator[Json]:
    while True:
        # The status is read first: a job's last event is written together with its last status.
        ended_or_paused = (await run_in_threadpool(house.jobs.get, job_id)).ended_or_paused
        while news := await run_in_threadpool(house.jobs.events, job_id, last):
            for event in news:
                yield {"id": str(event.id), "event": event.type, "data": json.dumps(event_body(event))}
            last = news[-1].id
        if ended_or_paused:
            return
        await anyio.sleep(POLL_SECONDS)


def model_body(house: House, entry: ModelEntry) -> Json:
    """state: not fetched, on disk, loading or loaded. bytes: in memory, of one that is not, on disk."""
    held = house.residents.states().models.get(entry.id)
    info = house.catalog.model_info(entry.id)
    return {
        "id": entry.id,
        "state": held.state if held is not None else "not fetched" if info is None else "on disk",
        "source": entry.source,
        "description": entry.description,
        "origin": entry.origin,
        "digest": None if info is None else info.digest,
        "parameters": None if info is None else info.parameters,
        "bytes": held.bytes if held is not None else None if info is None else info.bytes,
    }


def version_body(house: House, version: AdapterVersion) -> Json:
    held = house.residents.states().adapters.get(version.digest)
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


def job_body(house: House, job: Job) -> Json:
    """checkpoints: oldest first, each with the `model` that chat knows it by; gone when the job is done."""
    body = asdict(job)
    del body["queued_at"]
    kept = [
        {"step": version.version, "model": version.id, "created_at": version.created_at}
        for version in house.checkpoints.of_job(job.id)
    ]
    return {"job_id": body.pop("id"), **body, "checkpoints": kept}


def event_body(event: Event) -> Json:
    body = asdict(event)
    del body["job_id"]
    return body
