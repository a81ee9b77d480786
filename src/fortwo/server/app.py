"""The application: routes, the guard before them, and one shape for errors. Its house is opened by who runs it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from fortwo.records import Json
from fortwo.server import errors, native, openai, vllm
from fortwo.server.house import Door, House
from fortwo.server.security import Guard


def create_app(house: House) -> FastAPI:
    app = FastAPI(
        title="fortwo",
        description="Teach a local language model one thing, prove that it learned it, and chat with it.",
        docs_url=None,  # FastAPI's pages load their scripts from the internet
        redoc_url=None,
    )
    app.state.house = house
    errors.install(app)
    app.add_middleware(Door, house=house)
    app.add_middleware(Guard, settings=house.settings)
    for router in (native.router, *openai.routers, vllm.router):
        app.include_router(router)

    @app.get("/healthz", tags=["server"], summary="Whether the server is up; needs no key")
    async def healthz() -> Json:
        return {"status": "ok"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> RedirectResponse:
        return RedirectResponse("/openapi.json")

    return app
