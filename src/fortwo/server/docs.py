"""The page at /docs that shows every path and lets one try it: Swagger UI, out of a package instead of the internet.

Where there is an API key, the page and what it is made of need none: "Authorize" asks for the key, and what is tried
sends it.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.params import Depends as Dependency
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from starlette.staticfiles import StaticFiles

from fortwo.settings import Settings

PAGE = "/docs"
FILES = "/docs/files"
DOCUMENT = "/openapi.json"


def declared(settings: Settings) -> list[Dependency]:
    """What has the document say that a route needs the key. It is the guard that asks for it."""
    bearer = HTTPBearer(auto_error=False, scheme_name="api_key", description="FORTWO_API_KEY of the server.")
    return [] if settings.api_key is None else [Depends(bearer)]


def install(app: FastAPI) -> None:
    @app.get(PAGE, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=DOCUMENT,
            title=app.title,
            swagger_js_url=f"{FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{FILES}/swagger-ui.css",
            swagger_favicon_url=f"{FILES}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # or it would have swagger.io look at the document
        )

    app.mount(FILES, StaticFiles(packages=[("fastapi_offline", "static")]))
