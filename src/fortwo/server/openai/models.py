"""The values that a request's `model` may have: base models, adapters, their versions, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter

from fortwo.errors import NotFound
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


def _models(state: AppState) -> Iterator[Json]:
    """root: the base model; parent: that of an adapter, None for a base model."""
    for entry in state.catalog.entries():
        info = state.catalog.model_info(entry.id)
        if info is not None or entry.id == state.settings.default_model:
            yield _model(entry.id, 0.0, root=entry.id, parent=None)
    for name in state.adapters.names():
        for version in state.adapters.versions(name):
            ids = (name, version.id) if version.current else (version.id,)
            for id in ids:
                yield _model(id, version.created_at, root=version.base_model, parent=version.base_model)
    for job_id in state.checkpoints.job_ids():
        for version in state.checkpoints.of_job(job_id):
            yield _model(version.id, version.created_at, root=version.base_model, parent=version.base_model)


def _model(id: str, created: float, *, root: str, parent: str | None) -> Json:
    return {"id": id, "object": "model", "created": int(created), "owned_by": OWNER, "root": root, "parent": parent}
