"""Embeddings on a tiny model: what they are, in every shape, beside others, and every bad request named."""

from __future__ import annotations

import base64
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serving import Served, refused, serve, tiny_settings
from tiny import VOCABULARY

from fortwo.nn.lora import Lora
from fortwo.prompts import Prompt
from fortwo.server.openai.embeddings import BATCH_INPUTS, BATCH_TOKENS, _batches
from tests.parts import packed_hidden
from tests.test_server_load import until
from tests.test_server_native import publish, trained

CONTEXT = 1024
HELLO = [VOCABULARY.index(token) for token in ("he", "l", "l", "o")]


def embed(served: Served, given: Any = "hello", **more: Any) -> httpx.Response:
    return served.post("/v1/embeddings", {"model": "tiny", "input": given, **more})


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [one["embedding"] for one in response.json()["data"]]


@torch.no_grad()
def expected(served: Served, tokens: list[int], lora: Lora | None = None) -> list[float]:
    """By one plain forward."""
    last_D = packed_hidden(served.state.registry.load_base("tiny").decoder, [tokens], lora, prefix=0)[0][-1]
    return (last_D / last_D.norm()).tolist()


@pytest.mark.parametrize("encoding", ["base64", "float", None])
def test_the_official_client_gets_the_last_hidden_state(served: Served, encoding: Any) -> None:
    """Without an encoding the client asks for base64 and reads it itself."""
    asked = {} if encoding is None else {"encoding_format": encoding}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        reply = client.embeddings.create(model="tiny", input=["hello", "the"], **asked)
    assert (reply.model, reply.object, [one.index for one in reply.data]) == ("tiny", "list", [0, 1])
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (6, 6)
    for one, tokens in zip(reply.data, (HELLO, [VOCABULARY.index("t"), VOCABULARY.index("he")]), strict=True):
        given: Any = one.embedding
        vector = struct.unpack("<64f", base64.b64decode(given)) if encoding == "base64" else given
        assert list(vector) == pytest.approx(expected(served, tokens), abs=1e-5)
        assert sum(number**2 for number in vector) == pytest.approx(1, abs=1e-5)


def test_input_may_be_text_or_tokens_one_or_several(served: Served) -> None:
    (hello,), (other,) = vectors(embed(served)), vectors(embed(served, "other"))
    assert vectors(embed(served, HELLO)) == [hello]
    for given in (["hello", "other"], [HELLO, [VOCABULARY.index(letter) for letter in ("o", "t", "he", "r")]]):
        for got, wanted in zip(vectors(embed(served, given)), (hello, other), strict=True):
            assert got == pytest.approx(wanted, abs=1e-5)
    assert vectors(embed(served, [5])) == [pytest.approx(expected(served, [5]), abs=1e-5)]
    longest = [VOCABULARY.index("x")] * CONTEXT
    assert vectors(embed(served, longest)) == [pytest.approx(expected(served, longest), abs=1e-5)]


def test_an_adapter_has_embeddings_of_its_own(served: Served) -> None:
    publish(served, "embedding", seed=3)
    (own,), (plain,) = vectors(embed(served, model="embedding")), vectors(embed(served))
    assert own == pytest.approx(expected(served, HELLO, trained(served, 3)), abs=1e-5)
    assert max(abs(one - two) for one, two in zip(own, plain, strict=True)) > 0.01


def test_many_inputs_come_in_order_and_take_few_places(served: Served) -> None:
    inputs = [[number % 250, *([7] * (number % 90))] for number in range(300)]
    with ThreadPoolExecutor(1) as pool:
        running, most = pool.submit(embed, served, inputs), 0
        while not running.done():
            most = max(most, served.state.admission.active)
            time.sleep(0.001)
        got = vectors(running.result())
    assert 0 < most <= BATCH_INPUTS
    assert len(got) == 300
    for place in (0, 1, 89, 200, 299):
        assert got[place] == pytest.approx(expected(served, inputs[place]), abs=1e-5)
    assert served.state.engine.count_requests("tiny") == served.state.admission.active == 0


def test_so_many_inputs_are_under_way_at_once() -> None:
    prompts = [
        Prompt("tiny", tuple(range(length)))
        for length in (5, BATCH_TOKENS + 1, 5, BATCH_TOKENS - 5, 1, *[1] * BATCH_INPUTS)
    ]
    portions = list(_batches(prompts))
    assert [prompt for portion in portions for prompt in portion] == prompts
    assert [len(portion) for portion in portions] == [1, 1, 2, BATCH_INPUTS, 1]


def test_the_deadline_is_of_all_inputs_together(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, request_timeout=0.3)) as served:
        served.state.registry.load_base("tiny")
        refused(embed(served, ["x" * 1000] * 400), 504, "deadline_exceeded")
        until(lambda: served.state.engine.count_requests("tiny") == served.state.admission.active == 0)


@pytest.mark.parametrize(
    ("change", "code", "param", "named"),
    [
        ({"input": ""}, "invalid_request", "input", "empty"),
        ({"input": []}, "invalid_request", "input", "empty"),
        ({"input": ["a", ""]}, "invalid_request", "input", "empty"),
        ({"input": {"text": "x"}}, "invalid_request", "input", "neither"),
        ({"input": ["a"] * 2049}, "invalid_request", "input", "2048"),
        ({"input": [999999]}, "invalid_request", "input", "999999"),
        ({"input": ["a", "x" * (CONTEXT + 1)]}, "context_length_exceeded", "input[1]", str(CONTEXT)),
        ({"encoding_format": "hex"}, "invalid_request", "encoding_format", "'hex'"),
        ({"dimensions": 32}, "unsupported_parameter", "dimensions", "32"),
        ({"temperature": 0}, "unknown_parameter", "temperature", "temperature"),
    ],
)
def test_bad_input_is_named_with_its_value(
    served: Served, change: dict[str, Any], code: str, param: str, named: str
) -> None:
    response = served.post("/v1/embeddings", {"model": "tiny", "input": "hello", **change})
    assert named in refused(response, 400, code, param)


def test_an_unknown_model_is_named(served: Served) -> None:
    refused(embed(served, model="nobody"), 404, "not_found", "model")
