"""HTTP responses of errors, of one shape: {"error": {message, type, code, param, hint, request_id}}, or {"error": text}
for Ollama.

Validation errors of pydantic, unknown routes and unexpected exceptions become fortwo's own errors.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo import log_context
from fortwo.errors import FortwoError, InvalidRequest, NotFound, all_of
from fortwo.records import Json

log = logging.getLogger(__name__)
FINDINGS_SHOWN = 10
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
# Paths of Ollama's API, whose clients expect {"error": "..."}.
PLAIN_PATHS = frozenset(
    f"/api/{name}"
    for name in "chat copy create delete embed embeddings generate ps pull push show tags version".split()
)
MAX_VALUE = 80  # characters of an offending value that a message repeats


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"
    status = 405


def install(app: FastAPI) -> None:
    """Add the exception handlers."""
    app.add_exception_handler(FortwoError, lambda _request, error: respond(error))
    app.add_exception_handler(RequestValidationError, lambda _request, error: respond(invalid(error.errors())))
    app.add_exception_handler(HTTPException, _no_route)  # type: ignore[arg-type]


class UnexpectedErrorMiddleware:
    """ASGI middleware: answers any other exception with status 500, and the connection stays usable."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await respond(unexpected(error))(scope, receive, send)


class ErrorResponse(Response):
    """The response for an error, with a Retry-After header if it has retry_after. The path decides on the shape."""

    def __init__(self, error: FortwoError, headers: dict[str, str]) -> None:
        retry = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        super().__init__(status_code=error.status)
        self._error = error
        self._more = retry | headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = plain_body(self._error) if scope["path"] in PLAIN_PATHS else error_document(self._error)
        await JSONResponse(body, self.status_code, self._more)(scope, receive, send)


def respond(error: FortwoError, headers: dict[str, str] | None = None) -> Response:
    """The response for an error, with a Retry-After header if it has retry_after."""
    return ErrorResponse(error, headers or {})


def error_document(error: FortwoError, request_id: str | None = None) -> Json:
    """The HTTP body of an error, with the id of the request that it answers: by default the one under way."""
    fields: Json = error.body()["error"] | {"request_id": request_id or log_context.request_id.get()}
    return {"error": fields}


def plain_body(error: FortwoError) -> Json:
    """The HTTP body of Ollama's API: {"error": text}, with message and hint in one text."""
    told = error.body()["error"]
    return {"error": " ".join(text for text in (told["message"], told["hint"]) if text)}


def unexpected(error: BaseException) -> FortwoError:
    """Log an exception in full under a number, which is the request's id; the error for the client has only that."""
    number = log_context.request_id.get() or uuid.uuid4().hex[:12]
    log.error("Unexpected error %s", number, exc_info=error)
    return FortwoError(
        f"An unexpected error happened. Its number in the server's log is {number}.",
        hint="Try again. If it happens again, report it together with the log.",
    )


def invalid(found: Sequence[Any]) -> InvalidRequest:
    """Pydantic's validation errors, each with field, value and remedy; param and code are those of the first."""
    told = [_told(one) for one in found[:FINDINGS_SHOWN]]
    if more := len(found) - len(told):
        told.append(InvalidRequest(f"and {more} more"))
    return all_of(told)


def _told(first: Any) -> InvalidRequest:
    """One of pydantic's validation errors."""
    param = _path(first["loc"])
    match first["type"]:
        case "json_invalid":
            reason = first["ctx"]["error"]
            return InvalidRequest(
                f"The body is not JSON: {reason} (character {first['loc'][-1]}).",
                code="invalid_json",
                hint="Send one JSON object, with straight double quotes and no trailing comma.",
            )
        case "missing" if param is None:
            return InvalidRequest("The body is missing.", hint="Send a JSON object; /docs shows its fields.")
        case "missing":
            return InvalidRequest(f"{param} is missing.", param=param, hint=f"Add {param}.", code="missing_parameter")
        case "extra_forbidden":
            return InvalidRequest(
                f"{param} is not a known parameter.",
                param=param,
                code="unknown_parameter",
                hint="Remove it or check its spelling; /docs lists the fields.",
            )
        case "string_unicode":
            what = "The key" if param is None else f"{param} ="
            return InvalidRequest(
                f"{what} {shown(first['input'])} is not valid Unicode: it contains half of a surrogate pair.",
                param=param,
                hint="Send whole characters: \\ud800 to \\udfff are valid in pairs only.",
            )
        case "told":
            return InvalidRequest(
                f"{param} = {shown(first['input'])}: {first['msg']}.", param=param, hint=first["ctx"]["hint"]
            )
        case "unsupported_parameter":
            return InvalidRequest(
                f"{param} = {shown(first['input'])} is not supported.",
                param=param,
                code="unsupported_parameter",
                hint=first["msg"],
            )
    if param is None:
        return InvalidRequest(
            f"The body must be a JSON object, not {shown(first['input'])}.",
            hint="Send an object with the header Content-Type: application/json.",
        )
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    remedy = message.removeprefix("Input should ").removeprefix("be ")
    return InvalidRequest(
        f"{param} = {shown(first['input'])}: {message}.",
        param=param,
        hint=f"Make it {remedy}." if message.startswith("Input should be ") else f"Change {param}.",
    )


def shown(value: Any) -> str:
    """A value as an error message shows it, cut off after MAX_VALUE characters."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def _path(loc: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "role") becomes messages[0].role; the body itself is None."""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:MAX_VALUE]}"
    return path.removeprefix(".") or None


# Paths of OpenAI's API that clients ask for by themselves, and what answers the same here.
_INSTEAD = {
    "/v1/engines": "Use GET /v1/models.",
    "/v1/fine-tunes": "Train with POST /v1/fine_tuning/jobs.",
}


def _methods(request: Request) -> list[str]:
    """The methods that a path takes, from all of its routes; the router names those of the first one."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return [name for name in METHODS if any(one.matches(scopes[name])[0] == Match.FULL for one in request.app.routes)]


def _no_route(request: Request, error: HTTPException) -> Response:
    request_line = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        hint = _INSTEAD.get(request.url.path, "/docs lists every path.")
        unknown = NotFound(f"There is no {request_line}.", hint=hint, code="unknown_path")
        return respond(unknown, headers)
    if error.status_code == 405:
        allowed = ", ".join(_methods(request)) or headers.get("Allow", "another method")
        headers["Allow"] = allowed
        return respond(MethodNotAllowed(f"{request_line} is not allowed.", hint=f"This path takes {allowed}."), headers)
    refused = InvalidRequest(f"{request_line}: {error.detail}")
    refused.status = error.status_code
    return respond(refused, headers)
