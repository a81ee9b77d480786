"""Which model a request names, and that a replica answers with what the head meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fortwo.errors import Conflict
from fortwo.scale.pins import Pin, requested_model


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/chat/completions", {"model": "42@3", "messages": []}, "42@3"),
        ("/v1/chat/completions", {"model": "42:latest"}, "42:latest"),  # only Ollama's clients add it
        ("/v1/embeddings", {"model": "ft:tiny:fortwo:a:12345678"}, "ft:tiny:fortwo:a:12345678"),
        ("/v1/completions", {"prompt": "a"}, None),
        ("/api/chat", {"model": "42:latest"}, "42"),
        ("/api/embed", {"model": "42"}, "42"),
        ("/completion", {"prompt": "a"}, "default"),
        ("/tokenize", {"content": "a", "model": None}, "default"),
        ("/tokenize", {"content": "a", "model": ""}, ""),
        ("/v1/chat/completions", {"model": 42}, None),
        ("/v1/chat/completions", {"model": ["a"]}, None),
        ("/completion", [], None),
        ("/completion", "a", None),
    ],
)
def test_the_model_of_a_request(path: str, body: Any, model: str | None) -> None:
    assert requested_model(path, b"", json.dumps(body).encode(), "default") == model


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "a"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_cannot_be_read_names_none(body: bytes) -> None:
    assert requested_model("/completion", b"", body, "default") is None


@pytest.mark.parametrize(
    ("query", "model"), [(b"", "default"), (b"model=42%403", "42@3"), (b"model=", ""), (b"a=b&model=x", "x")]
)
def test_the_model_in_a_query(query: bytes, model: str) -> None:
    assert requested_model("/props", query, b"", "default") == model


def test_another_digest_is_refused() -> None:
    pin = Pin("a", "a@3", "1" * 64)
    pin.check("1" * 64)
    with pytest.raises(Conflict) as refused:
        pin.check("2" * 64)
    assert "a@3" in refused.value.message
    assert "2" * 64 in refused.value.message
    assert "FORTWO_HOME" in str(refused.value.hint)
