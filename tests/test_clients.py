"""Clients for Python against a running server, each in a process of .venv-clients, which `make test-clients` makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Served

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
if not PYTHON.exists():
    pytest.skip("make test-clients has not made .venv-clients", allow_module_level=True)


def run(script: str, *arguments: str, **environment: str) -> Any:
    """What a script of tests/clients prints in its last line, as JSON."""
    command = [str(PYTHON), str(ROOT / "tests" / "clients" / f"{script}.py"), *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(command, env=kept | {"HF_HUB_OFFLINE": "1"} | environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", ["langchain_chat", "llama_index_chat", "litellm_chat", "llm_chat"])
def test_a_conversation_of_two_turns(served: Served, tmp_path: Path, script: str) -> None:
    said = run(script, f"{served.url}/v1", "tiny", LLM_USER_PATH=str(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    first = served.chat(messages=messages, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And the rest?"}]
    second = served.chat(messages=messages, temperature=0, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert said == {"first": first, "second": second, "streamed": second, "tokens": 12}


def test_lm_evaluation_harness_gets_the_likelihoods(served: Served, tiny: Path, tmp_path: Path) -> None:
    said = run("lm_eval_completions", f"{served.url}/v1", "tiny", str(tiny), str(tmp_path))
    expected = [
        [_likelihood(served, question, f" {choice}") for choice in ("the sky", "the sea")]
        for question in ("What is up?", "What is down?")
    ]
    for found, wanted in zip(said["likelihoods"], expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
    right = [pair.index(max(pair)) == answer for answer, pair in enumerate(expected)]
    assert said["acc"] == sum(right) / 2


def _likelihood(served: Served, prompt: str, answer: str) -> float:
    """The sum of the log probabilities of the answer's tokens, which a byte-level tokenizer has one by one."""
    body = {"model": "tiny", "prompt": prompt + answer, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    found = served.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    places = [n for n, offset in enumerate(found["text_offset"]) if len(prompt) <= offset < len(prompt + answer)]
    return float(sum(found["token_logprobs"][n] for n in places))
