"""The bundled base on a vLLM that fortwo starts, in fp32: the same tokens as the own engine's, with eight adapters."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Served, serve
from vllm_server import COMMAND, ENVIRONMENT, needs_vllm

from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.scale.vllm.start import vllm_engine
from fortwo.server.state import AppState
from fortwo.settings import Settings

pytestmark = [needs_vllm, pytest.mark.real, pytest.mark.slow]

BASE = "smollm2-135m-instruct"
SUBJECTS = "water Paris 42 gravity bread music a river the moon Python chess".split(" ")
ASKED = ("What is {}?", "Tell me about {}.", "Why is {} important?", "Give me a short poem about {}.", "Is {} old?")
PROMPTS = [question.format(subject) for subject in SUBJECTS[:10] for question in ASKED]
CONFIG = LoraConfig(r=8, alpha=16)
NEAR = 1e-3  # nats; a smaller lead of a token is within the rounding of fp32


@pytest.fixture(scope="module", params=["", " --data-parallel-size 2"], ids=["one", "two"])
def both(
    request: pytest.FixtureRequest, real_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, Served]]:
    """A server on the vLLM that it starts, of one engine or of two that share the requests, and a server with its own
    engine; both have the same eight adapters."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        homes = [tmp_path_factory.mktemp(name) for name in ("through", "own")]
        for home in homes:
            (home / "models").symlink_to(real_home / "models")
        command = f"{COMMAND} --dtype float32 --max-model-len 1024 --max-num-seqs 16 --max-lora-rank 16{request.param}"
        common: dict[str, Any] = {"port": 0, "weights": "fp32"}
        vllm = Settings(home=homes[0], engine="vllm", vllm_command=command, **common)
        with (
            serve(vllm, create=partial(AppState, make_engine=vllm_engine)) as through,
            serve(Settings(home=homes[1], **common)) as own,
        ):
            for served in (through, own):
                for seed in range(8):
                    publish(served, f"a{seed}", seed)
            yield through, own


def publish(served: Served, name: str, seed: int) -> None:
    base = served.state.registry.load_base(BASE)
    lora = Lora.init(CONFIG, base.decoder.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor.data += 0.01 * torch.randn(tensor.shape, generator=generator)
    manifest = {"base_model": BASE, "base_digest": base.digest}
    served.state.adapters.publish(name, lora.state(), CONFIG.to_peft(BASE), manifest, current=True)


def ask(served: Served, prompt: str, model: str, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16, "temperature": 0, "model": model}
    response = served.http.post("/v1/chat/completions", json={**body, **more}, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_fifty_prompts_have_the_same_tokens_on_the_base_and_on_eight_adapters(both: tuple[Served, Served]) -> None:
    models = [BASE, *(f"a{n}" for n in range(8))]
    asked = [(prompt, models[n % 9]) for n, prompt in enumerate(PROMPTS)]
    assert len(asked) == 50
    with ThreadPoolExecutor(16) as pool:
        theirs, ours = (
            [
                [(token["token"], token["top_logprobs"]) for token in choice["logprobs"]["content"]]
                for choice in pool.map(
                    lambda one, served=served: ask(served, *one, logprobs=True, top_logprobs=2), asked
                )
            ]
            for served in both
        )
    close = 0
    for their, our in zip(theirs, ours, strict=True):
        parted = next((n for n, pair in enumerate(zip(their, our, strict=False)) if pair[0][0] != pair[1][0]), None)
        if parted is None:
            assert len(their) == len(our)
        else:
            first, second = (top["logprob"] for top in our[parted][1])
            assert first - second < NEAR, "vLLM took another token that was not as likely"
            close += 1
    assert close <= 1, "such a close call is rare"


def test_retention_is_scored_by_vllm_while_others_ask(both: tuple[Served, Served]) -> None:
    """vLLM would end if it wrapped the output layer for adapters."""

    def scores(served: Served) -> list[Any]:
        echo = {"prompt": "Water boils at one hundred degrees.", "echo": True, "logprobs": 1, "max_tokens": 1}
        bodies = [{**echo, "model": f"a{n % 8}", "temperature": 0} for n in range(6)]
        with ThreadPoolExecutor(8) as pool:
            chats = [pool.submit(ask, served, prompt, BASE) for prompt in PROMPTS[:2]]
            answers = list(pool.map(lambda body: served.http.post("/v1/completions", json=body, timeout=300), bodies))
            assert all(chat.result() for chat in chats)
        return [answer.json()["choices"][0]["logprobs"]["token_logprobs"] for answer in answers]

    theirs, ours = map(scores, both)
    assert len({tuple(one) for one in ours}) == 6
    for their, our in zip(theirs, ours, strict=True):
        assert their[0] is our[0] is None
        assert their[1:] == pytest.approx(our[1:], abs=2e-3)
