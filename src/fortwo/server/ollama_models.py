"""Ollama's API about models: its version, the models that requests may name, one of them, and those in memory.

What would change the models is refused with the name of fortwo's own call.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from fortwo.adapters.version_files import TENSORS
from fortwo.errors import InvalidRequest, NotFound
from fortwo.hub import prepared
from fortwo.hub.prepared import ModelInfo
from fortwo.hub.template_files import choose_template
from fortwo.records import Json
from fortwo.server.ollama import LATEST, Name, timestamp, without_tag
from fortwo.server.openai.models import ServedModel, served_models
from fortwo.server.openai.parameters import Strict
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep

API_VERSION = "0.12.11"  # of Ollama: the first whose API has everything that is answered here
NEVER = "9999-12-31T23:59:59Z"  # when a model leaves the memory by itself

router = APIRouter(prefix="/api", tags=["Ollama"], route_class=JsonRoute)


@router.get("/version", summary="The version of Ollama whose API this is")
async def version() -> Json:
    return {"version": API_VERSION}


@router.get("/tags", summary="The models that requests may name, as Ollama lists them")
def tags(state: AppStateDep) -> Json:
    return {"models": [_body(state, served) for served in served_models(state)]}


class ShowRequest(Strict):
    model: Name | None = None
    name: Name | None = Field(None, description="The older name of model.")
    verbose: bool | None = Field(None, description="Accepted; has no effect.")

    system: Annotated[str | None, Field(description="Accepted; has no effect.")] = None
    template: Annotated[str | None, Field(description="Accepted; has no effect.")] = None


@router.post("/show", summary="One model, as Ollama shows it")
def show(state: AppStateDep, body: ShowRequest) -> Json:
    given = body.name if body.model is None else body.model
    if given is None:
        raise InvalidRequest("model is missing.", param="model", hint="Add model.", code="missing_parameter")
    name, found = without_tag(given), {served.id: served for served in served_models(state)}
    if (served := found.get(name)) is None:
        raise NotFound(f"There is no model {name!r}.", param="model", hint=f"Known: {', '.join(found)}.")
    info, config = _base(state, served.base)
    licence = None if not config else state.catalog.get(served.base).licence
    adapter = "" if served.version is None else f"ADAPTER {served.version.id}\n"
    shown = _body(state, served)
    template = "" if info is None else choose_template(info.directory).text or ""
    calls = ["tools"] if "tools" in template and "tool_calls" in template else []
    return {
        "license": licence or "",
        "modelfile": f"FROM {served.base}\n{adapter}",
        "parameters": "",
        "template": template,
        "details": shown["details"],
        "model_info": _model_info(config, None if info is None else info.parameters),
        "capabilities": ["completion", *calls, "embedding"],
        "modified_at": shown["modified_at"],
    }


# Names of GGUF's metadata, after the architecture, and those of config.json.
_DIMENSIONS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


def _model_info(config: Json, parameters: int | None) -> Json:
    family = config.get("model_type", "unknown")
    known = {f"{family}.{name}": config[key] for name, key in _DIMENSIONS.items() if key in config}
    return {"general.architecture": family, "general.parameter_count": parameters, **known}


@router.get("/ps", summary="The models in memory, as Ollama lists them")
def ps(state: AppStateDep) -> Json:
    """An adapter is in memory with its base; size_vram is 0 on a CPU."""
    loaded = state.registry.state()
    running = []
    for served in served_models(state):
        if served.version is None:
            base = loaded.models.get(served.id)
            target, size = state.registry.find(served.id), 0 if base is None else base.bytes
        elif adapter := loaded.adapters.get(served.version.digest):
            target, size = state.registry.find(adapter.base), adapter.bytes
        else:
            target, size = None, 0
        if target is not None:
            more = {
                "size": size,
                "size_vram": 0 if target.model.decoder.device.type == "cpu" else size,
                "expires_at": NEVER,
                "context_length": target.model.runner.cache.longest,
            }
            running.append(_body(state, served) | more)
    return {"models": running}


def _base(state: AppState, id: str) -> tuple[ModelInfo | None, Json]:
    """A prepared base and its dimensions; nothing for one that was removed while its adapters stayed."""
    try:
        return state.catalog.model_info(id), state.catalog.config(id)
    except NotFound:
        return None, {}


def _body(state: AppState, served: ServedModel) -> Json:
    """A model in the lists. size: in bytes on disk."""
    name = served.id if ":" in served.id else f"{served.id}{LATEST}"
    info, config = _base(state, served.base)
    digest, size, modified = ("", 0, 0.0) if info is None else (info.digest, info.bytes, 0.0)
    with suppress(OSError):  # it was removed a moment ago
        if served.version is not None:
            digest, modified = served.version.digest, served.version.created_at
            size = (Path(served.version.path) / TENSORS).stat().st_size
        elif info is not None:
            modified = (info.directory / prepared.FILE).stat().st_mtime
    family = config.get("model_type", "unknown")
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(modified),
        "size": size,
        "digest": digest.removeprefix("sha256:"),
        "details": {
            "parent_model": "" if served.version is None else served.base,
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": "" if info is None else _short(info.parameters),
            "quantization_level": state.settings.weights.upper(),
        },
    }


def _short(parameters: int) -> str:
    """135000000 becomes 135M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def _refuse(path: str, hint: str) -> None:
    async def refused() -> None:
        raise InvalidRequest(f"{path} is not supported.", hint=hint, code="unsupported_path")

    method = "DELETE" if path == "/api/delete" else "POST"
    router.add_api_route(path.removeprefix("/api"), refused, methods=[method], summary="Refused; says what to use")


_refuse(
    "/api/pull",
    "Use POST /api/models/{id}/load, which fetches a model of the catalog, or: fortwo models add NAME hf:OWNER/REPO",
)
_refuse("/api/push", "Write an adapter for a hub or for another program with: fortwo adapters export NAME --to peft")
_refuse(
    "/api/create", "Teach an adapter with POST /api/training/start, or add a base with: fortwo models add NAME PATH"
)
_refuse("/api/copy", "Give a version another name with PUT /api/adapters/{name}@{version}/tags/{tag}.")
_refuse("/api/delete", "Use DELETE /api/adapters/{name}, or DELETE /api/models/{id} for a base model.")
