"""The official openai client against a running server: on a tiny model, and on the bundled real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from serving import Served, serve, tiny_settings

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
REAL = "smollm2-135m-instruct"


def connect(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with connect(served) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=20)
    text, usage, reason = "", None, None
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0,
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason
    assert text == whole.choices[0].message.content
    assert usage == whole.usage
    assert reason == whole.choices[0].finish_reason == "length"


def test_a_reply_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=4)
    for echo in (first.choices[0].message, first.choices[0].message.model_dump()):
        messages = [*HELLO, echo, *HELLO]
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)  # type: ignore[arg-type]
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_models(client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").owned_by == "fortwo"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, n=2)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=HELLO)


def test_a_wrong_key_is_an_authentication_error(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="right")) as served:
        with connect(served, "right") as client:
            assert "tiny" in [model.id for model in client.models.list()]
        with connect(served, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.real
def test_the_real_model_answers_and_stops_by_itself(live: Served) -> None:
    with connect(live) as client:
        whole = client.chat.completions.create(model=REAL, messages=FRANCE, temperature=0)
        assert "Paris" in (whole.choices[0].message.content or "")
        assert whole.choices[0].finish_reason == "stop"
        streamed = client.chat.completions.create(model=REAL, messages=FRANCE, temperature=0, stream=True)
        pieces = [choice.delta.content or "" for chunk in streamed for choice in chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        cut = client.chat.completions.create(model=REAL, messages=FRANCE, temperature=0, stop="Paris")
        assert "Paris" not in (cut.choices[0].message.content or "")


@pytest.mark.real
def test_the_real_model_remembers_the_conversation(live: Served) -> None:
    messages: list[ChatCompletionMessageParam] = [
        *FRANCE,
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Germany?"},
    ]
    with connect(live) as client:
        reply = client.chat.completions.create(model=REAL, messages=messages, temperature=0, max_tokens=24)
        assert "Berlin" in (reply.choices[0].message.content or "")
