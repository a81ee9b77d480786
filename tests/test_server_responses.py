"""OpenAI's responses in their plain text form, with the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from serving import Served, refused

from tests.test_server_client import connect


class Answer(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with connect(served) as client:
        yield client


def test_a_response_is_the_reply_of_chat(client: openai.OpenAI) -> None:
    whole = client.responses.create(
        model="tiny", input="hello", instructions="Be brief.", temperature=0, max_output_tokens=12, metadata={"a": "b"}
    )
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.metadata, whole.instructions) == ("incomplete", {"a": "b"}, "Be brief.")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")


def test_the_clients_own_helper_reads_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "max_output_tokens": 200}
    with client.responses.stream(**asked, text_format=Answer) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Answer)
    assert final.status == "completed"


def test_a_response_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hello", temperature=0, max_output_tokens=4)
    parts: Any = [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}]
    history = [*parts, {"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "again"}]
    second = client.responses.create(model="tiny", input=history, max_output_tokens=4)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_response_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    reply = client.responses.parse(model="tiny", input="hello", text_format=Answer, max_output_tokens=200)
    assert isinstance(reply.output_parsed, Answer)
    assert reply.status == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
    ],
)
def test_what_changes_a_response_is_refused_by_name(served: Served, change: dict[str, Any], param: str) -> None:
    refused(
        served.post("/v1/responses", {"model": "tiny", "input": "hi"} | change), 400, "unsupported_parameter", param
    )


def test_bad_responses_are_named(served: Served) -> None:
    for change, param in (({"input": []}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"), ({"n": 2}, "n")):
        error = served.post("/v1/responses", {"model": "tiny", "input": "hi"} | change).json()["error"]
        assert str(error["param"]).startswith(param), error
    refused(served.post("/v1/responses", {"model": "nobody", "input": "hi"}), 404, "not_found", "model")
