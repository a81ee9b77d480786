"""The page at /docs that shows every path and can call it: Swagger UI from an installed package, not the internet.

Where there is an API key, the page and its files need none: "Authorize" asks for the key, and calls send it.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from starlette.staticfiles import StaticFiles

PAGE_PATH = "/docs"
FILES_PATH = "/docs/files"
OPENAPI_PATH = "/openapi.json"
# Makes the OpenAPI document say that a route needs the key; SecurityMiddleware is what checks it.
API_KEY = Depends(HTTPBearer(auto_error=False, scheme_name="api_key", description="FORTWO_API_KEY of the server."))


def install(app: FastAPI) -> None:
    """Add the page and its files."""

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
