"""How the JSON bodies of requests are parsed: a key that an object has twice is refused."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from fortwo import strict_json
from fortwo.errors import InvalidRequest


class JsonRoute(APIRoute):
    """A route that parses its JSON body here. Raises InvalidRequest for a key that an object has twice."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if "json" in request.headers.get("content-type", "") and (body := await request.body()):
                with suppress(ValueError, RecursionError):  # FastAPI says what is wrong with it
                    request._json = parse(body)  # FastAPI asks request.json(), which keeps its result here
            return await handler(request)

        return handle


def parse(body: bytes) -> Any:
    """The value of a JSON body. Raises InvalidRequest for a key that an object has twice, ValueError for no JSON."""
    try:
        return strict_json.loads(body)
    except strict_json.RepeatedKey as error:
        raise InvalidRequest(
            f"The body has the key {error.path!r} twice.",
            param=error.path,
            hint="Leave one of the two.",
            code="repeated_key",
        ) from None
