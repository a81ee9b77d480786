"""llama.cpp's API by plain HTTP: tokens, template, properties, adapters and completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, chunks, refused, serve, tiny_settings
from test_server_load import until
from test_server_native import publish
from tiny import TEMPLATE, VOCABULARY

HELLO = [VOCABULARY.index(token) for token in ("he", "l", "l", "o")]
GREEDY = {"temperature": 0, "n_predict": 12}


@pytest.fixture(scope="module")
def taught(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two versions of the adapter `taught`."""
    with serve(tiny_settings(tmp_path_factory.mktemp("llama_cpp"), tiny)) as served:
        publish(served, "taught", seed=1)
        publish(served, "taught", seed=2)
        yield served


def complete(served: Served, **more: Any) -> httpx.Response:
    return served.post("/completion", {"prompt": "hello", **more})


def openai_reply(served: Served, **more: Any) -> str:
    body = served.post("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 12, **more}).json()
    text: str = body["choices"][0]["text"]
    return text


def test_health_needs_no_key(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="secret")) as served:
        assert served.http.get("/health").json() == {"status": "ok"}
        assert served.http.get("/props").status_code == 401


def test_props_describe_the_default_model_and_any_other(taught: Served) -> None:
    body = taught.http.get("/props").json()
    assert body["chat_template"] == TEMPLATE
    assert body["default_generation_settings"]["n_ctx"] == 1024
    assert (body["bos_token"], body["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert taught.http.get("/props", params={"model": "taught@1"}).json()["model_alias"] == "taught@1"
    refused(taught.http.get("/props", params={"model": "nothing"}), 404, "not_found", "model")


def test_text_becomes_tokens_and_text_again(taught: Served) -> None:
    assert taught.post("/tokenize", {"content": "hello"}).json() == {"tokens": HELLO}
    for text in ("hello", "the <|im_start|> é", ""):
        tokens = taught.post("/tokenize", {"content": text}).json()["tokens"]
        assert taught.post("/detokenize", {"tokens": tokens}).json() == {"content": text}
    tokens = taught.post("/tokenize", {"content": "<|im_start|>", "model": "taught"}).json()["tokens"]
    assert tokens == [VOCABULARY.index("<|im_start|>")]
    pieces = taught.post("/tokenize", {"content": "heé", "with_pieces": True}).json()["tokens"]
    assert [one["piece"] for one in pieces] == ["he", [0xC3], [0xA9]]
    assert [one["id"] for one in pieces] == taught.post("/tokenize", {"content": "heé"}).json()["tokens"]


def test_who_waits_for_a_model_past_the_deadline_is_told(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, request_timeout=0.2)) as served:
        with served.state.registry._lock:  # as whoever loads holds it
            said = refused(served.post("/tokenize", {"content": "hello"}), 504, "deadline_exceeded")
        assert "0.2 seconds" in said
        assert served.state.admission.active == 0
        until(lambda: served.post("/tokenize", {"content": "hello"}).status_code == 200)
        assert not served.state.admission._requests


def test_wrong_tokens_and_texts_are_refused_by_name(taught: Served) -> None:
    refused(taught.post("/tokenize", {}), 400, "missing_parameter", "content")
    refused(
        taught.post("/tokenize", {"content": "a", "parse_special": False}),
        400,
        "unsupported_parameter",
        "parse_special",
    )
    assert "9999" in refused(taught.post("/detokenize", {"tokens": [9999]}), 400, "invalid_request", "tokens")
    refused(taught.post("/detokenize", {"tokens": [-1]}), 400, "invalid_request", "tokens[0]")


def test_a_template_is_applied_as_chat_applies_it(taught: Served) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = taught.post("/apply-template", {"messages": messages}).json()
    assert body == {"prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"}
    tokens = taught.post("/tokenize", {"content": body["prompt"]}).json()["tokens"]
    assert len(tokens) == taught.chat().json()["usage"]["prompt_tokens"]
    refused(taught.post("/apply-template", {"messages": []}), 400, "invalid_request", "messages")


def test_adapters_are_listed_and_chosen_by_each_request(taught: Served) -> None:
    assert taught.http.get("/lora-adapters").json() == [{"id": 0, "path": "taught@2", "scale": 1.0}]
    said = refused(taught.post("/lora-adapters", [{"id": 0, "scale": 0.5}]), 400, "unsupported_path", None)
    assert "model" in said
    refused(complete(taught, lora=[{"id": 0, "scale": 1.0}]), 400, "unsupported_parameter", "lora")


@pytest.mark.parametrize("model", ["tiny", "taught", "taught@1"])
def test_a_completion_is_that_of_openais_api(taught: Served, model: str) -> None:
    body = complete(taught, model=model, **GREEDY).json()
    assert body["content"] == openai_reply(taught, model=model, temperature=0)
    assert (body["stop"], body["model"], body["truncated"]) == (True, model, False)
    assert (body["tokens_predicted"], body["tokens_evaluated"]) == (12, 4)
    assert body["stop_type"] == "limit"
    *parts, last = chunks(complete(taught, model=model, stream=True, **GREEDY))
    assert "".join(part["content"] for part in parts) == body["content"]
    assert [part["stop"] for part in parts] == [False] * len(parts)
    assert {**last, "tokens_cached": 0} == {**body, "content": "", "tokens_cached": 0}
    assert complete(taught, model=model, **GREEDY | {"prompt": HELLO}).json()["content"] == body["content"]


def test_what_changes_nothing_is_accepted(taught: Served) -> None:
    more = {"cache_prompt": True, "id_slot": 0, "lora": [], "mirostat": 0, "n_probs": 0, "grammar": ""}
    more |= {"dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0, "repeat_last_n": 64, "min_keep": 0}
    assert complete(taught, **GREEDY, **more).json()["content"] == openai_reply(taught, temperature=0)


def test_options_and_defaults_are_llama_cpps(taught: Served) -> None:
    text = complete(taught, seed=3, n_predict=24).json()["content"]
    defaults = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": 3, "max_tokens": 24}
    assert text == openai_reply(taught, **defaults)
    text = complete(taught, seed=3, n_predict=24, repeat_penalty=1.9, stop=["he"]).json()["content"]
    assert text == openai_reply(taught, **defaults, repetition_penalty=1.9, stop=["he"])
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(complete(taught, n_predict=100, seed=1, json_schema=schema).json()["content"]) == {"a": 1}
    ended = complete(taught, prompt="he" * 900, seed=1, ignore_eos=True).json()
    assert ended["tokens_evaluated"] + ended["tokens_predicted"] == 1024


@pytest.mark.parametrize(
    ("name", "value"),
    [("grammar", "root ::= x"), ("mirostat", 1), ("n_probs", 3), ("samplers", ["top_k"]), ("dry_multiplier", 0.8)],
)
def test_what_would_change_a_completion_is_refused_by_name(taught: Served, name: str, value: Any) -> None:
    refused(complete(taught, **{name: value}), 400, "unsupported_parameter", name)


def test_numbers_out_of_range_are_refused_by_llama_cpps_names(taught: Served) -> None:
    refused(complete(taught, n_predict=0), 400, "invalid_request", "n_predict")
    refused(complete(taught, n_predict=5000), 400, "context_length_exceeded", "n_predict")
    refused(complete(taught, temperature=3), 400, "invalid_request", "temperature")
    refused(complete(taught, prompt=""), 400, "invalid_request", "prompt")
    refused(complete(taught, repeat_penalty=1.1, repeat_last_n=64), 400, "unsupported_parameter", "repeat_last_n")
