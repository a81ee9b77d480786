"""The official openai client against a running server: on a tiny model, and on the bundled real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from openai.types.completion_choice import Logprobs
from serving import Served, serve, tiny_settings

from tests.parts import packed_hidden

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
    assert usage is not None
    assert whole.usage is not None
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)  # the second may find a prefix cached
    assert counts == (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    assert reason == whole.choices[0].finish_reason == "length"


def test_a_reply_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=4)
    for echo in (first.choices[0].message, first.choices[0].message.model_dump()):
        messages = [*HELLO, echo, *HELLO]
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)  # type: ignore[arg-type]
        assert second.usage is not None
        assert first.usage is not None
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


EVERY: dict[str, Any] = {
    "n": 2,
    "seed": 5,
    "stop": ["###", "never"],
    "temperature": 0.8,
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"70": 1},
    "user": "me",
    "extra_body": {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True},
}


def test_chat_takes_every_parameter_at_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = EVERY | {"max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **asked)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * 12
    texts, told = ["", ""], 0
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **asked
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            told += len((choice.logprobs.content or []) if choice.logprobs else [])
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert told == 24
    assert usage == whole.usage
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_text_takes_every_parameter_at_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = EVERY | {"max_tokens": 12, "prompt": ["hello the", [70, 71, 72]]}
    whole = client.completions.create(model="tiny", logprobs=2, **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == len(choice.logprobs.text_offset or []) == 12
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs or [{}])
    echoed = client.completions.create(model="tiny", echo=True, **asked)
    begins = ["hello the"] * 2 + [echoed.choices[2].text[:3]] * 2
    assert [one.text for one in echoed.choices] == [
        begin + one.text for begin, one in zip(begins, whole.choices, strict=True)
    ]
    texts = [""] * 4
    stream = client.completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **asked)
    for chunk in stream:
        for piece in chunk.choices:
            texts[piece.index] += piece.text
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage


def test_echo_with_logprobs_is_the_plain_forward_over_the_prompt(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-evaluation-harness asks so. Whole, in parts, and after others left this prompt in the cache."""
    tokens = [5 * place % 260 for place in range(90)]
    decoder = served.state.registry.load_base("tiny").decoder
    with torch.no_grad():
        logprobs_TV = decoder.logits(packed_hidden(decoder, [tokens])[0]).log_softmax(-1)
    client.completions.create(model="tiny", prompt=tokens, max_tokens=4)

    def told() -> Logprobs:
        asked: dict[str, Any] = {"prompt": tokens, "echo": True, "max_tokens": 0, "logprobs": 3}
        (choice,) = client.completions.create(model="tiny", **asked).choices
        assert choice.logprobs is not None
        return choice.logprobs

    whole = told()
    monkeypatch.setattr("fortwo.engine.engine.PROMPT_TOKENS", 32)
    for one in (whole, told()):
        assert one.token_logprobs is not None
        assert one.top_logprobs is not None
        assert one.token_logprobs[0] is None
        expected = [float(logprobs_TV[place, token]) for place, token in enumerate(tokens[1:])]
        assert one.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        for top, logprobs_V in zip(one.top_logprobs[1:], logprobs_TV, strict=False):
            assert sorted(top.values())[-3:] == pytest.approx(sorted(logprobs_V.topk(3).values.tolist()), abs=1e-4)


class Answer(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


def test_a_reply_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="tiny", messages=HELLO, seed=1, response_format=Answer, max_tokens=200)
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_models(client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").owned_by == "fortwo"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, store=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "store")
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
