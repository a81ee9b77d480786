"""Text completions on a tiny model: prompts in all their forms, echo, offsets, and every bad request named."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serving import Served, chunks, refused
from tiny import VOCABULARY

from fortwo.prompts import Logprob
from fortwo.server.openai.logprobs import TextLogprobs

CONTEXT = 1024


def complete(served: Served, prompt: Any = "hello", **more: Any) -> httpx.Response:
    return served.post("/v1/completions", {"model": "tiny", "prompt": prompt, "temperature": 0, **more})


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_a_completion_has_openais_shape_and_defaults(served: Served) -> None:
    body = complete(served, ignore_eos=True).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert body["usage"]["prompt_tokens"] == 4  # h e l l o, with "he" as one
    assert body["usage"]["completion_tokens"] == 16


def test_a_prompt_may_be_text_or_tokens_one_or_several(served: Served) -> None:
    tokens = [VOCABULARY.index(letter) for letter in ("he", "l", "l", "o")]
    (hello,), (other,) = texts(complete(served)), texts(complete(served, "the"))
    assert texts(complete(served, tokens)) == [hello]
    assert texts(complete(served, ["hello", "the"])) == [hello, other]
    assert texts(complete(served, [tokens, tokens])) == [hello, hello]
    assert complete(served, ["hello", "the"], n=2).json()["usage"]["prompt_tokens"] == 4 + 2


def test_no_template_is_added_and_one_that_is_written_out_works(served: Served) -> None:
    written = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    (text,) = texts(complete(served, written, max_tokens=8))
    assert text == served.chat(temperature=0).json()["choices"][0]["message"]["content"]
    assert texts(complete(served, max_tokens=8)) != [text]


def test_several_prompts_with_several_replies_come_in_order(served: Served) -> None:
    body = complete(served, ["hello", "the"], n=2, seed=3, temperature=1, max_tokens=8).json()
    alone = [
        texts(complete(served, prompt, seed=seed, temperature=1, max_tokens=8))[0]
        for prompt in ("hello", "the")
        for seed in (3, 4)
    ]
    assert [choice["text"] for choice in body["choices"]] == alone
    assert len(set(alone)) == 4


def test_a_stream_says_the_same(served: Served) -> None:
    asked = {"prompt": ["hello", "the"], "echo": True, "ignore_eos": True}
    *said, usage, done = chunks(complete(served, **asked, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    parts, reasons = ["", ""], [None, None]
    for chunk in said:
        (choice,) = chunk["choices"]
        parts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    whole = complete(served, **asked).json()
    assert parts == [choice["text"] for choice in whole["choices"]]
    assert parts[0].startswith("hello")
    assert parts[1].startswith("the")
    assert reasons == ["length", "length"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_logprobs_say_where_each_token_begins(served: Served) -> None:
    (choice,) = complete(served, logprobs=2, logit_bias={"70": 5}, max_tokens=12).json()["choices"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == 12
    for token, value, top, offset in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], told["text_offset"], strict=True
    ):
        assert top[token] == value
        assert 2 <= len(top) <= 3
        assert token.startswith("\\x") or choice["text"][offset:].startswith(token)
    streamed = [
        chunk["choices"][0]["logprobs"]
        for chunk in chunks(complete(served, logprobs=2, logit_bias={"70": 5}, max_tokens=12, stream=True))[:-1]
    ]
    for name, values in told.items():
        assert [value for one in streamed for value in one[name]] == values
    only = complete(served, logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert [len(top) for top in only["top_logprobs"]] == [1, 1]


def test_echoed_logprobs_begin_with_the_prompts_own(served: Served) -> None:
    asked: dict[str, Any] = {"prompt": ["hello thé 🙂", "t"], "echo": True, "logprobs": 2, "ignore_eos": True}
    asked |= {"logit_bias": {"70": 5}, "max_tokens": 9}
    body = complete(served, **asked).json()
    plain = complete(served, **asked | {"echo": False}).json()
    streamed: list[dict[str, list[Any]]] = [{}, {}]
    for chunk in chunks(complete(served, **asked, stream=True))[:-1]:
        (piece,) = chunk["choices"]
        for name, values in piece["logprobs"].items():
            streamed[piece["index"]].setdefault(name, []).extend(values)
    for choice, alone, prompt, parts in zip(body["choices"], plain["choices"], asked["prompt"], streamed, strict=True):
        told = choice["logprobs"]
        assert choice["text"] == prompt + alone["text"]
        assert told == parts
        assert (told["token_logprobs"][0], told["top_logprobs"][0], told["text_offset"][0]) == (None, None, 0)
        count = len(told["tokens"]) - 9
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert told[name][count:] == alone["logprobs"][name]
        assert [offset - len(prompt) for offset in told["text_offset"][count:]] == alone["logprobs"]["text_offset"]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert token.startswith("\\x") or choice["text"][offset:].startswith(token)
    assert body["usage"] == plain["usage"] | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_offsets_are_of_what_the_text_shows() -> None:
    """Not of the BOS that the tokenizer adds, nor of SentencePiece's space at the beginning."""
    spelt = [b"<s>", b" hi", b"!", b"\xc3", b"\xa9", b"."]
    told = TextLogprobs(spelt.__getitem__, "hi!", [0, 1, 2])
    offsets = [told.push([Logprob(token, -1.0)])["text_offset"] for token in range(6)]
    assert offsets == [[0], [0], [2], [3], [3], [4]]


def test_without_a_reply_the_echo_is_the_prompt(served: Served) -> None:
    written = "<|im_start|>user\nhello"
    body = complete(served, written, echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], body["usage"]["completion_tokens"]) == (written, "length", 0)
    assert choice["logprobs"]["tokens"][:2] == ["<|im_start|>", "u"]
    assert choice["logprobs"]["text_offset"][:2] == [0, 12]
    tokens = [VOCABULARY.index(token) for token in ("<|im_start|>", "he", "l")]
    assert texts(complete(served, tokens, echo=True, max_tokens=0, n=2)) == ["<|im_start|>hel"] * 2
    longest = ["x" * CONTEXT, "x" * (CONTEXT - 1)]
    assert texts(complete(served, longest, echo=True, max_tokens=0)) == longest
    *said, done = chunks(complete(served, written, echo=True, max_tokens=0, stream=True))
    assert ("".join(chunk["choices"][0]["text"] for chunk in said), done) == (written, "[DONE]")


def test_stop_and_schema_work_here_too(served: Served) -> None:
    (whole,) = texts(complete(served, max_tokens=40))
    (cut,) = texts(complete(served, max_tokens=40, stop=whole[10:12]))
    assert cut == whole[: whole.index(whole[10:12])]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    assert texts(complete(served, response_format=schema))[0] in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("change", "code", "param", "named"),
    [
        ({"prompt": ""}, "invalid_request", "prompt", "empty"),
        ({"prompt": []}, "invalid_request", "prompt", "empty"),
        ({"prompt": ["hello", ""]}, "invalid_request", "prompt", "empty"),
        ({"prompt": [[]]}, "invalid_request", "prompt", "empty"),
        ({"prompt": None}, "invalid_request", "prompt", "None"),
        ({"prompt": [999999]}, "invalid_request", "prompt", "999999"),
        ({"prompt": [-1]}, "invalid_request", "prompt", "-1"),
        ({"prompt": "x" * CONTEXT}, "context_length_exceeded", "prompt", str(CONTEXT)),
        ({"prompt": ["a", "x" * CONTEXT]}, "context_length_exceeded", "prompt[1]", str(CONTEXT)),
        ({"max_tokens": 0}, "invalid_request", "max_tokens", "set echo to true"),
        ({"max_tokens": CONTEXT}, "context_length_exceeded", "max_tokens", "at most"),
        ({"logprobs": 21}, "invalid_request", "logprobs", "21"),
        ({"logprobs": True}, "invalid_request", "logprobs", "True"),
        ({"echo": True, "max_tokens": -1}, "invalid_request", "max_tokens", "-1"),
        ({"best_of": 2}, "unsupported_parameter", "best_of", "2"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix", "x"),
        ({"messages": []}, "unknown_parameter", "messages", "messages"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options", "stream"),
        ({"n": 100, "prompt": ["a"] * 100}, "invalid_request", "n", "10000"),
    ],
)
def test_bad_input_is_named_with_its_value(
    served: Served, change: dict[str, Any], code: str, param: str, named: str
) -> None:
    assert named in refused(complete(served, **change), 400, code, param)


def test_a_stream_is_ascii_so_that_no_client_takes_a_character_for_the_end_of_a_line(served: Served) -> None:
    odd = "a\u2028b\u0085c\u00e9"
    response = served.post("/v1/completions", {"model": "tiny", "prompt": odd, "echo": True, "stream": True})
    assert response.content.isascii()
    assert chunks(response)[0]["choices"][0]["text"].startswith(odd)
