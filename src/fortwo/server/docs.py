"""The page at /docs that shows every path and can call it: Swagger UI from an installed package, not the internet.

Where there is an API key, the page and its files need none: "Authorize" asks for the key, and calls send it.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from starlette.staticfiles import StaticFiles

PAGE_PATH = "/docs"
FILES_PATH = "/docs/files"
OPENAPI_PATH = "/openapi.json"
# Makes the OpenAPI document say that a route needs the key; SecurityMiddleware is what checks it.
API_KEY = Depends(
    HTTPBearer(
        auto_error=False,
        scheme_name="api_key",
        description="FORTWO_API_KEY of the server, or a key of `fortwo keys create`.",
    )
)


_TEXT = {"type": "string"}
_MAYBE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_FIELDS = {
    "message": _TEXT,
    "type": _TEXT,
    "code": _TEXT,
    "param": _MAYBE_TEXT,
    "hint": _MAYBE_TEXT,
    "request_id": _TEXT,
}
_ERROR_BODY = {
    "title": "ErrorBody",
    "description": "What every error says: message is what is wrong, hint the remedy, param the field at fault, "
    "request_id the id of the request in the server's log.",
    "type": "object",
    "properties": {"error": {"type": "object", "properties": _FIELDS, "required": list(_FIELDS)}},
    "required": ["error"],
}
_STATUSES = {
    400: "The request is wrong: a field, a value or a file.",
    401: "The API key is missing, wrong or revoked.",
    403: "The API key lacks the scope, or the request comes from the page of another site.",
    404: "What is named does not exist.",
    408: "The body did not arrive in time.",
    409: "The current state does not allow it.",
    413: "The body is too large.",
    415: "The body is not JSON by its Content-Type.",
    429: "The server or the API key is at a limit; Retry-After says when to try again.",
    500: "An unexpected error, which the server's log has under the number in the message.",
    503: "The server is shutting down, or something it needs does not answer.",
    504: "The reply took longer than the time limit.",
    507: "The disk or the database cannot be written.",
}
_PLAIN_ERROR_BODY = {"type": "object", "properties": {"error": _TEXT}, "required": ["error"]}


def _errors(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": schema}}
    return {status: {"description": text, "content": content} for status, text in _STATUSES.items()}


ERRORS = _errors({"$ref": "#/components/schemas/ErrorBody"})
PLAIN_ERRORS = _errors(_PLAIN_ERROR_BODY)  # of Ollama's paths


def install(app: FastAPI) -> None:
    """Add the page and its files."""
    document = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's document without status 422: wrong requests get 400."""
        if app.openapi_schema is None:
            found = document()
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            schemas["ErrorBody"] = _ERROR_BODY
        return app.openapi_schema or document()

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get(PAGE_PATH, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=OPENAPI_PATH,
            title=app.title,
            swagger_js_url=f"{FILES_PATH}/swagger-ui-bundle.js",
            swagger_css_url=f"{FILES_PATH}/swagger-ui.css",
            swagger_favicon_url=f"{FILES_PATH}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # otherwise it sends the document to swagger.io
        )

    app.mount(FILES_PATH, StaticFiles(packages=[("fastapi_offline", "static")]))
