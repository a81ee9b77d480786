"""What is asked of vLLM, what its answers mean, and how it is started: pure decisions, without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import save_directory

from fortwo.errors import Conflict, FortwoError, InvalidAdapter, InvalidRequest, Unavailable
from fortwo.hub.prepared import ModelInfo
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Logprob, Prompt, Sampling
from fortwo.scale.vllm import completions, features, process, proof
from fortwo.scale.vllm.client import ServedModel


def body(stop_ids: frozenset[int] = frozenset({2}), **sampling: Any) -> dict[str, Any]:
    return completions.completion(Prompt("base", (5, 6), sampling=Sampling(**sampling)), "a@1-0", 7, stop_ids)


def test_every_option_of_the_sampling_is_asked_for() -> None:
    asked = body(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=-1,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        logit_bias=((3, 2.5),),
        logprobs=0,
    )
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "presence_penalty": 1.0, "logprobs": 0}
    wanted |= {"frequency_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {"3": 2.5}, "seed": 2**63 - 1}
    assert asked.items() >= wanted.items()
    assert (asked["model"], asked["prompt"], asked["max_tokens"]) == ("a@1-0", [5, 6], 7)
    assert (asked["ignore_eos"], asked["stop_token_ids"]) == (True, [2]), "no other token ends it"
    assert body(frozenset())["stop_token_ids"] == []


def test_greedy_has_no_filters_of_draws() -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.0}):
        asked = body(**options, top_k=3, min_p=0.5)
        assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (0, 1, 0, 0)
    assert "seed" not in body()
    assert "logprobs" not in body()


def test_a_schema_becomes_a_grammar_with_bounded_white_space_that_llguidance_reads() -> None:
    from llguidance import LLMatcher

    schema = json.dumps({"type": "object", "properties": {"a": {"const": "x\ny"}}})
    grammar = body(json_schema=schema)["structured_outputs"]["grammar"]
    assert "whitespace_pattern" in grammar
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar)) == ""
    assert body(grammar='start: "x"', json_schema=schema)["structured_outputs"] == {"grammar": 'start: "x"'}


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (Prompt("base", (1,), embed=True), "model"),
        (Prompt("base", (1,), sampling=Sampling(temperature=0.009)), "temperature"),
        (Prompt("base", (1,), sampling=Sampling(prompt_logprobs=0)), "logprobs"),
    ],
)
def test_what_vllm_does_not_compute_is_refused(prompt: Prompt, param: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        completions.check(prompt, scores_prompts=False)
    assert found.value.param == param
    assert found.value.hint


@pytest.mark.parametrize("temperature", [0, 0.01, 2])
def test_what_vllm_computes_is_not_refused(temperature: float) -> None:
    completions.check(Prompt("base", (1,), sampling=Sampling(temperature=temperature)), scores_prompts=False)
    completions.check(Prompt("base", (1,), sampling=Sampling(prompt_logprobs=0)), scores_prompts=True)


def event(**choice: Any) -> str:
    return json.dumps({"choices": [{"token_ids": [8], "logprobs": None, "finish_reason": None, **choice}]})


def test_chunks() -> None:
    assert completions.read_chunk(event(), None) == completions.Chunk((8,), (None,))
    assert completions.read_chunk(event(token_ids=[], finish_reason="stop"), None).finished == "stop"
    top = {"token_id:8": -2.0, "token_id:3": -0.5, "token_id:4": -1.0}
    logprobs = {"tokens": ["token_id:8"], "token_logprobs": [-2.0], "top_logprobs": [top]}
    chunk = completions.read_chunk(event(logprobs=logprobs), 2)
    assert chunk.logprobs == (Logprob(8, -2.0, ((3, -0.5), (4, -1.0))),)
    for details, cached in (({"cached_tokens": 4}, 4), (None, 0)):
        last = json.dumps({"choices": [], "usage": {"prompt_tokens_details": details}})
        assert completions.read_chunk(last, None).cached_tokens == cached


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ('{"error": {"message": "no", "code": 400, "param": "stop"}}', InvalidRequest),
        ('{"error": {"message": "dead", "code": 500}}', Unavailable),
        ('{"error": "dead"}', Unavailable),
        ("{", Unavailable),
        ("[]", Unavailable),
        ('{"choices": [{"token_ids": [1], "logprobs": {}, "finish_reason": null}]}', Unavailable),
    ],
)
def test_errors_and_nonsense_in_a_stream(data: str, kind: type[FortwoError]) -> None:
    with pytest.raises(kind) as found:
        completions.read_chunk(data, 1)
    assert found.value.hint


def test_logprobs_of_a_prompt() -> None:
    place = {"6": {"logprob": -3.0, "rank": 9}, "1": {"logprob": -0.1, "rank": 1}}
    answer = {"choices": [{"prompt_logprobs": [None, place]}]}
    found = completions.read_prompt_logprobs(answer, (5, 6), 1)
    assert found == [Logprob(5, None), Logprob(6, -3.0, ((1, -0.1),))]
    with pytest.raises(Unavailable):
        completions.read_prompt_logprobs(answer, (5, 6, 7), 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=17), ("rank 17", "--max-lora-rank 32")),
        (LoraConfig(r=8, rank_pattern=(("q_proj", 64),)), ("rank 64", "--max-lora-rank 64")),
        (LoraConfig(r=600), ("rank 600", "Train it with a rank of at most 16")),
        (LoraConfig(use_dora=True), ("DoRA",)),
        (LoraConfig(r=17, use_dora=True), ("DoRA", "rank 17")),
    ],
)
def test_features_that_vllm_lacks(config: LoraConfig, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as found:
        features.check("Adapter 'a@1'", config, 16)
    told = f"{found.value.message} {found.value.hint}"
    assert all(word in told for word in ("Adapter 'a@1'", *words)), told


def test_features_that_vllm_has() -> None:
    features.check("a", LoraConfig(r=16, use_rslora=True, alpha_pattern=(("q_proj", 3.0),)), 16)
    features.check("a", LoraConfig(r=400), None)
    assert features.max_rank("LoRA rank 1000000 is greater than max_lora_rank 320.', please") == 320
    assert features.max_rank("out of memory") is None


def test_the_command_has_what_fortwo_needs_and_keeps_what_is_given(tmp_path: Path) -> None:
    base = save_directory(tmp_path)
    plain = process.command("vllm serve", "base", base, 8001, 64)
    assert plain[:2] == ["vllm", "serve"]
    pairs = dict(pairwise(plain))
    assert (pairs["--model"], pairs["--port"], pairs["--max-lora-rank"]) == (str(base), "8001", "64")
    assert {"--enable-lora", "q_proj", "down_proj"} <= set(plain)
    assert process.scores_prompts(plain)
    given = process.command("py -m x --max-lora-rank 8 --lora-target-modules=q_proj,lm_head", "base", base, 1, 64)
    assert given.count("--max-lora-rank") == 1
    assert "--lora-target-modules" not in given
    assert not process.scores_prompts(given)


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    started = process.VllmProcess("no-such-vllm serve", "base", tmp_path, 1, 8, "key", tmp_path)
    with pytest.raises(InvalidRequest, match="no-such-vllm") as found:
        started.start()
    assert found.value.param == "vllm_command"


def test_a_command_that_ends_shows_its_last_lines(tmp_path: Path) -> None:
    started = process.VllmProcess("sh -c 'echo no memory; exit 3'", "base", tmp_path, 1, 8, "key", tmp_path)
    started.start()
    try:
        while not started.ended:
            time.sleep(0.01)
        with pytest.raises(Unavailable, match="status 3: no memory") as found:
            started.check_alive()
        assert "vllm.log" in (found.value.hint or "")
    finally:
        started.stop()


INFO = ModelInfo("base", "d" * 64, "w" * 64, Path("/nowhere"), 1, 1, "Llama", "dir:/nowhere", None)


@pytest.mark.parametrize(("differs", "same"), [(0.0, True), (0.29, True), (0.31, False), (float("nan"), False)])
def test_another_base_is_told_by_its_log_probabilities(differs: float, same: bool) -> None:
    served = ServedModel("base", "org/base", 1024, {})
    if same:
        proof.check_base(served, "http://x", INFO, differs)
        return
    with pytest.raises(Conflict) as found:
        proof.check_base(served, "http://x", INFO, differs)
    assert "vllm serve" in (found.value.hint or "")


def test_an_adapter_whose_effect_vllm_does_not_have_is_told() -> None:
    base_PV, own_PV = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -1.0, -3.0]])
    served, ignored = [{0: -2.01, 1: -1.0}], [{0: -1.0, 1: -2.0}]
    assert proof.check_adapter("a@1", base_PV, own_PV, served, 0.01) is None
    assert isinstance(proof.check_adapter("a@1", base_PV, own_PV, ignored, 0.01), InvalidAdapter)
    assert proof.check_adapter("a@1", base_PV, own_PV, ignored, 0.5) is None, "rounding alone could be that much"


def test_vllm_ends_with_a_fortwo_that_is_killed(tmp_path: Path) -> None:
    """Its process is a `sleep` here."""
    code = (
        "from pathlib import Path\n"
        "from fortwo.scale.vllm.process import VllmProcess\n"
        f"started = VllmProcess(\"sh -c 'echo $$; exec sleep 600'\", 'base', Path({str(tmp_path)!r}), 1, 8, 'key', "
        f"Path({str(tmp_path)!r}))\n"
        "started.start()\n"
        "input()"
    )
    log = tmp_path / "vllm.log"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        while not (log.exists() and log.read_text().strip()):
            time.sleep(0.02)
        child = psutil.Process(int(log.read_text()))
        parent.kill()
    assert child.wait(60) is None or not child.is_running()
