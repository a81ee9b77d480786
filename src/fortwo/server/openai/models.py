"""What a request's `model` may be: base models, adapters, their versions, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter

from fortwo.errors import NotFound
from fortwo.records import Json
from fortwo.server.house import Here, House

OWNER = "fortwo"

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models", summary="Base models that are on disk, adapters, their versions, checkpoints")
def models(house: Here) -> Json:
    return {"object": "list", "data": list(_models(house))}


@router.get("/models/{model}", summary="One of them")
def model(house: Here, model: str) -> Json:
    found = {one["id"]: one for one in _models(house)}
    if model not in found:
        raise NotFound(f"There is no model {model!r}.", param="model", hint=f"Known: {', '.join(found)}.")
    return found[model]


def _models(house: House) -> Iterator[Json]:
    """root: the base that answers; parent: what an adapter was trained from."""
    for entry in house.catalog.entries():
        info = house.catalog.model_info(entry.id)
        if info is not None or entry.id == house.settings.default_model:
            yield _model(entry.id, 0.0, root=entry.id, parent=None)
    for name in house.adapters.names():
        for version in house.adapters.versions(name):
            ids = (name, version.id) if version.current else (version.id,)
            for id in ids:
                yield _model(id, version.created_at, root=version.base_model, parent=version.base_model)
    for job_id in house.checkpoints.job_ids():
        for version in house.checkpoints.of_job(job_id):
            yield _model(version.id, version.created_at, root=version.base_model, parent=version.base_model)


def _model(id: str, created: float, *, root: str, parent: str | None) -> Json:
    return {"id": id, "object": "model", "created": int(created), "owned_by": OWNER, "root": root, "parent": parent}
