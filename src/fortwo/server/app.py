"""The application: routes, the guard before them, one shape for errors, and the house's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from fortwo.records import Json
from fortwo.server import errors, native, openai, vllm
from fortwo.server.house import House
from fortwo.server.security import Guard


def create_app(house: House) -> FastAPI:
    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(house.open)
        try:
            yield
        finally:
            await run_in_threadpool(house.close)

    app = FastAPI(
        title="fortwo",
        description="Teach a local language model one thing, prove that it learned it, and chat with it.",
        lifespan=life,
    )
    app.state.house = house
    errors.install(app)
    app.add_middleware(Guard, settings=house.settings)
    app.include_router(native.router)
    app.include_router(openai.router)
    app.include_router(vllm.router)

    @app.get("/healthz", tags=["server"], summary="Whether the server is up; needs no key")
    async def healthz() -> Json:
        return {"status": "ok"}

    return app
