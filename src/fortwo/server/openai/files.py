"""OpenAI's files: datasets that are uploaded for training, and the results of fine-tuning jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import FileResponse

from fortwo.data import datasets
from fortwo.data.files import read_rows
from fortwo.data.row_formats import ROW_FORMATS
from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.jobs.files import StoredFile, safe_name
from fortwo.records import Json
from fortwo.server.idempotency import given_key, key_of
from fortwo.server.multipart import Form, form_schema, read_form
from fortwo.server.state import AppState, AppStateDep

TRAINING = "fine-tune"
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # seconds; OpenAI's
MOST_LISTED = 10_000

EXPIRY: dict[str, Json] = {
    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
    "expires_after[seconds]": {"type": "integer", "minimum": SHORTEST_LIFE, "maximum": LONGEST_LIFE},
}
FORM = form_schema(["file", "purpose"], purpose={"type": "string", "enum": [TRAINING]}, **EXPIRY)

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post("/files", summary="Upload a dataset", openapi_extra=FORM)
async def upload(request: Request, state: AppStateDep) -> Json:
    """The rows are checked; a file with a row that is wrong is refused with all findings and is not kept."""
    given_key(request)
    async with contextmanager_in_threadpool(state.files.draft()) as draft:
        received = draft / ".received"
        form = await read_form(request, received)
        lifetime = checked_form(form)
        return await state.planning.run(request, lambda check: _add(state, request, form, received, lifetime, check))


def _add(
    state: AppState, request: Request, form: Form, received: Path, lifetime: int | None, check: Callable[[], None]
) -> Json:
    filename = form.filename or "file"
    content = received.rename(received.parent / safe_name(filename))
    try:
        for _ in datasets.checked(datasets.validate_rows(read_rows(content), filename, ROW_FORMATS), check):
            pass
    except InvalidDataset as error:
        message, hint = (text and text.replace(f"{content.parent}/", "") for text in (error.message, error.hint))
        raise InvalidDataset(message or "", param="file", hint=hint, code=error.code) from None
    same = [filename, form.fields, datasets.file_sha256(content)]
    return state.answers.once(
        key_of(request, json.dumps(same, sort_keys=True).encode()),
        lambda also: state.files.add(content, filename, TRAINING, lifetime=lifetime, also=also),
        file_body,
    )


def checked_form(form: Form) -> int | None:
    """The seconds until the file expires, or None. Raises InvalidRequest for a field that is missing or wrong."""
    fields = dict(form.fields)
    purpose = fields.pop("purpose", None)
    anchor, seconds = (fields.pop(f"expires_after[{name}]", None) for name in ("anchor", "seconds"))
    if form.filename is None:
        raise InvalidRequest("file is missing.", param="file", hint="Add the file.", code="missing_parameter")
    if purpose is None:
        raise InvalidRequest(
            "purpose is missing.", param="purpose", hint=f'Add purpose = "{TRAINING}".', code="missing_parameter"
        )
    if purpose != TRAINING:
        raise InvalidRequest(
            f"purpose = {purpose!r} is not supported.",
            param="purpose",
            hint=f'Files are uploaded for training: purpose = "{TRAINING}".',
            code="unsupported_parameter",
        )
    for unknown in fields:
        raise InvalidRequest(
            f"{unknown} is not a known parameter.", param=unknown, hint="Remove it.", code="unknown_parameter"
        )
    if anchor is None and seconds is None:
        return None
    whole = int(seconds) if seconds is not None and re.fullmatch(r"[0-9]{1,9}", seconds) else -1
    if anchor != "created_at" or not SHORTEST_LIFE <= whole <= LONGEST_LIFE:
        raise InvalidRequest(
            f"expires_after = {{'anchor': {anchor!r}, 'seconds': {seconds!r}}} is not valid.",
            param="expires_after",
            hint=f'Give the anchor "created_at" and {SHORTEST_LIFE} to {LONGEST_LIFE} seconds.',
        )
    return whole


@router.get("/files", summary="Uploaded files and results")
def files(
    state: AppStateDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    order: Literal["asc", "desc"] = "desc",
) -> Json:
    found = state.files.files(limit + 1, after=after, purpose=purpose, ascending=order == "asc")
    return page([file_body(file) for file in found], limit)


@router.get("/files/{file_id}", summary="One file")
def file(state: AppStateDep, file_id: str) -> Json:
    return file_body(state.files.get(file_id))


@router.get("/files/{file_id}/content", response_class=FileResponse, summary="The content of a file")
def content(state: AppStateDep, file_id: str) -> FileResponse:
    return FileResponse(state.files.path(file_id), media_type="application/octet-stream")


@router.delete("/files/{file_id}", summary="Delete a file")
def delete(state: AppStateDep, file_id: str) -> Json:
    """A job that needs the file can still read it."""
    state.files.delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_body(file: StoredFile) -> Json:
    """OpenAI's object of a file."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None if file.expires_at is None else int(file.expires_at),
    }


def page(found: list[Json], limit: int) -> Json:
    """OpenAI's object of a list. found: one item more than `limit` if there are more."""
    data = found[:limit]
    return {
        "object": "list",
        "data": data,
        "has_more": len(found) > limit,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
