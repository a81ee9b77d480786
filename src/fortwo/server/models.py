"""The native API of base models: their states, loading and unloading, and removing those that a user added."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from fortwo.errors import Conflict, InvalidRequest
from fortwo.hub.catalog import ModelEntry
from fortwo.hub.huggingface import PREFIX, HubSource
from fortwo.records import Json
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep
from fortwo.train.fit import Fit

router = APIRouter(prefix="/api", tags=["models"], route_class=JsonRoute)


@router.get("/models", summary="Base models and their state")
def models(state: AppStateDep) -> Json:
    return {"models": [model_body(state, entry) for entry in state.catalog.entries()]}


@router.get("/models/{id}", summary="One base model, and the adapters that were trained on it")
def model(state: AppStateDep, id: str) -> Json:
    """directory, architecture, weights_digest and revision are null until the model is on disk. warnings: about its
    tokenizer and chat template, once it is loaded."""
    entry = state.catalog.get(id)
    info = state.catalog.model_info(id)
    return {
        **model_body(state, entry),
        "directory": None if info is None else str(info.directory),
        "architecture": None if info is None else info.architecture,
        "weights_digest": None if info is None else info.weights_digest,
        "revision": None if info is None else info.revision,
        "adapters": adapters_on(state, id),
        "warnings": [asdict(one) for one in state.registry.warnings(id)],
    }


class AddRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1, description="Id of the new model.")
    source: str = Field(
        min_length=1,
        description="hf:OWNER/REPO[@REVISION], or a directory or a .gguf file in a folder that datasets may be in.",
    )


@router.post("/models", status_code=201, summary="Add a base model to the catalog; it is fetched when it is loaded")
async def add_model(request: Request, state: AppStateDep, body: AddRequest) -> Json:
    """`download` has the bytes that loading it fetches, 0 for files of this machine. The revision of a repository is
    fixed now."""
    return await state.control.run(request, lambda _: _add(state, body))


def _add(state: AppState, body: AddRequest) -> Json:
    if body.id in state.adapters.names():
        raise Conflict(f"There is an adapter {body.id!r}.", param="id", hint="Choose another id.")
    try:
        if not body.source.startswith(PREFIX):
            entry = state.catalog.add(body.id, _local(body.source, state.settings.allowed_data_dirs))
            return {**model_body(state, entry), "download": 0}
        found = HubSource.parse(body.source, body.id).repository()
        entry = state.catalog.add(body.id, HubSource(found.repo_id, body.id, found.revision))
    except InvalidRequest as error:
        field = "source" if error.param == "path" else error.param
        raise type(error)(error.message, param=field, hint=error.hint, code=error.code) from None
    return {**model_body(state, entry), "licence": found.licence, "download": found.bytes}


def _local(source: str, allowed: tuple[Path, ...]) -> Path:
    """The path with links resolved. Raises InvalidRequest for one outside the allowed folders, because a client must
    not explore this machine."""
    for folder in allowed:
        with suppress(OSError, ValueError, RuntimeError):  # name too long, NUL, loop of links
            real = (folder / source).resolve()
            if real.is_relative_to(folder.resolve()) and real.exists():
                return real
    raise InvalidRequest(
        f"source = {source!r} is neither a repository nor in {', '.join(str(folder) for folder in allowed)}.",
        param="source",
        hint="Write hf:OWNER/REPO, put the files there, or use fortwo models add.",
    )


@router.delete("/models/{id}", summary="Remove a base model that a user added, and what was prepared from it")
async def delete_model(request: Request, state: AppStateDep, id: str) -> Json:
    """The user's own files and the adapters stay. `adapters` names those that have no base any more. Raises Conflict
    while a request or a job uses it, or a job waits for it."""
    return await state.control.run(request, lambda _: _remove(state, id))


def _remove(state: AppState, id: str) -> Json:
    if waiting := [job.id for job in state.jobs.jobs(1000) if job.model == id and not job.ended_or_paused]:
        raise Conflict(
            f"Base model {id!r} cannot be removed: job {waiting[0]} needs it.",
            param="model",
            hint="Wait for the job or cancel it.",
        )
    state.registry.remove_base(id)
    return {"id": id, "deleted": True, "adapters": adapters_on(state, id)}


@router.post("/models/{id}/load", summary="Load a base model, fetching it first if necessary")
async def load_model(request: Request, state: AppStateDep, id: str) -> Json:
    await state.control.run(request, lambda _: state.registry.load_base(id))
    return await run_in_threadpool(lambda: model_body(state, state.catalog.get(id)))


@router.post("/models/{id}/unload", summary="Unload a base model and the adapters on it")
async def unload_model(request: Request, state: AppStateDep, id: str) -> Json:
    await state.control.run(request, lambda _: state.registry.unload_base(id))
    return await run_in_threadpool(lambda: model_body(state, state.catalog.get(id)))


def model_body(state: AppState, entry: ModelEntry) -> Json:
    """state: not fetched, on disk, damaged, loading or loaded. bytes: the size in memory if it is loaded, otherwise on
    disk. progress: while it is fetched or converted, what is done, how much of it, and how much there is. error: what
    is wrong with it, if it is damaged."""
    loaded = state.registry.state().models.get(entry.id)
    info, damage = state.catalog.model_info(entry.id), state.catalog.damage(entry.id)
    on_disk = "damaged" if damage is not None else "not fetched" if info is None else "on disk"
    return {
        "id": entry.id,
        "state": on_disk if loaded is None else loaded.state,
        "source": entry.source,
        "description": entry.description,
        "origin": entry.origin,
        "digest": None if info is None else info.digest,
        "parameters": None if info is None else info.parameters,
        "bytes": loaded.bytes if loaded is not None else None if info is None else info.bytes,
        "progress": progress_body(loaded.progress) if loaded is not None and loaded.progress is not None else None,
        "error": None if damage is None else damage.body()["error"],
        "licence": entry.licence,
        "fit": fit_body(state.registry.fit(entry.id)),
    }


def progress_body(progress: tuple[str, int, int]) -> Json:
    return dict(zip(("label", "done", "total"), progress, strict=True))


def fit_body(fit: Fit | None) -> Json | None:
    """Bytes of memory to serve and to teach the base on this machine; null where its dimensions are not known yet.
    serving, teaching: fits, tight or too large."""
    return None if fit is None else {**asdict(fit), "serving": fit.serving, "teaching": fit.teaching}


def adapters_on(state: AppState, id: str) -> list[str]:
    """The versions of adapters whose manifest names this base."""
    versions = [version for name in state.adapters.names() for version in state.adapters.versions(name)]
    return [version.id for version in versions if version.base_model == id]
