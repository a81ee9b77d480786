"""vLLM's two calls: serve an adapter that PEFT saved in a directory on this machine, and stop serving it.

vLLM holds such an adapter in memory only; fortwo also stores it, as a version like those it trains itself.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from fortwo.adapters.peft_files import PICKLES
from fortwo.adapters.version_files import CONFIG, MANIFEST, TENSORS
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest
from fortwo.jobs.planner import check_name_available
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep

router = APIRouter(prefix="/v1", tags=["vLLM"], route_class=JsonRoute)


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(
        min_length=1, description="Directory that PEFT saved, or one of its files, in a folder that datasets may be in."
    )
    load_inplace: bool = Field(False, description="If an adapter of this name exists, give it a new version.")


class UnloadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = Field(None, description="Accepted and ignored; the name identifies the adapter.")


@router.post("/load_lora_adapter", response_class=PlainTextResponse, summary="Serve an adapter from a directory")
async def load_lora_adapter(request: Request, state: AppStateDep, body: LoadRequest) -> str:
    return await state.control.run(request, lambda _: _load(state, body))


def _load(state: AppState, body: LoadRequest) -> str:
    check_name_available(body.lora_name, state.catalog)
    directory = _resolve(body.lora_path, state.settings.allowed_data_dirs)
    if body.lora_name in state.adapters.names() and not body.load_inplace:
        raise Conflict(
            f"There already is an adapter {body.lora_name!r}.",
            param="lora_name",
            hint="Choose another name, or set load_inplace to true to give it a new version.",
        )
    from fortwo.engine.adapter_import import import_adapter

    import_adapter(body.lora_name, directory, state.catalog, state.adapters, state.registry)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse, summary="Stop serving an adapter")
async def unload_lora_adapter(request: Request, state: AppStateDep, body: UnloadRequest) -> str:
    await state.control.run(request, lambda _: state.registry.unload_adapter(body.lora_name))
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _resolve(path: str, allowed: tuple[Path, ...]) -> Path:
    """The directory with links resolved; of one of PEFT's files, the directory that it is in. Raises InvalidRequest
    for one outside the allowed folders, because a client must not explore this machine."""
    for folder in allowed:
        with suppress(OSError, ValueError, RuntimeError):  # name too long, NUL, loop of links
            given = folder / path
            directory = (given.parent if given.name in (CONFIG, TENSORS, *PICKLES) else given).resolve()
            if directory.is_relative_to(folder.resolve()) and directory.is_dir():
                _check_links(directory, allowed)
                return directory
    raise InvalidRequest(
        f"lora_path = {path!r} is not a directory in {', '.join(str(folder) for folder in allowed)}.",
        param="lora_path",
        hint="Put the adapter there, allow its folder with FORTWO_DATA_DIRS, or use fortwo adapters import.",
    )


def _check_links(directory: Path, allowed: tuple[Path, ...]) -> None:
    """Raises InvalidAdapter for a file that is a link to somewhere outside the allowed folders."""
    for file in (CONFIG, TENSORS, MANIFEST):
        target = (directory / file).resolve()
        if not any(target.is_relative_to(folder.resolve()) for folder in allowed):
            raise InvalidAdapter(
                f"{directory / file} is a link to a file outside the allowed folders.",
                param="lora_path",
                hint="Put the file itself there, or allow its folder with FORTWO_DATA_DIRS.",
            )
