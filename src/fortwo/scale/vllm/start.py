"""The engine that the settings describe: on a vLLM that runs, or on one that fortwo starts."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from fortwo.errors import InvalidRequest
from fortwo.hub.catalog import Catalog
from fortwo.scale.vllm.client import VllmClient
from fortwo.scale.vllm.engine import VllmEngine
from fortwo.scale.vllm.process import VllmProcess, free_port
from fortwo.settings import Settings


def vllm_engine(settings: Settings, flush: Callable[[], None]) -> VllmEngine:
    """Not yet started. Raises InvalidRequest for a FORTWO_VLLM_URL that is none, and what Catalog.prepare raises."""
    catalog, process = Catalog(settings.models_dir), None
    url, key = settings.vllm_url, settings.plain_vllm_api_key
    if url is None:
        port, key = free_port(), key or secrets.token_urlsafe(32)
        url = f"http://127.0.0.1:{port}"
        base = settings.default_model
        directory = catalog.prepare(base).resolve()
        process = VllmProcess(settings.vllm_command, base, directory, port, settings.max_adapters, key, settings.home)
    elif not url.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"vllm_url = {url!r} is not an address.",
            param="vllm_url",
            hint="Set FORTWO_VLLM_URL to vLLM's address, such as http://127.0.0.1:8000.",
        )
    client = VllmClient(url, key, settings.request_timeout)
    return VllmEngine(settings.threads, flush, client, catalog, settings.vllm_dir, process)
