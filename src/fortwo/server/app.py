"""The FastAPI application: routes, middleware and error handlers. Whoever runs it opens and closes its AppState."""

from __future__ import annotations

from fastapi import FastAPI

from fortwo.server import (
    adapter_upload,
    datasets,
    docs,
    errors,
    exports,
    health,
    llama_cpp,
    machine,
    metrics,
    models,
    native,
    ollama,
    ollama_models,
    openai,
    page,
    reports,
    versions,
    vllm,
)
from fortwo.server.observation import ObservationMiddleware
from fortwo.server.request_body import RequestBodyMiddleware
from fortwo.server.security import SecurityMiddleware
from fortwo.server.state import AppState, ShutdownMiddleware


def create_app(state: AppState) -> FastAPI:
    """The application over `state`, which must be open when the first request arrives."""
    app = FastAPI(
        title="fortwo",
        description="Teach a local language model one thing, prove that it learned it, and chat with it.",
        openapi_url=docs.OPENAPI_PATH,
        docs_url=None,  # FastAPI's own page loads its scripts from the internet
        redoc_url=None,
        # Its own spans have the query of a request; server.observation makes ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.fortwo = state
    errors.install(app)
    # The middleware that is added last sees a request first.
    for one in state.middleware:
        app.add_middleware(one.cls, *one.args, **one.kwargs)
    app.add_middleware(
        RequestBodyMiddleware,
        max_bytes=state.settings.max_body_mb << 20,
        max_upload_bytes=state.settings.max_upload_mb << 20,
    )
    app.add_middleware(ShutdownMiddleware, state=state)
    app.add_middleware(
        SecurityMiddleware,
        api_key=state.settings.plain_api_key,
        keyed=state.keyed,
        usage=state.key_usage,
    )
    app.add_middleware(errors.UnexpectedErrorMiddleware)
    app.add_middleware(ObservationMiddleware, metrics=state.request_metrics)
    keyed = [docs.API_KEY] if state.keyed else []
    own = (
        models.router,
        native.router,
        versions.router,
        reports.router,
        exports.router,
        datasets.router,
        datasets.uploads,
        adapter_upload.router,
        machine.router,
        metrics.router,
    )
    for router in (*own, *openai.routers, vllm.router, llama_cpp.router, *state.routers):
        app.include_router(router, dependencies=keyed, responses=docs.ERRORS)
    for router in (ollama.router, ollama_models.router):
        app.include_router(router, dependencies=keyed, responses=docs.PLAIN_ERRORS)
    app.include_router(health.router)
    docs.install(app)
    page.install(app)
    return app
