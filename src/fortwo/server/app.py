"""The application: routes, the guard before them, and one shape for errors. Its house is opened by who runs it."""

from __future__ import annotations

from fastapi import FastAPI

from fortwo.records import Json
from fortwo.server import docs, errors, native, openai, page, vllm
from fortwo.server.house import Door, House
from fortwo.server.security import Guard


def create_app(house: House) -> FastAPI:
    app = FastAPI(
        title="fortwo",
        description="Teach a local language model one thing, prove that it learned it, and chat with it.",
        openapi_url=docs.DOCUMENT,
        docs_url=None,  # FastAPI's own page loads its scripts from the internet
        redoc_url=None,
    )
    app.state.house = house
    errors.install(app)
    app.add_middleware(Door, house=house)
    app.add_middleware(Guard, settings=house.settings)
    for router in (native.router, *openai.routers, vllm.router):
        app.include_router(router, dependencies=docs.declared(house.settings))

    @app.get("/healthz", tags=["server"], summary="Whether the server is up; needs no key")
    async def healthz() -> Json:
        return {"status": "ok"}

    docs.install(app)
    page.install(app)
    return app
