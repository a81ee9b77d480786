"""OpenAI's fine-tuning jobs: another form of fortwo's own jobs. All jobs are listed, whoever started them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.orm import Session

from fortwo.errors import FortwoError, InvalidRequest, NotFound
from fortwo.jobs import fine_tuned_models
from fortwo.jobs.idempotency import Key
from fortwo.jobs.results import eval_losses, result_file_id
from fortwo.jobs.store import Job
from fortwo.records import Json
from fortwo.server.errors import invalid
from fortwo.server.idempotency import key_of
from fortwo.server.openai.files import page
from fortwo.server.openai.fine_tuning_objects import (
    EVENT_PREFIX,
    JOB_PREFIX,
    checkpoint_objects,
    event_object,
    job_object,
)
from fortwo.server.openai.fine_tuning_request import JobRequest, check_method, renamed, training_request
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep

BATCH = 100  # jobs that are read at once to find those with some metadata

router = APIRouter(prefix="/v1/fine_tuning", tags=["OpenAI"], route_class=JsonRoute)

Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("/jobs", summary="Start a fine-tuning job")
async def create(request: Request, state: AppStateDep, body: JobRequest) -> Json:
    key = key_of(request, await request.body())
    return await state.planning.run(request, lambda check: _create(state, body, key, check))


def _create(state: AppState, body: JobRequest, key: Key | None, check: Callable[[], None]) -> Json:
    try:
        asked = training_request(body, _parent(state, body.model))
        return state.answers.once(
            key,
            lambda also: state.runner.submit(
                asked, check, fine_tuning=body.record(), also=lambda session, job: _checked(body, session, job, also)
            ),
            lambda job: job_object(job, ()),
        )
    except ValidationError as error:
        found = [one | {"loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise invalid(RequestValidationError(found).errors()) from None
    except FortwoError as error:
        raise renamed(error, body) from None


def _checked(body: JobRequest, session: Session, job: Job, also: Callable[[Session, Job], None]) -> None:
    check_method(body, job.plan["objective"])
    also(session, job)


def _parent(state: AppState, model: str) -> str | None:
    """The adapter that `model` names, for a run that goes on from it; None for a base model."""
    if model.startswith(fine_tuned_models.PREFIX):
        return fine_tuned_models.adapter_ref(model, state.jobs)
    return model if model.partition("@")[0] in state.adapters.names() else None


@router.get("/jobs", summary="Fine-tuning jobs, newest first")
def jobs(request: Request, state: AppStateDep, after: str | None = None, limit: Limit = 20) -> Json:
    """metadata[KEY]=VALUE: only jobs with all of these pairs. metadata=null: only jobs without metadata."""
    wanted = {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := re.fullmatch(r"metadata\[(.*)\]", name))
    }
    without = request.query_params.get("metadata") == "null"
    found: list[Job] = []
    for job in _all_jobs(state, None if after is None else _job_id(after)):
        metadata = (job.fine_tuning or {}).get("metadata") or {}
        if (not without or not metadata) and all(metadata.get(name) == value for name, value in wanted.items()):
            found.append(job)
        if len(found) > limit:
            break
    return page(_objects(state, found), limit)


def _all_jobs(state: AppState, after: str | None) -> Iterator[Job]:
    while batch := state.jobs.jobs(BATCH, after):
        yield from batch
        after = batch[-1].id


@router.get("/jobs/{job_id}", summary="One fine-tuning job")
def job(state: AppStateDep, job_id: str) -> Json:
    return _object(state, state.jobs.get(_job_id(job_id)))


@router.post("/jobs/{job_id}/cancel", summary="Cancel a fine-tuning job")
async def cancel(request: Request, state: AppStateDep, job_id: str) -> Json:
    return await state.control.run(request, lambda _: _object(state, state.runner.cancel(_job_id(job_id))))


@router.post("/jobs/{job_id}/pause", summary="Pause a fine-tuning job with a checkpoint")
async def pause(request: Request, state: AppStateDep, job_id: str) -> Json:
    return await state.control.run(request, lambda _: _object(state, state.runner.pause(_job_id(job_id))))


@router.post("/jobs/{job_id}/resume", summary="Go on with a paused fine-tuning job")
async def resume(request: Request, state: AppStateDep, job_id: str) -> Json:
    return await state.control.run(request, lambda _: _object(state, state.runner.resume(_job_id(job_id))))


@router.get("/jobs/{job_id}/events", summary="The events of a job, newest first")
def events(state: AppStateDep, job_id: str, after: str | None = None, limit: Limit = 20) -> Json:
    id = state.jobs.get(_job_id(job_id)).id
    found = state.jobs.newest_events(id, None if after is None else _event_id(after), limit + 1)
    return page([event_object(event) for event in found], limit)


@router.get("/jobs/{job_id}/checkpoints", summary="The checkpoints of a job, newest first")
def checkpoints(state: AppStateDep, job_id: str, after: str | None = None, limit: Limit = 10) -> Json:
    """Of a job that is done, what it published; of another one, the checkpoints from which it can resume."""
    job = state.jobs.get(_job_id(job_id))
    found = checkpoint_objects(job, state.checkpoints.of_job(job.id), eval_losses(state.jobs, job.id))
    ids = [one["id"] for one in found]
    if after is not None and after not in ids:
        raise NotFound(f"There is no checkpoint {after!r}.", param="after", hint="Leave it out for the newest ones.")
    return page(found if after is None else found[ids.index(after) + 1 :], limit)


def _object(state: AppState, job: Job) -> Json:
    return _objects(state, [job])[0]


def _objects(state: AppState, jobs: list[Job]) -> list[Json]:
    files = state.files.existing([result_file_id(job.id) for job in jobs])
    return [job_object(job, files) for job in jobs]


def _job_id(id: str) -> str:
    return id.removeprefix(JOB_PREFIX)


def _event_id(after: str) -> int:
    number = after.removeprefix(EVENT_PREFIX)
    if not re.fullmatch(r"[0-9]{1,18}", number):
        raise InvalidRequest(
            f"after = {after!r} is not the id of an event.", param="after", hint="Give the id of the last event."
        )
    return int(number)
