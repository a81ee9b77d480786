"""The bodies of requests: their content type, their size, the time in which they must arrive, and how they are parsed.

A body is counted while it arrives, so that one without Content-Length is bounded too. A large one is parsed on a worker
thread, and what would make a validation error for each of a million items is cut off before it is validated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, get_args

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo import strict_json
from fortwo.errors import FortwoError, InvalidRequest
from fortwo.server.errors import PLAIN_PATHS, respond

LARGE_BYTES = 64 << 10  # from here on a body is parsed on a worker thread
MOST_CONTAINERS = 1_000_000  # lists and objects of a body
MOST_ITEMS = 10_000  # objects of a list that is validated by a model
PATIENCE_SECONDS = 30.0  # in which a body must arrive, and BYTES_PER_SECOND more for each second beyond it
BYTES_PER_SECOND = 16 << 10
DATASETS = ("dataset", "validation_dataset")  # fields with rows
UPLOADS = ("/v1/files", "/api/data/rows", "/api/adapters/import")  # paths whose POST takes multipart/form-data
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"
    status = 413


class BodyTimeout(InvalidRequest):
    code = "body_timeout"
    status = 408


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class RequestBodyMiddleware:
    """ASGI middleware: answers 413, 408 or 415 for a body that is too large, too slow or of a type that no route reads.

    max_bytes: of a body; max_upload_bytes: of one that uploads a file."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in PLAIN_PATHS:  # many of Ollama's clients, curl among them, name another type or none
            MutableHeaders(scope=scope)["Content-Type"] = "application/json"
        headers, uploads = Headers(scope=scope), scope["path"] in UPLOADS
        limit = self._max_upload_bytes if uploads else self._max_bytes
        too_large = BodyTooLarge(
            f"The body of {scope['method']} {scope['path']} has more than {limit >> 20} MiB.",
            hint="Send less, or raise FORTWO_MAX_UPLOAD_MB."
            if uploads
            else "Send less, put a dataset into a file and name its path, or raise FORTWO_MAX_BODY_MB.",
        )
        refused: InvalidRequest | None = check_content_type(scope["method"], headers, uploads)
        declared = headers.get("content-length", "")
        if refused is None and declared.isdecimal() and int(declared) > limit:
            refused = too_large
        if refused is not None:
            await respond(refused)(scope, receive, send)
            return
        await _Body(receive, send, limit, too_large).run(self._app, scope)


class _Body:
    """One request whose body is counted and timed while the application receives it."""

    def __init__(self, receive: Receive, send: Send, limit: int, too_large: BodyTooLarge) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        self._too_large = too_large
        self._failure: FortwoError | None = None
        self._bytes = 0
        self._complete = False
        self._started = False
        self._began = asyncio.get_running_loop().time()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self.receive, self.send)
        except FortwoError:
            if self._failure is None:
                raise
        if self._failure is not None and not self._started:
            close = {"Connection": "close"} if isinstance(self._failure, BodyTimeout) else None
            await respond(self._failure, close)(scope, self._receive, self._send)

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        deadline = self._began + PATIENCE_SECONDS + self._bytes / BYTES_PER_SECOND
        try:
            async with asyncio.timeout_at(deadline):
                message = await self._receive()
        except TimeoutError:
            self._failure = BodyTimeout(
                f"The body did not arrive in time: {self._bytes} bytes came in {PATIENCE_SECONDS:g} seconds or more.",
                hint="Send the whole body at once.",
            )
            raise self._failure from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._bytes > self._limit:
                self._failure = self._too_large
                raise self._failure
        else:
            self._complete = True
        return message

    async def send(self, message: Message) -> None:
        """What the application says after its body failed is not sent: it would name another reason."""
        if self._failure is None or self._started:
            self._started = True
            await self._send(message)


def check_content_type(method: str, headers: Headers, uploads: bool = False) -> UnsupportedMediaType | None:
    """The refusal of a body that is not JSON, or not a form where a file is uploaded. Web pages of other sites can send
    other types, and forms, without asking the server first; SecurityMiddleware refuses theirs."""
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if method in SAFE_METHODS or not has_body:
        return None
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if uploads and kind == "multipart/form-data":
        return None
    if uploads:
        return UnsupportedMediaType(
            f"The body has the Content-Type {given!r}.",
            hint="Send the file as multipart/form-data, with the fields file and purpose.",
        )
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    return UnsupportedMediaType(
        f"The body has the Content-Type {given!r}." if given else "The body has no Content-Type.",
        hint="Send JSON with the header Content-Type: application/json.",
    )


class JsonRoute(APIRoute):
    """A route that parses and validates its JSON body here, a large one on a worker thread. Raises InvalidRequest for
    what is not JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        field = self.body_field
        if field is None or isinstance(field.field_info, Form):
            return handler
        model = field.field_info.annotation

        async def handle(request: Request) -> Response:
            body = await request.body()
            if body and isinstance(model, type) and issubclass(model, BaseModel):
                large = len(body) >= LARGE_BYTES
                parsed = await run_in_threadpool(_parse, body, model) if large else _parse(body, model)
                request._json = parsed  # FastAPI asks request.json(), which keeps its result here
            return await handler(request)

        return handle


def _parse(body: bytes, model: type[BaseModel]) -> BaseModel:
    if body.count(b"[") + body.count(b"{") > MOST_CONTAINERS:  # each would take many times its two characters
        raise InvalidRequest(
            f"The body has more than {MOST_CONTAINERS} lists and objects.",
            hint="Send less, or put a dataset into a file and name its path.",
        )
    try:
        value = strict_json.loads(body)
    except strict_json.RepeatedKey as error:
        raise InvalidRequest(
            f"The body has the key {error.path!r} twice.",
            param=error.path,
            hint="Leave one of the two.",
            code="repeated_key",
        ) from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} (character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise _invalid_json(f"it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _invalid_json("it is nested too deeply") from None
    except ValueError as error:
        raise _invalid_json(str(error)) from None
    try:
        parsed = model.model_validate(_without_surplus(value, model) if len(body) >= LARGE_BYTES else value)
        _check_unicode(value)
        return parsed
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in found]) from None


def _check_unicode(value: Any) -> None:
    """Raises InvalidRequest naming a text with half of a surrogate pair, which JSON can escape and no text can hold.
    Whoever reads the rows of a dataset tells it with its line."""
    said = {name: held for name, held in value.items() if name not in DATASETS} if isinstance(value, dict) else value
    if (path := strict_json.find(said, _is_no_unicode)) is not None:
        raise InvalidRequest(
            f"{path} is not valid Unicode: it contains half of a surrogate pair.",
            param=path,
            hint="Send whole characters: \\ud800 to \\udfff are valid in pairs only.",
        )


def _is_no_unicode(value: Any) -> bool:
    return isinstance(value, str) and not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value)


def _invalid_json(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The body is not JSON: {reason}.",
        code="invalid_json",
        hint="Send one JSON object, with straight double quotes and no trailing comma.",
    )


def _without_surplus(value: Any, annotation: Any, param: str = "") -> Any:
    """The same JSON, but each object that is validated by a model has at most one key that the model does not know:
    validation still refuses it, with one error instead of one for each key. Raises InvalidRequest for a list of more
    than MOST_ITEMS such objects."""
    models = tuple(_models(annotation))
    if not models:
        return value
    if isinstance(value, list):
        if len(value) > MOST_ITEMS:
            raise InvalidRequest(
                f"{param} has {len(value)} items, but at most {MOST_ITEMS} are allowed.",
                param=param,
                hint="Send fewer items.",
            )
        return [_without_surplus(item, annotation, f"{param}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    known = {field.alias or name: field.annotation for name, field in fields.items()}
    unknown = next((key for key in value if key not in known), None)
    kept = {
        key: _without_surplus(value[key], kind, f"{param}.{key}".removeprefix("."))
        for key, kind in known.items()
        if key in value
    }
    return kept if unknown is None else kept | {unknown: value[unknown]}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation such as list[Message] | None contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
