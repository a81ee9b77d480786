"""The values that a request's `model` may have: base models, adapters, versions, fine-tuned models, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import APIRouter, Request

from fortwo.errors import Conflict, NotFound
from fortwo.jobs import fine_tuned_models
from fortwo.records import AdapterVersion, Json
from fortwo.server.state import AppState, AppStateDep

OWNER = "fortwo"

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models", summary="Base models on disk, adapters, their versions, checkpoints")
def models(state: AppStateDep) -> Json:
    return {"object": "list", "data": [_body(served) for served in served_models(state)]}


@router.get("/models/{model}", summary="One model, adapter, version or checkpoint")
def model(state: AppStateDep, model: str) -> Json:
    found = {served.id: served for served in served_models(state)}
    if model not in found:
        raise NotFound(f"There is no model {model!r}.", param="model", hint=f"Known: {', '.join(found)}.")
    return _body(found[model])


@router.delete("/models/{model}", summary="Delete an adapter, one of its versions, or a fine-tuned model")
async def delete(request: Request, state: AppStateDep, model: str) -> Json:
    await state.control.run(request, lambda _: _delete(state, model))
    return {"id": model, "object": "model", "deleted": True}


def _delete(state: AppState, model: str) -> None:
    if model in (entry.id for entry in state.catalog.entries()):
        raise Conflict(
            f"{model!r} is a base model.", param="model", hint="Remove a base model with: fortwo models remove ID"
        )
    fine_tuned = model.startswith(fine_tuned_models.PREFIX)
    state.registry.delete_adapter(fine_tuned_models.adapter_ref(model, state.jobs) if fine_tuned else model)


@dataclass(frozen=True)
class ServedModel:
    """A name that `model` may have. base: the id of the base model; version: None for a base model itself."""

    id: str
    base: str
    version: AdapterVersion | None


def served_models(state: AppState) -> Iterator[ServedModel]:
    """Base models on disk, adapters, their versions, fine-tuned models and checkpoints."""
    for entry in state.catalog.entries():
        info = state.catalog.model_info(entry.id)
        if info is not None or entry.id == state.settings.default_model:
            yield ServedModel(entry.id, entry.id, None)
    fine_tuned = {
        f"{job.adapter['name']}@{job.adapter['version']}": fine_tuned_models.model_name(job)
        for job in state.jobs.fine_tuned()
        if job.adapter is not None
    }
    for name in state.adapters.names():
        for version in state.adapters.versions(name):
            ids = [name, version.id] if version.current else [version.id]
            if version.id in fine_tuned:
                ids.append(fine_tuned[version.id])
            for id in ids:
                yield ServedModel(id, version.base_model, version)
    for job_id in state.checkpoints.job_ids():
        for version in state.checkpoints.of_job(job_id):
            yield ServedModel(version.id, version.base_model, version)


def _body(served: ServedModel) -> Json:
    """root: the base model; parent: that of an adapter, None for a base model."""
    return {
        "id": served.id,
        "object": "model",
        "created": 0 if served.version is None else int(served.version.created_at),
        "owned_by": OWNER,
        "root": served.base,
        "parent": None if served.version is None else served.base,
    }
