"""Servers with keys of `fortwo keys create`: scopes, limits, and revoking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.errors import InvalidRequest
from fortwo.home import home_id
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.jobs.store import JobStore
from fortwo.server.state import AppState
from fortwo.settings import Settings

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
ROWS = {"examples": [{"prompt": "a", "completion": "b"}] * 4}


def fortwo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORTWO_")}
    return subprocess.run(
        [sys.executable, "-m", "fortwo", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"FORTWO_HOME": str(home)},
        timeout=120,
    )


@contextmanager
def keys_of(settings: Settings) -> Iterator[ApiKeyStore]:
    """The keys of a home whose server may run or not, as the command line has them."""
    settings.home.mkdir(exist_ok=True)
    store = JobStore(settings.database, home_id(settings.home))
    yield ApiKeyStore(store)
    store.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, dict[str, str], ApiKeyStore]]:
    """A server that has keys but no FORTWO_API_KEY; one key for each scope; the store to make others."""
    settings = tiny_settings(tmp_path_factory.mktemp("guarded"), tiny)
    with keys_of(settings) as keys:
        made = {scope: keys.create(scope, [scope]) for scope in ("read", "chat", "train", "admin")}
        with serve(settings) as served:
            yield served, made, keys


def test_where_there_are_keys_every_request_needs_one(guarded: tuple[Served, dict[str, str], ApiKeyStore]) -> None:
    served, made, _ = guarded
    for headers in ({}, bearer("wrong"), bearer(made["read"] + "x"), {"Authorization": made["read"]}):
        for path in ("/v1/models", "/api/tags", "/props", "/metrics", "/nowhere"):
            response = served.http.get(path, headers=headers)
            assert "fortwo keys create" in refused_anywhere(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
        assert served.http.get(path).status_code == 200
    assert "securitySchemes" in served.http.get("/openapi.json").json()["components"]


def refused_anywhere(response: httpx.Response, status: int) -> str:
    """The text of an error, also in the shape of Ollama's paths."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error if isinstance(error, str) else f"{error['message']} {error['hint']}"


@pytest.mark.parametrize(
    ("method", "path", "body", "scope"),
    [
        ("GET", "/v1/models", None, "read"),
        ("GET", "/api/tags", None, "read"),
        ("GET", "/props", None, "read"),
        ("GET", "/api/training/jobs", None, "read"),
        ("POST", "/api/show", {"model": "tiny"}, "read"),
        ("POST", "/v1/chat/completions", CHAT, "chat"),
        ("POST", "/api/chat", {"model": "tiny", "messages": CHAT["messages"], "stream": False}, "chat"),
        ("POST", "/tokenize", {"content": "hello"}, "chat"),
        ("POST", "/api/training/plan", {"adapter_name": "a", "dataset": ROWS}, "train"),
        ("POST", "/api/data/preview", {"dataset": ROWS}, "train"),
        ("POST", "/api/models/tiny/load", None, "admin"),
    ],
)
def test_a_scope_allows_what_is_its_own(
    guarded: tuple[Served, dict[str, str], ApiKeyStore], method: str, path: str, body: Any, scope: str
) -> None:
    served, made, _ = guarded
    for given, key in made.items():
        response = served.http.request(method, path, json=body, headers=bearer(key))
        if given in (scope, "admin"):
            assert response.status_code < 300, response.text
        else:
            said = refused_anywhere(response, 403)
            assert f"needs the scope {scope}" in said
            assert f"--scope {scope}" in said
            if path not in ("/api/show", "/api/chat", "/api/tags"):
                refused(response, 403, "missing_scope")


def test_a_key_that_is_revoked_is_refused_at_once(guarded: tuple[Served, dict[str, str], ApiKeyStore]) -> None:
    served, _, keys = guarded
    key = keys.create("short", ["read", "chat"])
    assert served.http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert served.http.post("/v1/chat/completions", json=CHAT, headers=bearer(key)).status_code == 200
    keys.revoke("short")
    refused(served.http.get("/v1/models", headers=bearer(key)), 401, "invalid_api_key")
    refused(served.http.post("/v1/chat/completions", json=CHAT, headers=bearer(key)), 401, "invalid_api_key")


def test_streams_end_when_their_key_is_revoked(guarded: tuple[Served, dict[str, str], ApiKeyStore]) -> None:
    """The events of a job that never ends."""
    served, made, keys = guarded
    key = keys.create("stream", ["read"])
    job = served.state.jobs.create(
        model="tiny", adapter_name="a", dataset={}, plan={"parent": None}, progress={}, fine_tuning=None
    )
    served.state.jobs.update(job.id, status="running")
    with served.http.stream("GET", f"/api/training/jobs/{job.id}/events", headers=bearer(key)) as response:
        assert response.status_code == 200
        assert served.state.streams.count == 1
        keys.revoke("stream")
        otherwise = threading.Timer(30, served.state.jobs.update, (job.id,), {"status": "cancelled"})
        otherwise.start()  # so that this test fails, instead of waiting for ever, where the stream goes on
        with pytest.raises(httpx.RemoteProtocolError):
            response.read()
        otherwise.cancel()
    assert served.state.streams.count == 0
    assert served.http.get("/v1/models", headers=bearer(made["read"])).status_code == 200
    served.state.jobs.update(job.id, status="cancelled")


def test_limits_of_a_key(guarded: tuple[Served, dict[str, str], ApiKeyStore]) -> None:
    served, made, keys = guarded
    key = keys.create("slow", ["read"], requests_per_minute=3)
    assert [served.http.get("/v1/models", headers=bearer(key)).status_code for _ in range(4)] == [200, 200, 200, 429]
    response = served.http.get("/v1/models", headers=bearer(key))
    assert "3 requests a minute" in refused(response, 429, "rate_limit_exceeded")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(response.headers["retry-after"]) <= 20
    assert served.http.get("/v1/models", headers=bearer(made["read"])).status_code == 200

    single = keys.create("single", ["read"], concurrent=1)
    job = served.state.jobs.create(
        model="tiny", adapter_name="a", dataset={}, plan={"parent": None}, progress={}, fine_tuning=None
    )
    served.state.jobs.update(job.id, status="running")
    with served.http.stream("GET", f"/api/training/jobs/{job.id}/events", headers=bearer(single)) as stream:
        assert stream.status_code == 200
        said = refused(served.http.get("/v1/models", headers=bearer(single)), 429, "rate_limit_exceeded")
        assert "limit is 1" in said
        served.state.jobs.update(job.id, status="cancelled")
        stream.read()
    assert served.http.get("/v1/models", headers=bearer(single)).status_code == 200


def test_fortwo_api_key_stays_the_key_for_everything(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="s3cret")) as served:
        with keys_of(served.state.settings) as keys:
            reader = keys.create("reader", ["read"])
        assert served.http.post("/api/models/tiny/load", headers=bearer("s3cret")).status_code == 200
        assert served.http.get("/v1/models", headers=bearer(reader)).status_code == 200
        refused(served.http.post("/api/models/tiny/load", headers=bearer(reader)), 403, "missing_scope")


def test_a_key_with_scopes_does_not_become_the_key_for_everything(tmp_path: Path) -> None:
    """Somebody exports it for the command line and then starts a server in the same shell."""
    with keys_of(Settings(home=tmp_path / "home")) as keys:
        reader = keys.create("reader", ["read"])
    with pytest.raises(InvalidRequest, match="'reader'") as caught:
        AppState(Settings(home=tmp_path / "home", api_key=reader))
    assert caught.value.param == "api_key"


def test_without_keys_this_machine_needs_none_but_a_key_that_is_sent_counts(served: Served) -> None:
    with keys_of(served.state.settings) as keys:
        reader = keys.create("reader", ["read"])
        assert served.http.get("/v1/models", headers=bearer(reader)).status_code == 200
        refused(served.http.post("/api/models/tiny/load", headers=bearer(reader)), 403, "missing_scope")
        keys.revoke("reader")
        refused(served.http.get("/v1/models", headers=bearer(reader)), 401, "invalid_api_key")
    assert served.http.get("/v1/models").status_code == 200
    assert served.http.get("/v1/models", headers=bearer("any other")).status_code == 200


def test_the_commands(tmp_path: Path) -> None:
    home = tmp_path / "home"
    made = fortwo(home, "keys", "create", "ci", "--scope", "read", "--scope", "train", "--requests-per-minute", "5")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    with keys_of(Settings(home=home)) as keys:
        found = keys.find(key)
    assert found is not None
    assert (found.name, found.scopes, found.requests_per_minute) == ("ci", ("read", "train"), 5)
    listed = fortwo(home, "keys", "list")
    assert "ci" in listed.stdout
    assert key not in listed.stdout
    (shown,) = json.loads(fortwo(home, "keys", "list", "--json").stdout)["keys"]
    assert (shown["name"], shown["scopes"], shown["concurrent"]) == ("ci", ["read", "train"], None)
    assert "digest" not in shown
    wrong = fortwo(home, "keys", "create", "ci", "--scope", "write", "--concurrent", "0")
    assert wrong.returncode == 1
    assert "'write'" in wrong.stderr
    assert "concurrent = 0" in wrong.stderr
    assert fortwo(home, "keys", "revoke", "ci").returncode == 0
    again = fortwo(home, "keys", "revoke", "ci")
    assert again.returncode == 1
    assert "no key 'ci'" in again.stderr
