"""vLLM's two calls: serve an adapter that PEFT saved in a directory here, and stop serving it.

What vLLM keeps in memory only, fortwo also keeps in its store: a loaded adapter is a version like a taught one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from fortwo.errors import Conflict, FortwoError, InvalidAdapter, InvalidRequest
from fortwo.jobs.runner import check_name_available
from fortwo.records import Json
from fortwo.server.house import Here, House

router = APIRouter(prefix="/v1", tags=["vLLM"])


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, description="Directory that PEFT saved, in a folder that datasets may be in.")
    load_inplace: bool = Field(False, description="Let an adapter of this name get a new version.")


class UnloadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1)
    lora_int_id: Annotated[int | None, Field(description="Accepted; the name decides.")] = None


@router.post("/load_lora_adapter", response_class=PlainTextResponse, summary="Serve an adapter from a directory")
def load_lora_adapter(house: Here, body: LoadRequest) -> str:
    check_name_available(body.lora_name, house.catalog)
    directory = _allowed(house, body.lora_path)
    if body.lora_name in house.adapters.names() and not body.load_inplace:
        raise Conflict(
            f"There already is an adapter {body.lora_name!r}.",
            param="lora_name",
            hint="Take another name, or set load_inplace to true to give it a new version.",
        )
    version = house.adapters.import_peft(body.lora_name, directory, _origin(house, directory))
    try:
        house.residents.load_adapter(version.id)
    except FortwoError:
        house.adapters.delete(version.id)
        raise
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", response_class=PlainTextResponse, summary="Stop serving an adapter")
def unload_lora_adapter(house: Here, body: UnloadRequest) -> str:
    house.residents.unload_adapter(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _allowed(house: House, path: str) -> Path:
    """The directory itself, links resolved; a client may not look around on this machine."""
    allowed = house.settings.allowed_data_dirs
    for folder in allowed:
        with suppress(OSError, ValueError, RuntimeError):  # name too long, NUL, loop of links
            directory = (folder / path).resolve()
            if directory.is_relative_to(folder.resolve()) and directory.is_dir():
                return directory
    raise InvalidRequest(
        f"lora_path = {path!r} is not a directory in {', '.join(str(folder) for folder in allowed)}.",
        param="lora_path",
        hint="Put the adapter there, or allow its folder with FORTWO_DATA_DIRS.",
    )


def _origin(house: House, directory: Path) -> Json:
    """Which base an adapter belongs to: by digest when fortwo saved it, else by the name that PEFT wrote down."""
    manifest = _read(directory / "manifest.json")
    if manifest is not None and {"base_model", "base_digest"} <= manifest.keys():
        return manifest
    config = _read(directory / "adapter_config.json")
    named = "" if config is None else str(config.get("base_model_name_or_path"))
    ids = [entry.id for entry in house.catalog.entries()]
    base = next((id for id in ids if id in (named, Path(named).name.lower())), None)
    if base is None:
        raise InvalidAdapter(
            f"{directory} was trained on {named!r}, which is no base model here.",
            param="lora_path",
            hint=f"Set base_model_name_or_path in adapter_config.json to one of: {', '.join(ids)}.",
        )
    return {"base_model": base, "base_digest": house.residents.load_base(base).digest}


def _read(file: Path) -> Json | None:
    """None when there is none; what is in it is the store's to check."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
