"""A request to the engine as the body of vLLM's /v1/completions, and what its answers mean. Pure functions.

Prompts and replies travel as token ids, so the chat template, the text of a reply, its stop strings and its calls of
tools stay fortwo's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.errors import FortwoError, InvalidRequest, Unavailable
from fortwo.prompts import Logprob, Prompt, Sampling
from fortwo.records import Json

LEAST_TEMPERATURE = 0.01  # vLLM raises a lower one, unless it is 0
SEEDS = 2**63  # vLLM takes 0 to this; -1 means none
_ID = "token_id:"  # how vLLM writes a token's id where it would write its text


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a reply. logprobs: of each token, None where they were not asked for. finished: why vLLM ended
    the reply, if it did. cached_tokens: of the prompt; None in all chunks but the last."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob | None, ...] = ()
    finished: str | None = None
    cached_tokens: int | None = None


def check(prompt: Prompt, *, scores_prompts: bool) -> None:
    """Raises InvalidRequest for what vLLM does not compute or would compute in another way. scores_prompts: whether
    this vLLM can be asked for log-probabilities of a prompt."""
    if prompt.sampling.prompt_logprobs is not None and not scores_prompts:
        raise InvalidRequest(
            "Log-probabilities of a prompt are not asked of a vLLM that fortwo has not started: one that serves "
            "adapters of the output layer, as vLLM does by default, ends when it computes them beside another request.",
            param="logprobs",
            hint="Leave FORTWO_VLLM_URL out, so that fortwo starts vLLM, or ask a server with FORTWO_ENGINE=own.",
        )
    if prompt.embed:
        raise InvalidRequest(
            "A vLLM server that generates text computes no embeddings.",
            param="model",
            hint="Ask a fortwo server with FORTWO_ENGINE=own for embeddings.",
        )
    if 0 < prompt.sampling.temperature < LEAST_TEMPERATURE:
        raise InvalidRequest(
            f"temperature = {prompt.sampling.temperature:g} is not served by vLLM, which raises it to "
            f"{LEAST_TEMPERATURE}.",
            param="temperature",
            hint=f"Use 0, which is greedy, or at least {LEAST_TEMPERATURE}.",
        )


def completion(prompt: Prompt, model: str, max_tokens: int, stop_ids: frozenset[int]) -> Json:
    """The body that streams the reply of at most `max_tokens` tokens. stop_ids: tokens that end it; no others do."""
    sampling = prompt.sampling
    greedy = sampling.temperature == 0 or sampling.top_p == 0
    body: Json = {
        "model": model,
        "prompt": list(prompt.tokens),
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,  # the tokens that end a reply are named
        "stop_token_ids": sorted(stop_ids),
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % SEEDS
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    grammar = sampling.grammar or (None if sampling.json_schema is None else json_grammar(sampling.json_schema))
    if grammar is not None:
        body["structured_outputs"] = {"grammar": grammar}
    return body


def json_grammar(schema: str) -> str:
    """A JSON Schema, as text, as a grammar of llguidance that bounds white space as the own engine does. vLLM would
    allow any, and a reply could consist of white space alone."""
    found = json.loads(schema)
    guidance = {"whitespace_pattern": WHITE_SPACE, **found.get("x-guidance", {})}
    return f"start: %json {json.dumps({**found, 'x-guidance': guidance})}"


def prompt_outputs(tokens: Sequence[int], model: str, count: int) -> Json:
    """The body that asks for the log-probabilities of a prompt's tokens, and of the `count` likeliest at each place."""
    return {
        "model": model,
        "prompt": list(tokens),
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "prompt_logprobs": count,
    }


def next_token(tokens: Sequence[int], model: str, count: int) -> Json:
    """The body that asks for the `count` likeliest next tokens."""
    sampling = Sampling(max_tokens=1, logprobs=count)
    return completion(Prompt("", tuple(tokens), sampling=sampling), model, 1, frozenset())


def read_prompt_logprobs(answer: Json, tokens: Sequence[int], count: int) -> list[Logprob]:
    """Of each of the prompt's tokens, from the answer to `prompt_outputs`. Raises FortwoError for another answer."""
    try:
        places = answer["choices"][0]["prompt_logprobs"]
        pairs = zip(tokens, places, strict=True)
        return [
            Logprob(token, None)
            if place is None
            else _logprob(token, {int(id): float(one["logprob"]) for id, one in place.items()}, count)
            for token, place in pairs
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise strange(answer) from None


def read_chunk(data: str, count: int | None) -> Chunk:
    """What one server-sent event of a stream says. count: as Sampling.logprobs. Raises InvalidRequest for what vLLM
    refuses, and other FortwoErrors for its own failures."""
    try:
        event = json.loads(data)
    except ValueError:
        raise strange(data) from None
    if isinstance(event, dict) and "error" in event:
        raise refused(event["error"])
    try:
        if not event["choices"]:
            details = event["usage"].get("prompt_tokens_details") or {}
            return Chunk(cached_tokens=details.get("cached_tokens") or 0)
        choice = event["choices"][0]
        tokens = tuple(choice["token_ids"] or ())
        return Chunk(tokens, _logprobs(tokens, choice["logprobs"], count), choice["finish_reason"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise strange(event) from None


def _logprobs(tokens: tuple[int, ...], found: Any, count: int | None) -> tuple[Logprob | None, ...]:
    """vLLM lists the token that was chosen and then the likeliest ones, whether it is among them or not."""
    if count is None:
        return (None,) * len(tokens)
    rows = zip(tokens, found["token_logprobs"], found["top_logprobs"], strict=True)
    return tuple(
        _logprob(token, {**{_id(name): value for name, value in top.items()}, token: own}, count)
        for token, own, top in rows
    )


def _logprob(token: int, found: Mapping[int, float], count: int) -> Logprob:
    likeliest = sorted(found.items(), key=lambda one: -one[1])
    return Logprob(token, found[token], tuple(likeliest[:count]))


def _id(name: str) -> int:
    return int(name.removeprefix(_ID))


def refused(error: Any) -> FortwoError:
    """vLLM's error as ours: InvalidRequest for a request that it does not accept."""
    found = error if isinstance(error, dict) else {"message": str(error)}
    message, code = str(found.get("message", "")).strip(), found.get("code")
    if isinstance(code, int) and 400 <= code < 500:
        param = found.get("param")
        return InvalidRequest(
            f"vLLM refuses the request: {message.rstrip('.')}.",
            param=param if isinstance(param, str) else None,
            hint=_remedy(message),
        )
    return Unavailable(f"vLLM failed: {message.rstrip('.')}.", hint="Ask again; the log of vLLM has more.")


def _remedy(message: str) -> str:
    if "grammar" in message.lower() or "schema" in message.lower() or "structured" in message.lower():
        return (
            'Start vLLM with --structured-outputs-config \'{"backend": "guidance"}\', or leave the schema or the tools '
            "out."
        )
    return "Change what it names, or use FORTWO_ENGINE=own, which serves it."


def strange(answer: object) -> FortwoError:
    """The error for an answer that is not vLLM's."""
    return Unavailable(
        f"The server of FORTWO_VLLM_URL gave an answer that is not vLLM's: {str(answer)[:300]}",
        hint="Name the URL of a vLLM server of version 0.10 or newer, such as http://127.0.0.1:8000.",
    )
