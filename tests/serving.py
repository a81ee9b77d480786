"""A real server on a free port, in a thread of the test's own process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fortwo.hub.catalog import Catalog
from fortwo.server.state import AppState
from fortwo.server.uvicorn_server import Server
from fortwo.settings import Settings

if TYPE_CHECKING:
    pass

ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Served:
    state: AppState
    server: Server
    url: str
    http: httpx.Client

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, **more: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **more},
        )

    def wait(self, job_id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """The job once its status is one of these (or any end)."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.http.get(f"/api/training/jobs/{job_id}").json()
            if job["status"] in (*statuses, *ENDED):
                return job
            time.sleep(0.02)
        raise AssertionError(f"job {job_id} is {job['status']} after {seconds} s")


@contextmanager
def serve(settings: Settings, grace: float = 0, create: Callable[[Settings], AppState] = AppState) -> Iterator[Served]:
    """grace: seconds for replies that are under way at the end."""
    state = create(settings)
    server = Server(state, grace=grace)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it started"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            yield Served(state, server, url, http)
    finally:
        server.should_exit = True
        thread.join()
        state.close()


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check the one shape of errors; its message and hint as one text."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "hint", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    assert error["hint"]
    return f"{error['message']} {error['hint']}"


def chunks(response: httpx.Response) -> list[Any]:
    """The data of server-sent events, JSON parsed; "[DONE]" as it is."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def tiny_settings(home: Path, tiny: Path, **more: Any) -> Settings:
    """Settings of a home whose catalog has the directory `tiny` as model "tiny", the default one."""
    settings = Settings(home=home, port=0, data_dirs=(home / "data",), default_model="tiny", threads=1, **more)
    Catalog(settings.models_dir).add("tiny", tiny)
    return settings
