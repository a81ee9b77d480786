"""The native API of exports: an adapter in the form of another program, and the files to download."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.archive import TarResponse
from fortwo.server.native import LARGEST_ID
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppState, AppStateDep

if TYPE_CHECKING:
    from fortwo.export.exporter import ExportPlan

router = APIRouter(prefix="/api", tags=["exports"], route_class=JsonRoute)


class ExportRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    to: str = Field(description="peft, merged, gguf-lora, gguf, ollama, mlx or vllm.")
    quantization: str | None = Field(None, description="Of gguf and ollama: Q4_K_M, Q8_0, F16 (the default), ...")
    exam: bool = Field(True, description="Run the adapter's exam again in the exported form.")


@router.post("/adapters/{name}/export/plan", summary="What an export of an adapter, or of name@version, would write")
async def plan_export(request: Request, state: AppStateDep, name: str, body: ExportRequest) -> Json:
    """`estimated_bytes`: the size on disk, at most; `free_bytes`: what the disk of the home has. `exam`: why the exam
    will not be run, or null."""
    plan = await state.planning.run(request, lambda _: _plan(state, name, body))
    free = await run_in_threadpool(lambda: shutil.disk_usage(state.settings.home).free)
    found = asdict(plan)
    return {**found, "estimated_bytes": found.pop("bytes"), "free_bytes": free}


@router.post("/adapters/{name}/export", status_code=202, summary="Export an adapter, or one version as name@version")
async def start_export(request: Request, state: AppStateDep, name: str, body: ExportRequest) -> Json:
    """Exports run one after another; eight may wait. Raises StorageFailed where the disk has no room for it."""
    from fortwo.export.output import check_space

    def check(_: object) -> ExportPlan:
        plan = _plan(state, name, body)
        check_space(state.settings.home, plan.bytes)
        return plan

    plan = await state.planning.run(request, check)
    return state.exports.add(plan.adapter, plan.to, plan.quantization, body.exam, plan.bytes).body()


def _plan(state: AppState, name: str, body: ExportRequest) -> ExportPlan:
    from fortwo.export.exporter import plan_export

    return plan_export(name, body.to, body.quantization, state.catalog, state.adapters)


@router.get("/exports", summary="Exports, newest first")
async def exports(state: AppStateDep) -> Json:
    """Each is kept for a day after its end, until `expires_at`."""
    return {"exports": [export.body() for export in state.exports.all()]}


@router.get("/exports/{export_id}", summary="One export")
async def export(state: AppStateDep, export_id: str) -> Json:
    """`files` lists the files of a complete export with bytes and sha256; `exam` has, by metric, the report's value and
    that of the exported form."""
    return state.exports.get(export_id).body()


@router.post("/exports/{export_id}/cancel", summary="Cancel an export; nothing of it is left")
async def cancel_export(state: AppStateDep, export_id: str) -> Json:
    return (await state.exports.cancel(export_id)).body()


@router.delete("/exports/{export_id}", summary="Delete an export that has ended, and its files")
async def delete_export(state: AppStateDep, export_id: str) -> Json:
    await state.exports.delete(export_id)
    return {"export_id": export_id, "deleted": True}


@router.get("/exports/{export_id}/events", response_model=None, summary="An export as it changes (SSE)")
async def export_events(
    state: AppStateDep, export_id: str, last_event_id: Annotated[int, Header(ge=-1, le=LARGEST_ID)] = -1
) -> Response:
    """Each event has the whole export. The stream ends when the export has ended.

    204 tells a browser's EventSource, which reconnects by itself, that no more events will come.
    """
    found = state.exports.get(export_id)
    if found.ended and found.revision == last_event_id:
        return Response(status_code=204)
    state.streams.take()
    return sse.EventStream(state.exports.stream(export_id, last_event_id), on_close=state.streams.release)


@router.get(
    "/exports/{export_id}/files/{path:path}", response_class=FileResponse, summary="One file of a complete export"
)
async def export_file(state: AppStateDep, export_id: str, path: str) -> FileResponse:
    file = state.exports.file(export_id, path)
    return FileResponse(file, media_type="application/octet-stream", filename=file.name)


@router.get("/exports/{export_id}/archive", response_model=None, summary="All files of a complete export as one .tar")
async def export_archive(state: AppStateDep, export_id: str) -> TarResponse:
    """The files lie in a folder with the name of the adapter, its version and the form."""
    found = state.exports.complete(export_id)
    folder = f"{found.adapter.replace('@', '-')}-{found.to}"
    paths = [one["path"] for one in found.result["files"]]
    return TarResponse([(f"{folder}/{path}", state.exports.file(export_id, path)) for path in paths], f"{folder}.tar")
