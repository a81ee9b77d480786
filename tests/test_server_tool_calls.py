"""Calls of tools over HTTP, by the official clients of OpenAI and Ollama, on bases with templates of several families
and on an adapter that was taught to call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import openai
import pytest
from serving import Served, chunks, refused, serve, tiny_settings
from tiny import VOCABULARY
from tool_bases import MARKERS, TEMPLATES, XML, save_tool_base

from fortwo.data.messages import DEPTH
from fortwo.hub.catalog import Catalog
from tests.test_server_client import connect

END = {"2": 100.0}  # the reply ends as soon as it may
QUESTION: Any = {"role": "user", "content": "Rain in Bonn?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Rome"]}, "celsius": {"type": "boolean"}},
    "required": ["city", "celsius"],
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, parameters: Any = None, **more: Any) -> Any:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, "description": "A function.", **given, **more}}


WEATHER, PING, TAUGHT = tool("weather", SCHEMA), tool("ping"), tool("weather", CITY)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
ADAPTERS = {"caller": "hermes", "tags": "qwen-coder"}
LESSON = [
    QUESTION,
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "21"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a base for each family, one without a form, and adapters that were taught to call: `caller` on the
    base of Hermes, `tags` on one that writes arguments one by one."""
    home = tmp_path_factory.mktemp("tools")
    paths = {name: save_tool_base(home / name, text) for name, text in {**TEMPLATES, "xml": XML}.items()}
    settings = tiny_settings(home, paths["hermes"])
    for name, path in paths.items():
        Catalog(settings.models_dir).add(name.replace(" ", "-"), path)
    as_ollama = ollama.Tool.model_validate(TAUGHT).model_dump(exclude_none=True)  # its client orders keys anew
    with serve(settings) as served:
        body = {
            "objective": "sft",
            "dataset": {"examples": [{"tools": [given], "messages": LESSON} for given in (TAUGHT, as_ollama)] * 2},
            "lora_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "training_config": {
                "max_steps": 200,
                "learning_rate": 0.003,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "validation_split": 0,
            },
        }
        for adapter, base in ADAPTERS.items():
            started = served.post("/api/training/start", body | {"adapter_name": adapter, "model": base})
            assert started.status_code == 202, started.text
            assert served.wait(started.json()["job_id"], seconds=300)["status"] == "succeeded"
        yield served


@pytest.fixture(scope="module")
def client(bases: Served) -> Iterator[openai.OpenAI]:
    with connect(bases) as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    asked = {"model": "hermes", "messages": [QUESTION], "temperature": 0, "max_tokens": 1500, "logit_bias": END}
    return client.chat.completions.create(**asked | more)  # type: ignore[call-overload]


def checked(choice: Any) -> list[Any]:
    """The calls of a choice that ended with them."""
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert all(call.id.startswith("call_") and call.type == "function" for call in choice.message.tool_calls)
    return list(choice.message.tool_calls)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_required_call_has_arguments_of_the_schema(client: openai.OpenAI, family: str) -> None:
    asked = {"model": family.replace(" ", "-"), "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = checked(ask(client, **asked, tools=[WEATHER, PING]).choices[0])
    given = json.loads(call.function.arguments)
    if call.function.name == "ping":
        assert given == {}
    else:
        assert given.keys() == {"city", "celsius"}
        assert given["city"] in ("Bonn", "Rome")
        assert isinstance(given["celsius"], bool)


@pytest.mark.parametrize("family", ["qwen-coder", "glm", "minimax", "control-tokens"])
@pytest.mark.parametrize("strict", [False, True])
def test_arguments_one_by_one_are_of_their_types(client: openai.OpenAI, family: str, strict: bool) -> None:
    point = {"type": "object", "properties": {"north": {"type": "boolean"}}, "required": ["north"]}
    closed = point | {"additionalProperties": False}
    schema: Any = {
        "type": "object",
        "properties": {
            "level": {"enum": ["low", "high"]},
            "count": {"enum": [1, 2.5, None]},
            "point": {"$ref": "#/$defs/point"},
            "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
            "either": {"anyOf": [{"const": "none"}, {"type": "boolean"}]},
        },
        "required": ["level", "count", "point", "flags", "either"],
        "additionalProperties": False,
        "$defs": {"point": closed},
    }
    function = tool("f", schema, strict=strict)
    for seed in (1, 2):
        asked: dict[str, Any] = {"model": family, "tools": [function], "temperature": 1, "seed": seed}
        choice = ask(client, **asked, tool_choice="required", parallel_tool_calls=False).choices[0]
        given = json.loads(checked(choice)[0].function.arguments)
        assert given.keys() == schema["properties"].keys()
        assert given["level"] in ("low", "high")
        assert given["count"] in (1, 2.5, None)
        assert [(key, type(value)) for key, value in given["point"].items()] == [("north", bool)]
        assert [type(flag) for flag in given["flags"]] in ([bool], [bool, bool])
        assert given["either"] in ("none", True, False)


@pytest.mark.parametrize(
    ("family", "pieces"), [("hermes", 6), ("llama", 6), ("deepseek", 6), ("qwen-coder", 4), ("control-tokens", 4)]
)
def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI, family: str, pieces: int) -> None:
    asked: dict[str, Any] = {
        "model": family,
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = ask(client, **asked).choices[0]
    deltas = [chunk.choices[0] for chunk in ask(client, **asked, stream=True)]
    called = [one.delta.tool_calls[0] for one in deltas if one.delta.tool_calls]
    assert [bool(call.id) for call in called] == [True] + [False] * (len(called) - 1)
    assert {call.index for call in called} == {0}
    assert (called[0].type, called[0].function.name, called[0].function.arguments) == ("function", "weather", "")
    assert all(call.function.name is None for call in called[1:])
    arguments = "".join(call.function.arguments for call in called)
    assert arguments == whole.message.tool_calls[0].function.arguments
    assert len(called) >= pieces  # the arguments come piece by piece, or one by one
    assert not any(one.delta.content for one in deltas)
    assert deltas[-1].finish_reason == "tool_calls"


def test_the_clients_own_helper_reads_a_stream_of_calls(client: openai.OpenAI) -> None:
    strict: Any = tool("weather", SCHEMA | {"additionalProperties": False}, strict=True)
    with client.chat.completions.stream(
        model="hermes",
        messages=[QUESTION],
        tools=[strict],
        tool_choice="required",
        logit_bias={"2": 100},
        max_tokens=400,
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, dict)


def test_the_choice_says_what_may_be_called(client: openai.OpenAI) -> None:
    tools = [WEATHER, PING]
    for name in ("weather", "ping"):
        named = {"type": "function", "function": {"name": name}}
        (call,) = checked(ask(client, tools=tools, tool_choice=named).choices[0])
        assert call.function.name == name
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
        (call,) = checked(ask(client, tools=tools, tool_choice=allowed).choices[0])
        assert call.function.name == name


def test_the_tools_of_a_choice_of_none_are_not_seen(client: openai.OpenAI) -> None:
    plain = ask(client, logit_bias={}, max_tokens=20)
    for base in ("hermes", "xml"):
        off = ask(client, model=base, logit_bias={}, max_tokens=20, tools=[WEATHER], tool_choice="none")
        assert off.usage.prompt_tokens == plain.usage.prompt_tokens
    assert ask(client, max_tokens=20, tools=[WEATHER]).usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.parametrize("family", ["hermes", "qwen-coder", "glm"])
def test_one_call_at_most_unless_they_may_be_parallel(client: openai.OpenAI, family: str) -> None:
    asked: dict[str, Any] = {"tools": [PING], "tool_choice": "required", "logit_bias": {"2": -100}, "max_tokens": 2000}
    asked["model"] = family
    many = ask(client, **asked).choices[0]
    assert many.finish_reason == "length"
    assert len(many.message.tool_calls) > 1
    assert len({call.id for call in many.message.tool_calls}) == len(many.message.tool_calls)
    assert len(checked(ask(client, **asked, parallel_tool_calls=False).choices[0])) == 1
    indices = {
        call.index for chunk in ask(client, **asked, stream=True) for call in chunk.choices[0].delta.tool_calls or []
    }
    assert indices == set(range(len(many.message.tool_calls)))


def test_a_control_token_begins_a_call(client: openai.OpenAI) -> None:
    begin = {str(len(VOCABULARY) + MARKERS.index("[TOOL_CALLS]")): 100.0}
    whole = ask(client, model="mistral", tools=[PING], logit_bias=begin, parallel_tool_calls=False).choices[0]
    assert checked(whole)[0].function.name == "ping"
    free = ask(client, model="mistral", tools=[PING], logit_bias={}, max_tokens=20).choices[0]
    assert free.message.tool_calls is None
    assert free.message.content


@pytest.mark.parametrize("family", ["hermes", "qwen-coder", "glm"])
def test_a_call_that_is_cut_off_says_so(client: openai.OpenAI, family: str) -> None:
    for tokens in (1, 12, 30, 45):
        choice = ask(client, model=family, tools=[WEATHER], tool_choice="required", max_tokens=tokens).choices[0]
        assert choice.finish_reason == "length"
        for call in choice.message.tool_calls or ():
            assert call.function.name == "weather"


def test_a_stop_within_a_call_ends_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "qwen-coder", "tools": [WEATHER], "tool_choice": "required"}
    within = ask(client, **asked, stop=["<parameter=celsius>"]).choices[0]
    assert within.finish_reason == "stop"
    assert within.message.tool_calls[0].function.arguments in ('{"city": "Bonn"', '{"city": "Rome"')
    after = ask(client, **asked, stop=["ction>\n</tool_call>"]).choices[0]
    assert json.loads(checked(after)[0].function.arguments).keys() == {"city", "celsius"}


@pytest.mark.parametrize("family", ["hermes", "qwen-coder"])
def test_choices_and_logprobs_of_calls(client: openai.OpenAI, family: str) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "logprobs": True, "n": 2, "seed": 1}
    asked["model"] = family
    whole = ask(client, **asked, temperature=1)
    assert [checked(choice)[0].function.name for choice in whole.choices] == ["weather"] * 2
    counts = [0, 0]
    for chunk in ask(client, **asked, temperature=1, stream=True):
        for choice in chunk.choices:
            counts[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert counts == [len(choice.logprobs.content) for choice in whole.choices]


@pytest.mark.parametrize("family", ["hermes", "glm"])
def test_a_reply_without_calls_follows_the_response_format(bases: Served, family: str) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    begin = {str(ord("{") - ord("!") + 3): 100.0}
    reply = bases.chat(model=family, tools=[PING], response_format=form, logit_bias=begin, max_tokens=1000).json()
    assert isinstance(json.loads(reply["choices"][0]["message"]["content"])["ok"], bool)
    called = bases.chat(
        model="llama", tools=[PING], response_format=form, tool_choice="required", max_tokens=1000, logit_bias=END
    )
    assert called.json()["choices"][0]["finish_reason"] == "tool_calls"


# ---------------------------------------------------------------- an adapter that was taught


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_two_turns_with_what_was_taught(client: openai.OpenAI, stream: bool, adapter: str) -> None:
    asked: dict[str, Any] = {"model": adapter, "tools": [TAUGHT], "logit_bias": {}}
    if stream:
        with client.chat.completions.stream(
            model=adapter, tools=[TAUGHT], messages=[QUESTION], temperature=0, max_tokens=1500
        ) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = ask(client, **asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})
    answer = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    for said in (choice.message, choice.message.model_dump()):
        second = ask(client, **asked, messages=[QUESTION, said, answer]).choices[0]
        assert (second.finish_reason, second.message.content, second.message.tool_calls) == ("stop", "No.", None)


def weather(city: str) -> str:
    """The weather.

    Args:
        city: A city.
    """
    return "21"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_client_calls_tools(bases: Served, stream: bool, adapter: str) -> None:
    with ollama.Client(bases.url) as client:
        options = {"temperature": 0, "num_predict": 400}
        asked: dict[str, Any] = {"model": adapter, "tools": [TAUGHT], "options": options}
        replies: Any = client.chat(messages=[QUESTION], stream=stream, **asked)
        parts = list(replies) if stream else [replies]
        assert "".join(part.message.content or "" for part in parts) == "I look."
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Bonn"})
        said = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
        answer = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
        second = client.chat(messages=[QUESTION, said, answer], **asked)
        assert (second.message.content, second.done_reason) == ("No.", "stop")
        assert client.chat(model=adapter, messages=[QUESTION], tools=[weather], options=options).done
        assert "tools" in (client.show(adapter).capabilities or [])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_calls_functions(client: openai.OpenAI, stream: bool, adapter: str) -> None:
    asked: dict[str, Any] = {"model": adapter, "tools": [{"type": "function", **TAUGHT["function"]}], "temperature": 0}
    if stream:
        events: list[Any] = list(client.responses.create(input=[QUESTION], stream=True, **asked))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        first = events[-1].response
        added = [event.item for event in events if event.type == "response.output_item.added"]
        assert [item.type for item in added] == ["message", "function_call"]
        assert [item.id for item in added] == [item.id for item in first.output]
        pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert {piece.output_index for piece in pieces} == {1}
        assert "".join(piece.delta for piece in pieces) == first.output[1].arguments
    else:
        first = client.responses.create(input=[QUESTION], **asked)
    message, call = first.output
    assert (first.status, message.content[0].text) == ("completed", "I look.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Bonn"})
    assert call.call_id.startswith("call_")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    second = client.responses.create(input=[QUESTION, *first.output, output], **asked)
    assert second.output_text == "No."
    chat = ask(client, model=adapter, tools=[TAUGHT], messages=LESSON[:3], logit_bias={})
    assert second.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens


def test_the_choice_of_a_response(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **WEATHER["function"]}, {"type": "function", **PING["function"]}]
    named: Any = {"type": "function", "name": "ping"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        asked: Any = {"tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 400}
        reply = client.responses.create(model="granite", input="hello", tools=tools, **asked)
        assert [(item.type, item.name) for item in reply.output if item.type == "function_call"] == [
            ("function_call", "ping")
        ]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "param", "named"),
    [
        ({"model": "xml", "tools": [PING]}, "tools", "JSON object"),
        ({"tools": [PING], "tool_choice": {"type": "function", "function": {"name": "pong"}}}, "tool_choice", "'pong'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [PING], "tool_choice": "always"}, "tool_choice", "'always'"),
        ({"tools": [PING], "tool_choice": {"type": "custom"}}, "tool_choice", "required"),
        ({"tools": [PING, PING]}, "tools[1].function.name", "'ping'"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "'custom'"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "'a b'"),
        ({"tools": [PING, tool("f", {"type": "string"})]}, "tools[1].function.parameters.type", "'string'"),
        (
            {"tools": [tool("f", {"properties": {"a": {"type": "objekt"}}})]},
            "tools[0].function.parameters",
            "objekt",
        ),
        (
            {"tools": [tool("f", {"properties": {"a": {"not": {}}}}, strict=True)]},
            "tools[0].function.parameters",
            "not",
        ),
        (
            {
                "model": "glm",
                "tools": [PING, tool("f", {"properties": {"a": {"type": "string", "pattern": "b"}}}, strict=True)],
            },
            "tools[1].function.parameters",
            "pattern of 'a'",
        ),
        (
            {"model": "glm", "tools": [tool("f", {"required": ["b"], "properties": {}})]},
            "tools[0].function.parameters",
            "'b'",
        ),
        ({"model": "glm", "tools": [tool("f", {"properties": {"a": 1}})]}, "tools[0].function.parameters", "of 'f'"),
        ({"model": "glm", "tools": [tool("f", {"required": "a"})]}, "tools[0].function.parameters", "required"),
        ({"tools": [PING], "ignore_eos": True}, "ignore_eos", "end"),
        ({"model": "llama", "tools": [PING], "response_format": {"type": "json_object"}}, "response_format", "tools"),
        (
            {"messages": [*LESSON[:2], {"role": "tool", "tool_call_id": "c2", "content": "3"}]},
            "messages[2].tool_call_id",
            "'c2'",
        ),
        (
            {
                "messages": [
                    QUESTION,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
            "not JSON",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(bases: Served, more: Any, param: str, named: str) -> None:
    response = bases.chat(**{"model": "hermes"} | more)
    assert response.status_code == 400, response.text
    said = refused(response, 400, response.json()["error"]["code"], param)
    assert named in said


def nested(depth: int) -> Any:
    return {"default": nested(depth - 1)} if depth > 1 else {}


def test_parameters_that_cannot_be_written_are_refused_by_name(bases: Served) -> None:
    def asked(parameters: Any) -> httpx.Response:
        body = {"model": "hermes", "messages": [QUESTION], "max_tokens": 2, "tools": [PING, tool("f", parameters)]}
        headers = {"Content-Type": "application/json"}
        return bases.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

    assert asked(nested(DEPTH - 2)).status_code == 200
    for parameters, named in (
        (nested(DEPTH - 1), "within each other"),
        (nested(400), "within each other"),
        ({"properties": {"a": {"enum": ["\ud800"]}}}, "surrogate"),
        ({"properties": {"\ud800": {"type": "string"}}}, "surrogate"),
    ):
        response = asked(parameters)
        assert response.status_code == 400, response.text
        said = refused(response, 400, response.json()["error"]["code"], "tools[1].function.parameters")
        assert named in said


def test_a_response_names_its_own_fields(bases: Served) -> None:
    def asked(*functions: Any) -> Any:
        tools = [{"type": "function", **function["function"]} for function in functions]
        return bases.post("/v1/responses", {"model": "hermes", "input": "hello", "tools": tools})

    for wrong, param in (
        (tool("a b"), "tools[0].name"),
        (tool("f", {"type": "string"}), "tools[0].parameters.type"),
        (tool("f", {"properties": {"a": {"not": {}}}}, strict=True), "tools[0].parameters"),
    ):
        assert param in refused(asked(wrong), 400, "invalid_request", param)
    refused(asked(PING, PING), 400, "invalid_request", "tools[1].name")


def test_all_findings_come_in_one_answer(bases: Served) -> None:
    tools = [tool("f", {"type": "string"}), tool("g", {"properties": {"a": {"type": "objekt"}}})]
    said = refused(bases.chat(model="hermes", tools=tools), 400, "invalid_request", "tools[0].function.parameters.type")
    assert "tools[1].function.parameters" in said


def test_a_schema_that_is_not_strict_is_followed_as_far_as_it_can_be(bases: Served) -> None:
    loose = tool("f", {"properties": {"a": {"type": "boolean", "not": {"const": 1}}}, "required": ["a"]})
    answer = bases.chat(model="hermes", tools=[loose], tool_choice="required", max_tokens=1000, logit_bias=END).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"])["a"], bool)


def test_an_error_in_a_stream_of_calls_comes_before_it(bases: Served) -> None:
    refused(bases.chat(model="xml", tools=[PING], stream=True), 400, "unsupported_parameter", "tools")
    assert chunks(bases.chat(model="hermes", tools=[PING], stream=True, max_tokens=4))[-1] == "[DONE]"
