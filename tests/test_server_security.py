"""Who may talk to the server, and that every failure has one shape."""

from __future__ import annotations

import logging
import re
import socket
import threading
from pathlib import Path

import httpx
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.errors import Conflict, InvalidRequest
from fortwo.server.security import SecurityMiddleware, is_loopback, needs_key
from fortwo.server.state import AppState
from fortwo.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_beyond_loopback_a_key_is_needed(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AppState(Settings(home=tmp_path, host=host))
    assert caught.value.param == "host"
    assert "FORTWO_API_KEY" in (caught.value.hint or "")
    assert needs_key(host, "secret", created=False)
    assert needs_key(host, None, created=True)


def test_on_loopback_a_key_is_needed_as_soon_as_there_is_one() -> None:
    assert not needs_key("127.0.0.1", None, created=False)
    assert needs_key("127.0.0.1", "secret", created=False)
    assert needs_key("127.0.0.1", None, created=True)


def test_an_empty_key_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        AppState(Settings(home=tmp_path, api_key=""))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "::1", "[::1]"])
def test_loopback_is_known_in_all_its_spellings(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.evil.com", "127.0.0.1.nip.io", "evil.com", "", "1", "::2"])
def test_what_only_looks_like_loopback_is_not(host: str) -> None:
    assert not is_loopback(host)


def test_with_a_key_everything_but_health_and_the_page_needs_it(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="s3cret")) as served:
        assert served.http.get("/healthz").json() == {"status": "ok"}
        for header in (None, "", "s3cret", "Bearer", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "Bearer ключ"):
            headers = {} if header is None else {"Authorization": header.encode()}
            for path in ("/v1/models", "/api/models", "/docs/", "/docs/nowhere", "/openapi", "/nowhere"):
                response = served.http.get(path, headers=headers)
                refused(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/docs", "/docs/files/swagger-ui.css", "/docs/files/swagger-ui-bundle.js", "/openapi.json"):
            assert served.http.get(path).status_code == 200
        for path in ("/docs/files/../../v1/models", "/docs/files/%2E%2E/%2E%2E/v1/models", "/docs/files//v1/models"):
            assert served.http.get(path).status_code in (401, 404)
        for header in ("Bearer s3cret", "bearer s3cret"):
            assert served.http.get("/v1/models", headers={"Authorization": header}).status_code == 200
        foreign = {"Authorization": "Bearer s3cret", "Host": "my.site", "Origin": "https://my.site"}
        assert served.http.get("/v1/models", headers=foreign).status_code == 200


def test_with_a_key_the_page_can_ask_for_it_and_send_it(tiny: Path, tmp_path: Path, served: Served) -> None:
    """As Swagger UI does: it reads where the key goes from the document, and sends it with each path that says so."""
    with serve(tiny_settings(tmp_path, tiny, api_key="s3cret")) as guarded:
        document = guarded.http.get("/openapi.json").json()
        ((name, scheme),) = document["components"]["securitySchemes"].items()
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                needed = operation.get("security")
                assert needed == (None if path in ("/health", "/healthz", "/readyz") else [{name: []}]), path
                if method == "get" and "{" not in path and not path.endswith("/events"):
                    sent = {"Authorization": "Bearer s3cret"} if needed else {}
                    assert guarded.http.get(path, headers=sent).status_code in (200, 400), path  # some need a query
    assert "securitySchemes" not in served.http.get("/openapi.json").json()["components"]


def test_a_key_may_have_any_letters(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="schlüssel")) as served:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert served.http.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.com"},
        {"Host": "evil.com:5001"},
        {"Host": ""},
        {"Host": "127.0.0.1@evil.com"},
        {"Origin": "https://evil.com"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://[bad"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1.evil.com"},
    ],
)
def test_another_sites_page_is_refused(served: Served, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/models"), ("POST", "/api/models/tiny/load"), ("GET", "/healthz")):
        refused(served.http.request(method, path, headers=headers), 403, "foreign_site")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:5001"},
        {"Host": "[::1]:5001"},
        {"Host": "localhost:5001", "Origin": "http://LOCALHOST:5001"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1:80"},
        {"Host": "localhost:5001", "Origin": "http://localhost:5001", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_pages_and_tools_of_this_machine_are_served(served: Served, headers: dict[str, str]) -> None:
    assert served.http.get("/api/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:5001", "Origin": "http://localhost:3000"},
        {"Host": "localhost:5001", "Origin": "http://127.0.0.1:5001"},
        {"Host": "localhost", "Origin": "http://localhost:5001"},
        {"Host": "localhost:5001", "Origin": "http://localhost"},
        {"Host": "localhost:5001", "Origin": "ftp://localhost:5001"},
    ],
)
def test_the_page_of_another_server_on_this_machine_is_refused(served: Served, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/api/models"), ("POST", "/api/models/tiny/unload")):
        refused(served.http.request(method, path, headers=headers), 403, "foreign_site")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_says_the_request_is_of_another_site_is_believed(served: Served, site: str) -> None:
    headers = {"Sec-Fetch-Site": site}
    refused(served.http.post("/api/models/tiny/unload", headers=headers), 403, "foreign_site")
    refused(served.http.delete("/api/adapters/none", headers=headers), 403, "foreign_site")
    assert served.http.get("/", headers=headers).status_code == 200  # a link to the page


def _raw(served: Served, request: bytes) -> bytes:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(request)
        answer = b""
        while piece := line.recv(1 << 16):
            answer += piece
    return answer


def test_http_1_0_without_a_host_is_answered(served: Served) -> None:
    assert b"200 OK" in _raw(served, b"GET /v1/models HTTP/1.0\r\n\r\n").splitlines()[0]
    assert b"foreign_site" in _raw(served, b"GET /v1/models HTTP/1.0\r\nHost:\r\n\r\n")
    assert b"foreign_site" in _raw(served, b"GET /v1/models HTTP/1.0\r\nOrigin: http://127.0.0.1\r\n\r\n")


def test_a_failure_of_the_guard_has_the_one_shape(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("host")

    monkeypatch.setattr(SecurityMiddleware, "_check_local", fail)
    refused(served.http.get("/v1/models"), 500, "internal_error")


def test_unknown_paths_and_methods_have_the_one_shape(served: Served) -> None:
    assert "/nowhere" in refused(served.http.get("/nowhere"), 404, "unknown_path")
    assert "/api/adapters/x/../y" in refused(served.http.get("/api/adapters/x%2F..%2Fy"), 404, "unknown_path")
    response = served.http.delete("/v1/models")
    assert "GET" in refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_the_unexpected_is_told_by_number_and_logged_in_full(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise RuntimeError("kaboom")

    monkeypatch.setattr(served.state.catalog, "entries", explode)
    with caplog.at_level(logging.ERROR):
        said = refused(served.http.get("/api/models"), 500, "internal_error")
    assert "kaboom" not in said
    record = next(record for record in caplog.records if record.name == "fortwo.server.errors")
    assert record.args is not None
    assert str(record.args[0]) in said
    assert "kaboom" in caplog.text


def test_what_the_server_understands_is_documented(served: Served) -> None:
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/api/training/start", "/healthz", "/v1/load_lora_adapter"} <= paths.keys()


def test_the_documentation_needs_no_internet(served: Served) -> None:
    page = served.http.get("/docs")
    assert "text/html" in page.headers["content-type"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    named = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page.text)
    assert [name.rpartition("/")[2] for name in named] == [
        "swagger-ui.css",
        "favicon.png",
        "swagger-ui-bundle.js",
        "openapi.json",
    ]
    types = [served.http.get(name).raise_for_status().headers["content-type"].split(";")[0] for name in named]
    assert types == ["text/css", "image/png", "text/javascript", "application/json"]
    assert "url(http" not in served.http.get(named[0]).text
    assert '"validatorUrl": null' in page.text
    refused(served.http.get("/docs/files/../../__init__.py"), 404, "unknown_path")
    refused(served.http.get("/docs/files/none.js"), 404, "unknown_path")
    refused(served.http.get("/redoc"), 404, "unknown_path")


def test_a_home_has_one_server(served: Served) -> None:
    with pytest.raises(Conflict) as caught:
        AppState(served.state.settings)
    assert str(served.state.settings.home) in caught.value.message


def test_a_reply_that_the_engines_end_cuts_off_says_so(tiny: Path, tmp_path: Path) -> None:
    ends: list[httpx.Response] = []
    with serve(tiny_settings(tmp_path, tiny)) as served:
        served.chat()
        thread = threading.Thread(target=lambda: ends.append(served.chat(max_tokens=900, ignore_eos=True)))
        thread.start()
        while not served.state.engine.count_requests("tiny"):
            pass
        served.state.engine.close()
        thread.join()
        refused(ends[0], 503, "unavailable")
        refused(served.chat(), 503, "unavailable")
