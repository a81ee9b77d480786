"""The values that a request's `model` may have: base models, adapters, versions, fine-tuned models, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request

from fortwo.errors import Conflict, NotFound
from fortwo.jobs import fine_tuned_models
from fortwo.records import Json
from fortwo.server.state import AppState, AppStateDep

OWNER = "fortwo"

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models", summary="Base models on disk, adapters, their versions, checkpoints")
def models(state: AppStateDep) -> Json:
    return {"object": "list", "data": list(_models(state))}


@router.get("/models/{model}", summary="One model, adapter, version or checkpoint")
def model(state: AppStateDep, model: str) -> Json:
    found = {one["id"]: one for one in _models(state)}
    if model not in found:
        raise NotFound(f"There is no model {model!r}.", param="model", hint=f"Known: {', '.join(found)}.")
    return found[model]


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


def _models(state: AppState) -> Iterator[Json]:
    """root: the base model; parent: that of an adapter, None for a base model."""
    for entry in state.catalog.entries():
        info = state.catalog.model_info(entry.id)
        if info is not None or entry.id == state.settings.default_model:
            yield _model(entry.id, 0.0, root=entry.id, parent=None)
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
                yield _model(id, version.created_at, root=version.base_model, parent=version.base_model)
    for job_id in state.checkpoints.job_ids():
        for version in state.checkpoints.of_job(job_id):
            yield _model(version.id, version.created_at, root=version.base_model, parent=version.base_model)


def _model(id: str, created: float, *, root: str, parent: str | None) -> Json:
    return {"id": id, "object": "model", "created": int(created), "owned_by": OWNER, "root": root, "parent": parent}
