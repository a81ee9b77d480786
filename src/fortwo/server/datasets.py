"""The native API of what is taught: suggested questions, what is in a dataset, and the rows of an uploaded file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fortwo.data.files import plain_rows
from fortwo.data.inspection import inspect
from fortwo.errors import InvalidDataset, InvalidRequest
from fortwo.facts.suggestions import suggest_questions
from fortwo.jobs.files import safe_name
from fortwo.records import LONGEST_NAME, Fact, Json
from fortwo.server.multipart import form_schema, read_form
from fortwo.server.request_body import JsonRoute
from fortwo.server.state import AppStateDep
from fortwo.server.workers import Check

MOST_TEXTS = 100
LONGEST_QUESTION = 1000  # characters

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_NAME)]
Names = Annotated[list[Name], Field(max_length=MOST_TEXTS)]
Question = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_QUESTION)]

router = APIRouter(prefix="/api", tags=["training"], route_class=JsonRoute)
uploads = APIRouter(prefix="/api", tags=["training"])

FORM = form_schema(["file"])


class AsciiResponse(JSONResponse):
    """Rows as they are written may hold half of a surrogate pair, which only an escape of JSON can say."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class QuestionsRequest(BaseModel):
    """A fact as far as it is written down."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: Name
    aliases: Names = []
    match: Names = Field([], description="A question that holds one of these phrases is not suggested.")
    questions: list[Question] = Field([], max_length=MOST_TEXTS, description="Those that the fact has already.")
    count: int = Field(8, ge=1, le=50, description="The most questions to suggest.")


@router.post("/facts/questions", summary="Suggest further questions for a fact")
async def questions(request: Request, state: AppStateDep, body: QuestionsRequest) -> Json:
    """From the templates of training; no model is asked. The same body gets the same questions."""
    fact = Fact(body.subject, "", tuple(body.match), tuple(body.questions), tuple(body.aliases))
    return await state.planning.run(request, lambda _: {"questions": list(suggest_questions(fact, body.count))})


class InspectRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Json = Field(
        description='One of {"path"}, {"file_id"}, {"hub"}, {"examples"}, {"facts"}, and "columns" if wanted.'
    )


@router.post(
    "/data/inspect",
    response_model=Json,
    summary="The format of a dataset, its columns, and all that is wrong with its rows",
)
async def inspect_data(request: Request, state: AppStateDep, body: InspectRequest) -> JSONResponse:
    """`suggested` is a `columns` that the names of the columns suggest where the rows have no known format. `problems`
    lists each kind of mistake once, with its first line, the next lines, and how many rows have it."""

    def work(check: Check) -> Json:
        source, folders = state.files.source(body.dataset, state.settings.allowed_data_dirs, check)
        return asdict(inspect(source, folders, check))

    return AsciiResponse(await state.readers(body.dataset).run(request, work))


@uploads.post("/data/rows", response_model=Json, summary="The rows of a file, which is not kept", openapi_extra=FORM)
async def rows(request: Request, state: AppStateDep) -> JSONResponse:
    """For .json, .jsonl, .txt, .csv, .tsv and .parquet files. The rows are as written: their format is not checked."""
    async with contextmanager_in_threadpool(state.files.draft()) as draft:
        received = draft / ".received"
        form = await read_form(request, received)
        for unknown in form.fields:
            raise InvalidRequest(f"{unknown} is not a known field.", param=unknown, hint="Send only the file.")
        if form.filename is None:
            raise InvalidRequest("file is missing.", param="file", hint="Add the file.", code="missing_parameter")
        filename = form.filename

        def work(_: Check) -> Json:
            content = received.rename(draft / safe_name(filename))
            try:
                return {"filename": filename, "rows": plain_rows(content)}
            except InvalidDataset as error:
                message, hint = (text and text.replace(str(content), filename) for text in (error.message, error.hint))
                raise InvalidDataset(message or "", param="file", hint=hint, code=error.code) from None

        return AsciiResponse(await state.planning.run(request, work))
