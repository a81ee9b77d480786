"""Ollama's API by its official client, and by plain HTTP: replies, streams, vectors, lists and every refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from serving import Served, serve, tiny_settings
from test_server_load import until
from test_server_native import publish
from tiny import TEMPLATE, save_directory

from fortwo.hub.catalog import Catalog
from fortwo.server import ollama as ollama_api
from fortwo.server import ollama_models
from fortwo.server.errors import PLAIN_PATHS

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with the bases `tiny` and `other`, and two versions of the adapter `taught` on `tiny`."""
    home = tmp_path_factory.mktemp("ollama")
    settings = tiny_settings(home, tiny)
    Catalog(settings.models_dir).add("other", save_directory(home / "other", "qwen2"))
    with serve(settings) as served:
        publish(served, "taught", seed=1)
        publish(served, "taught", seed=2)
        yield served


@pytest.fixture(scope="module")
def client(two: Served) -> Iterator[ollama.Client]:
    with ollama.Client(two.url) as client:
        yield client


def openai_reply(served: Served, model: str, **more: Any) -> str:
    asked = {"top_k": 40, "top_p": 0.9, "max_tokens": 12, "temperature": 0, **more}
    body = served.chat(model=model, **asked).json()
    content: str = body["choices"][0]["message"]["content"]
    return content


def refused(response: httpx.Response, status: int = 400) -> str:
    """Check Ollama's shape of errors."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert isinstance(body["error"], str)
    return body["error"]


def chat(served: Served, **more: Any) -> httpx.Response:
    return served.post("/api/chat", {"model": "tiny", "messages": HELLO, "stream": False, **more})


def generate(served: Served, **more: Any) -> httpx.Response:
    return served.post("/api/generate", {"model": "tiny", "prompt": "hello", "stream": False, **more})


@pytest.mark.parametrize("model", ["tiny", "other", "taught", "taught@1", "taught@2"])
def test_the_client_gets_what_openais_api_answers(two: Served, client: ollama.Client, model: str) -> None:
    for name in (model, f"{model}:latest"):
        reply = client.chat(name, HELLO, options=GREEDY)
        assert (reply.model, reply.message.role) == (name, "assistant")
        assert reply.message.content == openai_reply(two, model)
        assert reply.done
        assert reply.done_reason in ("stop", "length")
        assert client.generate(name, "hello", options=GREEDY).response == reply.message.content


def test_versions_of_an_adapter_and_its_base_answer_differently(client: ollama.Client) -> None:
    said = {client.chat(name, HELLO, options=GREEDY).message.content for name in ("tiny", "taught@1", "taught@2")}
    assert len(said) == 3


def test_a_stream_has_the_text_in_parts_and_counts_at_its_end(two: Served, client: ollama.Client) -> None:
    *parts, last = client.chat("taught", HELLO, options=GREEDY, stream=True)
    assert "".join(part.message.content or "" for part in parts) == openai_reply(two, "taught")
    assert len(parts) > 1
    assert not any(part.done for part in parts)
    assert last.done
    assert last.message.content == ""
    whole = client.chat("taught", HELLO, options=GREEDY)
    assert (last.done_reason, last.eval_count) == (whole.done_reason, whole.eval_count)
    assert last.prompt_eval_count == whole.prompt_eval_count
    usage = two.chat(model="taught", temperature=0, max_tokens=12).json()["usage"]
    assert last.prompt_eval_count == usage["prompt_tokens"]
    for end in (last, whole):
        assert end.total_duration
        assert end.prompt_eval_duration
        assert end.total_duration >= (end.load_duration or 0) + end.prompt_eval_duration + (end.eval_duration or 0)
    *pieces, done = client.generate("taught", "hello", options=GREEDY, stream=True)
    assert "".join(piece.response for piece in pieces) == whole.message.content
    assert done.done_reason == whole.done_reason


def test_a_stream_is_the_default_and_one_object_a_line(two: Served) -> None:
    response = two.post("/api/chat", {"model": "tiny", "messages": HELLO, "options": GREEDY})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[-1]["done"]
    assert {line["model"] for line in lines} == {"tiny"}


def test_two_models_answer_at_the_same_time(two: Served, client: ollama.Client) -> None:
    models = ["tiny", "other", "taught@1", "taught@2"] * 3
    with ThreadPoolExecutor(len(models)) as pool:
        said = list(pool.map(lambda name: client.chat(name, HELLO, options=GREEDY).message.content, models))
    assert said == [openai_reply(two, name) for name in models]


SAME = {
    "temperature": (1.5, "temperature"),
    "top_p": (0.5, "top_p"),
    "top_k": (2, "top_k"),
    "min_p": (0.3, "min_p"),
    "num_predict": (3, "max_tokens"),
    "repeat_penalty": (1.9, "repetition_penalty"),
    "presence_penalty": (2.0, "presence_penalty"),
    "frequency_penalty": (2.0, "frequency_penalty"),
}


@pytest.mark.parametrize("option", SAME)
def test_an_option_means_the_parameter_of_openais_api(two: Served, option: str) -> None:
    value, name = SAME[option]
    options = {"temperature": 1, "num_predict": 24, "seed": 4, option: value}
    text = chat(two, options=options).json()["message"]["content"]
    asked: dict[str, Any] = {"temperature": 1, "max_tokens": 24, "seed": 4, name: value}
    assert text == openai_reply(two, "tiny", **asked)
    assert text != openai_reply(two, "tiny", temperature=1, max_tokens=24, seed=4)


def test_a_stop_text_ends_the_reply_and_is_no_part_of_it(two: Served) -> None:
    text = chat(two, options=GREEDY).json()["message"]["content"]
    stop = next(one for one in text if one.isascii())
    body = chat(two, options=GREEDY | {"stop": ["never", stop]}).json()
    assert body["message"]["content"] == text.partition(stop)[0]
    assert body["done_reason"] == "stop"


def test_defaults_are_ollamas(two: Served) -> None:
    text = chat(two, options={"seed": 9, "num_predict": 24}).json()["message"]["content"]
    assert text == openai_reply(two, "tiny", temperature=0.8, seed=9, max_tokens=24)
    assert text != openai_reply(two, "tiny", temperature=0.8, seed=9, max_tokens=24, top_p=1, top_k=0)


def test_num_predict_below_zero_goes_to_the_end_of_the_context(two: Served) -> None:
    """Without it a reply has at most as many tokens as one of OpenAI's API. The array is longer than the context."""
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
    for num_predict in (-1, -2):
        body = generate(two, format=long, options={"num_predict": num_predict, "seed": 1}).json()
        assert body["done_reason"] == "length"
        assert body["prompt_eval_count"] + body["eval_count"] == 1024
    assert generate(two, format=long, options={"seed": 1}).json()["eval_count"] == 512


ACCEPTED = {
    "repeat_last_n": 64,
    "typical_p": 1.0,
    "tfs_z": 1,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "num_ctx": 4096,
    "num_gpu": 0,
    "num_thread": 8,
    "num_batch": 512,
    "num_keep": 4,
    "use_mmap": True,
}


def test_what_changes_nothing_is_accepted(two: Served) -> None:
    more = {"options": GREEDY | ACCEPTED, "keep_alive": "5m", "format": "", "think": False, "tools": []}
    expected = openai_reply(two, "tiny")
    assert chat(two, **more).json()["message"]["content"] == expected
    for keep_alive in (-1, 0, 1.5, "24h"):
        assert chat(two, options=GREEDY, keep_alive=keep_alive).json()["message"]["content"] == expected
    generated = generate(two, options=GREEDY | ACCEPTED, system="", template="", context=[], images=[], suffix="")
    assert generated.json()["response"] == expected


def test_repeat_last_n_of_zero_turns_penalties_off(two: Served) -> None:
    options = GREEDY | {"repeat_penalty": 1.9, "repeat_last_n": 0}
    assert chat(two, options=options).json()["message"]["content"] == openai_reply(two, "tiny")
    assert "repeat_last_n" in refused(chat(two, options=options | {"repeat_last_n": 64}))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"options": {"temperature": 3, "top_p": 2}}, ["options.temperature = 3", "options.top_p = 2"]),
        ({"options": {"mirostat": 2}}, ["options.mirostat = 2", "not supported"]),
        ({"options": {"num_predict": 0}}, ["options.num_predict = 0"]),
        ({"options": {"num_predict": 5000}}, ["options.num_predict = 5000", "messages"]),
        ({"options": {"num_ctx": 3}}, ["options.num_ctx = 3"]),
        ({"options": {"colour": 1}}, ["options.colour"]),
        ({"format": "yaml"}, ["format = 'yaml'", "JSON Schema"]),
        ({"format": {"type": "nothing"}}, ["schema"]),
        ({"think": True}, ["think"]),
        ({"tools": [{"type": "function"}]}, ["tools[0].function is missing"]),
        ({"top_logprobs": 2}, ["logprobs"]),
        ({"messages": [{"role": "user", "content": "see", "images": ["aGVsbG8="]}]}, ["messages[0].images"]),
        ({"messages": [{"role": "tool", "content": "3"}]}, ["messages[0].role", "tool_calls"]),
        ({"messages": [{"role": "user"}]}, ["messages[0].content"]),
        ({"messages": [{"role": "user", "content": "he" * 2000}]}, ["messages takes"]),
        ({"raw": True}, ["raw"]),
        ({"messages": [], "keep_alive": 0}, ["keep_alive", "/unload"]),
    ],
)
def test_a_chat_that_cannot_be_honoured_is_refused_by_name(two: Served, more: Any, names: list[str]) -> None:
    for stream in (True, False):
        said = refused(chat(two, **more, stream=stream))
        assert all(name in said for name in names), said


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"images": ["aGVsbG8="]}, "images"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1, 2]}, "context"),
        ({"suffix": "end"}, "suffix"),
        ({"raw": True, "system": "Be brief."}, "system"),
        ({"prompt": "he" * 2000}, "prompt takes"),
        ({"prompt": "he" * 2000, "raw": True}, "prompt takes"),
    ],
)
def test_a_generation_that_cannot_be_honoured_is_refused_by_name(two: Served, more: Any, name: str) -> None:
    assert name in refused(generate(two, **more))


def test_json_and_a_schema_are_followed(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    closed = schema | {"additionalProperties": False}
    told = client.chat("tiny", HELLO, format=closed, options={"num_predict": 200, "seed": 1}).message.content
    assert json.loads(told or "") in ({"a": "x"}, {"a": "y"})
    told = client.generate("taught", "hello", format=closed, options={"num_predict": 200, "seed": 1}).response
    assert json.loads(told) in ({"a": "x"}, {"a": "y"})
    told = client.generate("tiny", "hello", format="json", options={"num_predict": 40, "seed": 1}).response
    assert told.lstrip().startswith("{")


def test_generate_puts_the_system_message_first_and_raw_uses_no_template(two: Served) -> None:
    messages = [{"role": "system", "content": "the"}, *HELLO]
    body = generate(two, system="the", options=GREEDY).json()
    assert body["response"] == chat(two, messages=messages, options=GREEDY).json()["message"]["content"]
    raw = generate(two, raw=True, options=GREEDY).json()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0}
    completed = two.post("/v1/completions", asked).json()
    assert raw["response"] == completed["choices"][0]["text"]
    assert raw["prompt_eval_count"] == completed["usage"]["prompt_tokens"]


def test_logprobs_are_those_of_openais_api(two: Served) -> None:
    entries = chat(two, options=GREEDY, logprobs=True, top_logprobs=2).json()["logprobs"]
    expected = two.chat(temperature=0, max_tokens=12, logprobs=True, top_logprobs=2).json()
    assert [one["token"] for one in entries] == [one["token"] for one in expected["choices"][0]["logprobs"]["content"]]
    assert all(len(one["top_logprobs"]) == 2 for one in entries)
    response = chat(two, options=GREEDY, logprobs=True, stream=True)
    streamed = [json.loads(line).get("logprobs", []) for line in response.text.splitlines()]
    assert [one["token"] for part in streamed for one in part] == [one["token"] for one in entries]
    assert generate(two, options=GREEDY, logprobs=True, raw=True).json()["logprobs"]


def test_without_a_prompt_the_model_is_loaded(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served, ollama.Client(served.url) as client:
        assert client.ps().models == []
        assert generate(served, prompt="").json()["done_reason"] == "load"
        assert [one.model for one in client.ps().models] == ["tiny:latest"]
        assert served.state.admission.active == 0
        assert chat(served, messages=[]).json()["done_reason"] == "load"
        assert served.state.admission.active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_past_its_deadline_ends_with_the_reason(tiny: Path, tmp_path: Path, stream: bool) -> None:
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
    with serve(tiny_settings(tmp_path, tiny, request_timeout=0.3)) as served:
        served.state.registry.load_base("tiny")
        response = chat(served, stream=stream, format=long, options={"num_predict": -1})
        last = json.loads(response.text.splitlines()[-1])
        assert set(last) == {"error"}
        assert "0.3 seconds" in last["error"]
        assert "FORTWO_REQUEST_TIMEOUT" in last["error"]
        if not stream:
            assert response.status_code == 504
        until(lambda: served.state.engine.count_requests("tiny") == served.state.admission.active == 0)


def test_vectors_are_those_of_openais_api(two: Served, client: ollama.Client) -> None:
    def expected(model: str, text: str) -> list[float]:
        body = two.post("/v1/embeddings", {"model": model, "input": text}).json()
        vector: list[float] = body["data"][0]["embedding"]
        return vector

    for model in ("tiny", "taught@1"):
        reply = client.embed(f"{model}:latest", ["hello", "the"])
        assert reply.prompt_eval_count == 6
        for vector, text in zip(reply.embeddings, ("hello", "the"), strict=True):
            assert list(vector) == pytest.approx(expected(model, text), abs=1e-6)
        assert list(client.embed(model, "hello").embeddings[0]) == pytest.approx(reply.embeddings[0], abs=1e-6)
    assert client.embeddings("tiny", "hello").embedding == pytest.approx(expected("tiny", "hello"), abs=1e-6)
    assert "dimensions" in refused(two.post("/api/embed", {"model": "tiny", "input": "a", "dimensions": 4}))
    assert "input" in refused(two.post("/api/embed", {"model": "tiny", "input": []}))


def test_lists_name_what_chat_takes(two: Served, client: ollama.Client) -> None:
    listed = {one.model: one for one in client.list().models}
    assert {"tiny:latest", "taught:latest", "taught@1:latest", "taught@2:latest"} <= set(listed)
    for name in listed:
        if name:
            assert client.chat(name, HELLO, options=GREEDY).done
    assert "other:latest" in {one.model for one in client.list().models}
    base, adapter = listed["tiny:latest"], listed["taught@1:latest"]
    assert base.details
    assert base.details.family == "llama"
    assert adapter.details
    assert adapter.details.parent_model == "tiny"
    assert adapter.digest == two.http.get("/api/adapters/taught@1").json()["versions"][0]["digest"]
    assert adapter.size
    assert adapter.modified_at
    assert listed["taught:latest"].digest == listed["taught@2:latest"].digest
    loaded = {one.model: one for one in client.ps().models}
    assert {"tiny:latest", "taught@1:latest"} <= set(loaded)
    assert loaded["tiny:latest"].context_length == 1024


def test_adapters_whose_base_was_removed_are_listed(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    with serve(settings) as served, ollama.Client(served.url) as client:
        publish(served, "orphan")
        publish(served, "orphan", base_model="gone", base_digest="0" * 64)
        assert "orphan@2:latest" in {one.model for one in client.list().models}
        shown = client.show("orphan@2")
        assert shown.details
        assert shown.details.parent_model == "gone"
        assert "orphan@2:latest" not in {one.model for one in client.ps().models}


def test_show_describes_a_base_and_an_adapter(two: Served, client: ollama.Client) -> None:
    shown = client.show("tiny:latest")
    assert shown.template == TEMPLATE
    assert shown.capabilities == ["completion", "embedding"]
    assert shown.modelinfo
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.block_count"] == 2
    adapter = client.show("taught@1")
    assert adapter.details
    assert adapter.details.parent_model == "tiny"
    assert adapter.modelfile == "FROM tiny\nADAPTER taught@1\n"
    assert two.post("/api/show", {"name": "tiny"}).json()["template"] == TEMPLATE
    assert "model is missing" in refused(two.post("/api/show", {}))


def test_a_name_that_nothing_has_is_not_found(two: Served, client: ollama.Client) -> None:
    for name in ("nothing", "nothing:latest", "tiny:8b", "taught@9"):
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(name, HELLO)
        assert caught.value.status_code == 404
        assert "tiny" in caught.value.error or "taught" in caught.value.error
        with pytest.raises(ollama.ResponseError) as caught:
            client.show(name)
        assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        ("pull", "/api/models/{id}/load"),
        ("push", "fortwo adapters export"),
        ("create", "/api/training/start"),
        ("copy", "/tags/"),
        ("delete", "/api/adapters/{name}"),
    ],
)
def test_what_changes_models_names_fortwos_own_call(two: Served, call: str, instead: str) -> None:
    method = "DELETE" if call == "delete" else "POST"
    assert instead in refused(two.http.request(method, f"/api/{call}", json={"model": "tiny"}))


def test_errors_of_every_kind_have_ollamas_shape_on_these_paths_only(tiny: Path, tmp_path: Path, two: Served) -> None:
    routes = (*ollama_api.router.routes, *ollama_models.router.routes)
    assert {route.path for route in routes} == PLAIN_PATHS  # type: ignore[attr-defined]
    refused(two.http.post("/api/chat", content=b"{", headers={"Content-Type": "application/json"}))
    large = b" " * (two.state.settings.max_body_mb << 20) + b"{}"
    refused(two.http.post("/api/chat", content=large, headers={"Content-Type": "application/json"}), 413)
    refused(two.http.put("/api/chat"), 405)
    refused(two.http.get("/api/tags", headers={"Host": "example.org"}), 403)
    assert isinstance(two.http.get("/api/nothing").json()["error"], dict)
    assert isinstance(two.chat(model="nothing").json()["error"], dict)
    with serve(tiny_settings(tmp_path, tiny, api_key="secret")) as served:
        refused(served.http.get("/api/tags"), 401)
        with ollama.Client(served.url, headers={"Authorization": "Bearer secret"}) as client:
            assert client.list().models


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_the_content_type_is_not_asked_for_but_the_origin_is(two: Served, kind: str | None) -> None:
    """LiteLLM and curl name no type or another one. Such a request of another site's page is refused by its Origin."""
    headers = {} if kind is None else {"Content-Type": kind}
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": False, "options": GREEDY}).encode()
    response = two.http.post("/api/chat", content=body, headers=headers)
    assert response.json()["message"]["content"] == openai_reply(two, "tiny")
    refused(two.http.post("/api/chat", content=body, headers=headers | {"Origin": "https://example.org"}), 403)
    assert two.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 415


def test_clients_find_the_server_and_its_version(two: Served) -> None:
    assert two.http.head("/").status_code == 200
    assert two.http.get("/api/version").json() == {"version": ollama_models.API_VERSION}
