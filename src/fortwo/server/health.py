"""Health: /healthz says that the process answers, /readyz that it does its work: device, queue of jobs and database.

Both need no key and stay quick while a job trains: /healthz touches nothing, and /readyz waits for the turn of the
device at most READY_SECONDS. A micro-step of a job is shorter than that on a machine that can train at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from fortwo.errors import FortwoError
from fortwo.records import Json
from fortwo.server.state import AppState, AppStateDep

READY_SECONDS = 10.0

router = APIRouter(tags=["server"])


@router.get("/healthz", summary="Whether the server is up; needs no key")
@router.get("/health", summary="The same, under the name that llama.cpp's and vLLM's clients ask for")
async def healthz() -> Json:
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Whether device, queue and database work; needs no key",
    responses={503: {"description": "One of them does not: its word says what is wrong."}},
)
async def readyz(state: AppStateDep) -> JSONResponse:
    """Each part is "ok" or says in words what is wrong. status 200 if all are ok, otherwise 503."""
    parts: dict[str, Awaitable[None]] = {"device": _device(state), "queue": _queue(state), "database": _database(state)}
    parts |= {name: check() for name, check in state.checks().items()}
    words = await asyncio.gather(*(_word(part) for part in parts.values()))
    checks = dict(zip(parts, words, strict=True))
    ready = all(word == "ok" for word in words)
    return JSONResponse({"status": "ok" if ready else "not ready", **checks}, 200 if ready else 503)


async def _word(part: Awaitable[None]) -> str:
    try:
        async with asyncio.timeout(READY_SECONDS):
            await part
    except TimeoutError:
        return f"it did not answer within {READY_SECONDS:g} seconds"
    except FortwoError as error:
        return error.message
    return "ok"


async def _device(state: AppState) -> None:
    await asyncio.wrap_future(state.engine.ready())
    if (training := state.registry.training_engine) is not state.engine:
        await asyncio.wrap_future(training.ready())


async def _queue(state: AppState) -> None:
    state.runner.check_alive()


async def _database(state: AppState) -> None:
    await asyncio.get_running_loop().run_in_executor(state.probes, state.jobs.ping)
