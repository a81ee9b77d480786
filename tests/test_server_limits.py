"""What the server refuses because it is too large, and that it answers others meanwhile."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.server import request_body

MIB = 1 << 20


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that takes bodies of up to 1 MiB."""
    with serve(tiny_settings(tmp_path_factory.mktemp("small"), tiny, max_body_mb=1)) as served:
        yield served


def _pieces(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * MIB


@pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "chunked"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/api/training/start", "/api/adapters/a/rollback", "/nowhere"]
)
def test_a_body_beyond_the_limit_is_refused(small: Served, path: str, chunked: bool) -> None:
    content: Any = _pieces(3) if chunked else b"x" * 3 * MIB
    response = small.http.post(path, content=content, headers={"Content-Type": "application/json"})
    if chunked and path in ("/api/adapters/a/rollback", "/nowhere"):
        refused(
            response,
            404,
            "not_found" if "rollback" in path else "unknown_path",
            None if path == "/nowhere" else "adapter_name",
        )
        return  # no route reads the body, so nothing counts it
    text = refused(response, 413, "body_too_large")
    assert "1 MiB" in text
    assert "FORTWO_MAX_BODY_MB" in text
    assert small.chat().status_code == 200


def test_a_chunked_body_below_the_limit_is_taken(small: Served) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    response = small.http.post(
        "/v1/chat/completions", content=iter([body[:9], body[9:]]), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(request_body, "PATIENCE_SECONDS", 0.2)
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while piece := line.recv(1 << 16):  # ends because the server closes the connection
            answer += piece
    assert b" 408 " in answer.splitlines()[0]
    assert b"body_timeout" in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a" * 4 * MIB}]}),
        ("/v1/completions", {"model": "tiny", "prompt": "a" * 4 * MIB}),
        ("/v1/completions", {"model": "tiny", "prompt": ["a", "a" * 4 * MIB]}),
        ("/v1/embeddings", {"model": "tiny", "input": ["a" * 4 * MIB]}),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    served: Served, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text was tokenised")

    assert served.chat().status_code == 200
    renderer = served.state.registry.load_base("tiny").renderer
    monkeypatch.setattr(renderer, "_encode", never)
    if "prompt" in body and isinstance(body["prompt"], list):
        param = "prompt[1]"
    else:
        param = next(name for name in ("messages", "prompt", "input") if name in body)
        monkeypatch.setattr(type(renderer), "encode_text", never)
    text = refused(served.post(path, body), 400, "context_length_exceeded", param)
    assert "characters" in text


def test_white_space_that_a_template_may_remove_is_not_counted(served: Served) -> None:
    text = "a" + " " * 200_000
    message = served.chat(messages=[{"role": "user", "content": text}]).json()["error"]["message"]
    assert "tokens" in message  # it was tokenised
    assert "characters" not in message


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny", "messages": [[]] * 2_000_000},
        {"model": "tiny", "messages": [{"role": "user", "content": [[]] * 2_000_000}]},
        {"model": "tiny", "messages": [{f"k{i}": 0 for i in range(400_000)}]},
        {"model": "tiny"} | {f"k{i}": 0 for i in range(400_000)},
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "logit_bias": {f"k{i}": 0 for i in range(400_000)},
        },
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "metadata": {f"k{i}": 0 for i in range(400_000)},
        },
    ],
    ids=["messages", "parts", "keys of a message", "keys", "biases", "metadata"],
)
def test_a_million_mistakes_cost_no_more_than_one(served: Served, body: dict[str, Any]) -> None:
    encoded = json.dumps(body, separators=(",", ":")).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = served.http.post("/v1/chat/completions", content=encoded, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text[:300]
    assert len(response.content) < 10_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 400, f"{grown} MiB more at the peak"  # the parsed JSON itself takes some of it


@pytest.mark.parametrize("where", [(), ("objective",), ("objective", "targets")])
def test_unknown_keys_of_a_training_request_are_not_all_reported(served: Served, where: tuple[str, ...]) -> None:
    bad: dict[str, Any] = {f"k{i}": 0 for i in range(20_000)}
    for name in reversed(where):
        bad = {name: bad}
    body = {"adapter_name": "n", "dataset": {"examples": [{"prompt": "a", "completion": "b"}]}} | bad
    text = refused(served.post("/api/training/plan", body), 400, "unknown_parameter", ".".join([*where, "k0"]))
    assert "k1 " not in text


def test_what_a_client_sent_is_not_repeated_in_full(served: Served) -> None:
    name = "x" * 100_000
    for response in (
        served.chat(model=name),
        served.chat(**{name: 1}),
        served.post("/api/training/plan", {"adapter_name": name, "dataset": {"examples": []}}),
    ):
        assert response.status_code in (400, 404)
        assert len(response.content) < 10_000


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"model": "ti', "character"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "digits"),
    ],
)
def test_what_is_not_json_is_said_with_a_remedy(served: Served, body: bytes, named: str) -> None:
    response = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert named in refused(response, 400, "invalid_json")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]
)
def test_a_body_of_another_type_is_refused(served: Served, kind: str | None) -> None:
    content = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}]}).encode()
    headers = {} if kind is None else {"Content-Type": kind}
    for path in ("/v1/chat/completions", "/api/models/tiny/unload"):
        response = served.http.post(path, content=content, headers=headers)
        assert "application/json" in refused(response, 415, "unsupported_media_type")


def test_json_of_another_name_is_taken(served: Served) -> None:
    content = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        sent = served.http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
        assert sent.status_code == 200, sent.text
