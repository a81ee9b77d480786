"""The chat API on a tiny model: replies, streams, and every bad request named."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from serving import Served, chunks, refused
from tiny import VOCABULARY

USER = {"role": "user", "content": "hello"}
CONTEXT = 1024
HALF = "half\ud800"


def test_a_reply_has_openais_shape_and_counts_its_tokens(served: Served) -> None:
    body = served.chat(temperature=0).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_greedy_and_seeded_replies_repeat_and_others_differ(served: Served) -> None:
    def say(**how: Any) -> str:
        return served.chat(max_tokens=24, **how).json()["choices"][0]["message"]["content"]

    assert say(temperature=0) == say(temperature=0) == say(temperature=0, seed=5)
    assert say(seed=1) == say(seed=1)
    assert say(seed=1) != say(seed=2)
    assert say(seed=1, top_k=1) == say(temperature=0)


def test_the_default_temperature_is_openais(served: Served) -> None:
    seeded = [served.chat(seed=3, max_tokens=24, **how).json()["choices"] for how in ({}, {"temperature": 1})]
    assert seeded[0] == seeded[1]


def test_without_max_tokens_a_reply_has_what_openai_users_expect(served: Served) -> None:
    short = served.chat(temperature=0, max_tokens=None).json()
    assert short["usage"]["completion_tokens"] <= 512
    long = served.chat(temperature=0, max_tokens=None, messages=[USER | {"content": "x" * 990}]).json()
    assert long["usage"]["total_tokens"] <= CONTEXT
    assert long["choices"][0]["finish_reason"] in ("length", "stop")


def test_content_may_be_parts_and_null_means_not_given(served: Served) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    plain, split = (
        served.chat(temperature=0, messages=[{"role": "user", "content": content}], stop=None, top_p=None, stream=None)
        for content in ("hello", parts)
    )
    assert plain.json()["choices"] == split.json()["choices"]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_ends_the_reply_and_is_not_said(served: Served, as_list: bool) -> None:
    whole = served.chat(temperature=0, max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = whole[10:12]
    body = served.chat(temperature=0, max_tokens=40, stop=[stop, "never said"] if as_list else stop).json()
    assert body["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_the_same_in_chunks(served: Served) -> None:
    whole = served.chat(temperature=0, max_tokens=24).json()
    response = served.chat(temperature=0, max_tokens=24, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in response.text
    *said, last, done = chunks(response)
    assert done == "[DONE]"
    assert said[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in said)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(said) > 2
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert {chunk["object"] for chunk in said} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*said, last]}) == 1


def test_a_stream_tells_usage_when_asked(served: Served) -> None:
    response = served.chat(temperature=0, stream=True, stream_options={"include_usage": True})
    *said, usage, done = chunks(response)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in said)


def test_n_replies_have_seeds_of_their_own_and_share_a_prompt(served: Served) -> None:
    body = served.chat(n=3, seed=7, max_tokens=24).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    alone = [served.chat(seed=7 + more, max_tokens=24).json() for more in range(3)]
    assert [choice["message"] for choice in body["choices"]] == [one["choices"][0]["message"] for one in alone]
    assert len({one["choices"][0]["message"]["content"] for one in alone}) == 3
    assert body["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)


def test_n_streams_come_in_one(served: Served) -> None:
    asked = {"n": 3, "seed": 7, "max_tokens": 24}
    whole = served.chat(**asked).json()["choices"]
    *said, done = chunks(served.chat(**asked, stream=True))
    assert done == "[DONE]"
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in said:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["message"]["content"] for choice in whole]
    assert reasons == [choice["finish_reason"] for choice in whole]


def test_penalties_and_bias_change_greedy_replies_as_they_say(served: Served) -> None:
    def tokens(**how: Any) -> list[str]:
        body = served.chat(temperature=0, max_tokens=30, logprobs=True, **how).json()
        return [one["token"] for one in body["choices"][0]["logprobs"]["content"]]

    plain = tokens()
    assert len(set(plain)) < 30, "it repeats itself"
    assert len(set(tokens(frequency_penalty=2, presence_penalty=2))) > len(set(plain))
    assert len(set(tokens(repetition_penalty=2))) > len(set(plain))
    assert set(tokens(logit_bias={"70": 100})) == {VOCABULARY[70]}
    said = next(token for token in plain if token in VOCABULARY)
    assert said not in tokens(logit_bias={str(VOCABULARY.index(said)): -100})


def test_logprobs_tell_every_token_of_the_reply_whole_and_streamed(served: Served) -> None:
    asked = {"temperature": 0, "max_tokens": 20, "logprobs": True, "top_logprobs": 3, "logit_bias": {"70": 4}}
    (choice,) = served.chat(**asked).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 20
    said = b"".join(bytes(one["bytes"]) for one in content)
    assert said.decode(errors="replace") == choice["message"]["content"]
    for one in content:
        assert len(one["top_logprobs"]) == 3
        values = [other["logprob"] for other in one["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert one["logprob"] <= values[0] < 0
    *chunked, _ = chunks(served.chat(**asked, stream=True))
    streamed = [told for chunk in chunked if (told := chunk["choices"][0]["logprobs"])]
    assert [one for told in streamed for one in told["content"]] == content
    assert served.chat(temperature=0).json()["choices"][0]["logprobs"] is None


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "size"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "named", "within"),
    [
        ({"$ref": "#"}, "followed", ""),
        ({"$ref": "#/x"}, "/x", ""),
        ({"const": HALF}, "half of a surrogate pair", ".const"),
        (nested(200), "recursion", ""),
    ],
)
def test_a_schema_that_cannot_be_followed_is_the_clients_mistake(
    served: Served, schema: dict[str, Any], named: str, within: str
) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "messages": [USER], "response_format": format}
    headers = {"Content-Type": "application/json"}
    response = served.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert named in refused(response, 400, "invalid_request", f"response_format.json_schema.schema{within}")


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_kept_to_by_a_model_that_knows_no_json(served: Served, seed: int) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    (choice,) = served.chat(response_format=format, seed=seed, max_tokens=400).json()["choices"]
    assert choice["finish_reason"] == "stop"
    said = json.loads(choice["message"]["content"])
    assert set(said) == {"city", "size"}
    assert said["city"] in ("Paris", "Rome")
    assert 0 <= said["size"] <= 99


def test_a_json_object_is_one_and_what_cuts_it_is_told(served: Served) -> None:
    asked = {"response_format": {"type": "json_object"}, "seed": 1, "logit_bias": {str(VOCABULARY.index("}")): 20}}
    (choice,) = served.chat(**asked, max_tokens=300).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"]), dict)
    (cut,) = served.chat(**asked, max_tokens=1).json()["choices"]
    assert (cut["finish_reason"], cut["message"]["content"][0]) == ("length", "{")


def test_ignore_eos_is_for_measuring(served: Served) -> None:
    end = {str(VOCABULARY.index("<|im_end|>")): 100}
    assert served.chat(logit_bias=end).json()["choices"][0]["finish_reason"] == "stop"
    body = served.chat(logit_bias=end, ignore_eos=True).json()
    assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("length", 8)


def test_marks_and_values_that_ask_for_nothing_are_accepted(served: Served) -> None:
    nothing = {
        "user": "me",
        "metadata": {"a": "b"},
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "service_tier": "auto",
    }
    echoed = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    response = served.chat(temperature=0, messages=[USER, echoed, USER], **nothing)
    assert response.status_code == 200, response.text


def test_defaults_spelled_out_and_unknown_nulls_are_accepted(served: Served) -> None:
    plain = served.chat(temperature=0).json()["choices"][0]["message"]["content"]
    spelled = {
        "mood": None,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "stop_token_ids": [],
        "chat_template_kwargs": {"enable_thinking": False},
        "stream_options": {"include_usage": False},
        "parallel_tool_calls": False,
        "verbosity": "medium",
        "request_id": "r1",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
    }
    response = served.chat(temperature=0, **spelled)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == plain
    refused(served.chat(length_penalty=2), 400, "unsupported_parameter", "length_penalty")
    refused(served.chat(skip_special_tokens=False), 400, "unsupported_parameter", "skip_special_tokens")


def test_developer_is_system_and_top_p_0_is_greedy(served: Served) -> None:
    def prompt(role: str, **more: Any) -> tuple[int, str]:
        body = served.chat(temperature=0, messages=[{"role": role, "content": "Be brief."}, USER], **more).json()
        return body["usage"]["prompt_tokens"], body["choices"][0]["message"]["content"]

    assert prompt("developer") == prompt("system")
    greedy = served.chat(temperature=0).json()["choices"][0]["message"]["content"]
    for _ in range(2):
        assert served.chat(temperature=1.3, seed=7, top_p=0).json()["choices"][0]["message"]["content"] == greedy


def test_all_findings_come_in_one_answer(served: Served) -> None:
    body = {"max_tokens": 0, "n": 0, "response_format": {"type": ""}, "mood": 1}
    said = refused(served.chat(**body), 400, "invalid_request", "n")
    assert all(name in said for name in ("n = 0", "max_tokens = 0", "response_format.type = ''", "mood"))


def test_a_key_that_a_body_has_twice_is_refused(served: Served) -> None:
    json_type = {"Content-Type": "application/json"}
    for path, text, param in (
        ("/v1/chat/completions", '{"model": "tiny", "max_tokens": 3, "max_tokens": 1}', "max_tokens"),
        ("/api/training/plan", '{"lora_config": {"r": 4, "r": 64}}', "lora_config.r"),
        ("/v1/load_lora_adapter", '{"lora_name": "a", "lora_name": "b"}', "lora_name"),
        ("/api/data/preview", '{"dataset": {"examples": [{"prompt": 1, "prompt": 2}]}}', "dataset.examples[0].prompt"),
    ):
        refused(served.http.post(path, content=text, headers=json_type), 400, "repeated_key", param)


def test_an_older_path_of_openai_is_told_what_answers_here(served: Served) -> None:
    said = refused(served.post("/v1/fine-tunes", {"model": "tiny"}), 404, "unknown_path")
    assert "/v1/fine_tuning/jobs" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("reasoning_effort", "high"),
        ("store", True),
        ("audio", {"voice": "x"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, name: str, value: Any) -> None:
    said = refused(served.chat(**{name: value}), 400, "unsupported_parameter", name)
    assert name in said
    assert "Leave it out" in said


@pytest.mark.parametrize(
    ("change", "code", "param", "named"),
    [
        ({"messages": []}, "invalid_request", "messages", "[]"),
        ({"messages": "hello"}, "invalid_request", "messages", "'hello'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_request", "messages[0].role", "'robot'"),
        ({"messages": [USER, {"role": "user"}]}, "missing_parameter", "messages[1].content", "Add"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_request", "messages[0].content", "5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "invalid_request",
            "messages[0].content",
            "'image_url'",
        ),
        (
            {"messages": [USER | {"tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
            "invalid_request",
            "messages[0].tool_calls",
            "'user'",
        ),
        ({"messages": [USER | {"content": "x" * CONTEXT}]}, "context_length_exceeded", "messages", str(CONTEXT)),
        ({"max_tokens": 0}, "invalid_request", "max_tokens", "0"),
        ({"max_tokens": -5}, "invalid_request", "max_tokens", "-5"),
        ({"max_tokens": 1.5}, "invalid_request", "max_tokens", "1.5"),
        ({"max_tokens": CONTEXT}, "context_length_exceeded", "max_tokens", "at most"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "invalid_request", "max_completion_tokens", "0"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "invalid_request", "max_tokens", "contradict"),
        ({"temperature": -0.1}, "invalid_request", "temperature", "-0.1"),
        ({"temperature": 2.1}, "invalid_request", "temperature", "2.1"),
        ({"temperature": "hot"}, "invalid_request", "temperature", "'hot'"),
        ({"top_p": -0.1}, "invalid_request", "top_p", "-0.1"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, USER]},
            "missing_parameter",
            "messages[1].tool_calls[0].function",
            "function",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "invalid_request",
            "messages[1].content",
            "the text is missing",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "21"}]},
            "invalid_request",
            "messages[1].role",
            "no message before it has tool_calls",
        ),
        ({"top_p": 1.1}, "invalid_request", "top_p", "1.1"),
        ({"top_k": -2}, "invalid_request", "top_k", "-2"),
        ({"min_p": 1.1}, "invalid_request", "min_p", "1.1"),
        ({"n": 0}, "invalid_request", "n", "0"),
        ({"n": 129}, "invalid_request", "n", "129"),
        ({"presence_penalty": 2.1}, "invalid_request", "presence_penalty", "2.1"),
        ({"frequency_penalty": -3}, "invalid_request", "frequency_penalty", "-3"),
        ({"repetition_penalty": 0}, "invalid_request", "repetition_penalty", "0"),
        ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias.5", "101"),
        ({"logit_bias": {"999999": 1}}, "invalid_request", "logit_bias", "999999"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs", "21"),
        ({"response_format": {"type": "yaml"}}, "invalid_request", "response_format.type", "'yaml'"),
        (
            {"response_format": {"type": "json_schema"}},
            "invalid_request",
            "response_format.json_schema",
            "no json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "invalid_request",
            "response_format.json_schema.name",
            "'a b'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
            "invalid_request",
            "response_format.json_schema.schema",
            "objekt",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "invalid_request",
            "response_format.json_schema.schema",
            "not",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "invalid_request", "ignore_eos", "JSON"),
        ({"seed": "x"}, "invalid_request", "seed", "'x'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_request", "stop", "4"),
        ({"stop": ""}, "invalid_request", "stop[0]", "''"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options", "stream"),
        ({"temprature": 1}, "unknown_parameter", "temprature", "spelling"),
        ({"model": 5}, "invalid_request", "model", "5"),
    ],
)
def test_bad_input_is_named_with_its_value(
    served: Served, change: dict[str, Any], code: str, param: str, named: str
) -> None:
    assert named in refused(served.chat(**change), 400, code, param)


@pytest.mark.parametrize("model", ["nobody", "../secret", "a/b", "tiny@1", "", "nobody@3"])
def test_an_unknown_model_is_named_with_what_there_is(served: Served, model: str) -> None:
    said = refused(served.chat(model=model), 404, "not_found", "model")
    assert repr(model) in said
    assert "tiny" in said


def test_the_body_must_be_json(served: Served) -> None:
    def post(content: bytes, kind: str = "application/json") -> httpx.Response:
        return served.http.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})

    assert "character" in refused(post(b'{"model": "tiny",'), 400, "invalid_json")
    refused(post(b"\xff\xfe"), 400, "invalid_json")
    assert "Content-Type: application/json" in refused(
        post(b'{"model": "tiny"}', "text/plain"), 415, "unsupported_media_type"
    )
    refused(post(b"[]"), 400, "invalid_request")
    refused(post(b""), 400, "invalid_request")
    refused(served.post("/v1/chat/completions", {"messages": [USER]}), 400, "missing_parameter", "model")


TRAINING = {"adapter_name": "half", "dataset": {"examples": [{"prompt": "a", "completion": "b"}]}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [USER], "stop": HALF}, "stop[0]"),
        ("/v1/chat/completions", {"messages": [USER], HALF: 1}, None),
        ("/api/training/plan", TRAINING | {"adapter_name": HALF}, "adapter_name"),
        ("/api/training/start", TRAINING | {"model": HALF}, "model"),
        ("/api/training/start", TRAINING | {"lora_config": {HALF: 1}}, "lora_config.half\\ud800"),
        ("/api/training/start", TRAINING | {"training_config": {HALF: 1}}, "training_config.half\\ud800"),
        ("/api/training/start", TRAINING | {"dataset": {HALF: []}}, "dataset.half\\ud800"),
        ("/api/training/start", TRAINING | {"dataset": {"path": HALF}}, "dataset.path"),
        (
            "/api/training/start",
            TRAINING | {"dataset": {"examples": [{"prompt": "a", HALF: "b"}]}},
            "dataset.examples[0]",
        ),
        ("/v1/load_lora_adapter", {"lora_name": HALF, "lora_path": "x"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "half", "lora_path": HALF}, "lora_path"),
        ("/v1/unload_lora_adapter", {"lora_name": HALF}, "lora_name"),
    ],
)
def test_half_a_surrogate_pair_is_named_wherever_it_stands(
    served: Served, path: str, body: dict[str, Any], param: str | None
) -> None:
    model = {"model": "tiny"} if path == "/v1/chat/completions" else {}
    sent = json.dumps(model | body).encode()  # JSON can escape what no text can hold
    response = served.http.post(path, content=sent, headers={"Content-Type": "application/json"})
    code = response.json()["error"]["code"]
    assert code in ("invalid_request", "invalid_dataset", "unknown_key")
    said = refused(response, 400, code, param)
    assert "half\\ud800" in said or "Unicode" in said


def test_the_models_are_listed(served: Served) -> None:
    body = served.http.get("/v1/models").json()
    assert body["object"] == "list"
    tiny = next(one for one in body["data"] if one["id"] == "tiny")
    assert tiny == {"id": "tiny", "object": "model", "created": 0, "owned_by": "fortwo", "root": "tiny", "parent": None}
    assert served.http.get("/v1/models/tiny").json() == tiny
    assert "'nobody'" in refused(served.http.get("/v1/models/nobody"), 404, "not_found", "model")


def test_many_chats_at_once_each_get_their_own_reply(served: Served) -> None:
    prompts = [f"question {n}" for n in range(12)]
    alone = {text: _say(served, text) for text in prompts}
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda text=text: together.setdefault(text, _say(served, text))) for text in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def _say(served: Served, text: str) -> str:
    body = served.chat(messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16).json()
    content: str = body["choices"][0]["message"]["content"]
    return content


def _requests(served: Served) -> int:
    return served.state.engine.count_requests("tiny")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_generation(
    served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.chat(temperature=0, max_tokens=900).json()["usage"]["completion_tokens"] == 900
    replies: list[Any] = []
    submit = served.state.engine.submit
    monkeypatch.setattr(served.state.engine, "submit", lambda *given: replies.append(submit(*given)) or replies[-1])
    asked = {"model": "tiny", "messages": [USER], "max_tokens": 900, "temperature": 0, "stream": stream}
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        _until(lambda: _requests(served) == 1)
    _until(lambda: _requests(served) == 0)
    assert replies[0].finish_reason == "cancelled"


def _until(happens: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {f"^a{n}b*$": {"type": "string"} for n in range(5000)}},
        {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": f"a{n}b*"} for n in range(5000)}},
        {"anyOf": [{"type": "string", "pattern": f"a{n}b*"} for n in range(5000)]},
    ],
    ids=["patternProperties", "properties", "anyOf"],
)
def test_a_schema_of_thousands_of_patterns_is_refused_at_once(served: Served, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = refused(served.chat(response_format=wanted), 400, "invalid_request", "response_format.json_schema.schema")
    assert "5000 patterns" in said


def test_a_schema_that_cannot_be_followed_to_its_end_is_the_clients_mistake(served: Served) -> None:
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = served.chat(response_format=wanted, max_tokens=20)
    if response.status_code != 200:
        said = refused(response, 400, "invalid_request", "response_format.json_schema.schema")
        assert "fewer properties" in said
