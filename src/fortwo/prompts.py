"""Requests to the engine and its replies, and the Protocols through which training uses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fortwo.errors import FortwoError

SCHEMA_FAILED = "the schema cannot be followed further"  # begins the error of a reply whose schema is too large
MAX_RUNNING = 96  # requests of one base that decode together
MIN_ROW_TOKENS = 128  # capacity of the cache's smallest rows; that of others is a power of two times this


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0, penalties of 0 and a repetition_penalty of 1 change nothing.

    max_tokens 0 generates nothing: only outputs about the prompt are wanted. stop: strings that end the reply and are
    not part of it. logit_bias: pairs of a token and what is added to its logit. logprobs: how many of the likeliest
    tokens are returned besides each token's own log-probability; None returns neither. prompt_logprobs: the same for
    the prompt's tokens. json_schema: a JSON Schema, as text, that the reply conforms to. grammar: a grammar that it
    conforms to instead, in llguidance's variant of Lark's syntax. ignore_eos: no token ends the reply.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Prompt:
    """A generation request. base: id of a loaded base model; adapter: the digest of a published version or the job id
    of one in training, None for the plain base. continues: the reply continues the prompt's text instead of starting an
    answer. background: a job's own request. It gets the device for no longer than the others and leaves nothing in the
    prefix cache.
    embed: Generation.embedding is wanted; max_tokens is 0. shown: control tokens that the reply's text shows."""

    base: str
    tokens: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = Sampling()
    continues: bool = False
    background: bool = False
    embed: bool = False
    shown: frozenset[int] = frozenset()


FinishReason = Literal["stop", "length", "cancelled", "error"]
NON_FINITE_LOGITS = "the model's logits are not finite (nan or infinite)"  # Generation.error, caused by the weights


@dataclass(frozen=True)
class Logprob:
    """A token's natural log-probability by the model's raw logits, before bias, penalties, temperature and filters.
    top: the likeliest tokens with theirs, likeliest first. logprob is None for a prompt's first token."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of a running generation; the last one has a finish_reason. logprobs: of the tokens of `text`, if the
    request asked for them; those of the prompt come first, without text. cause: what to answer the client instead of
    `error`, where the engine knows a status and a remedy."""

    text: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    cause: FortwoError | None = None


class Generation(Protocol):
    """Handle of a submitted Prompt. Each one ends: done becomes True, with a finish_reason. cached_tokens: how many of
    the prompt's tokens came from the cache. embedding: of length 1; empty before the end or if it was not asked for."""

    @property
    def done(self) -> bool: ...
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def embedding(self) -> tuple[float, ...]: ...
    def cancel(self) -> None: ...
    def wait(self, timeout: float | None = None) -> str: ...
    def deltas(self) -> Iterator[Delta]: ...


class Serving(Protocol):
    """The serving path as training uses it. All calls come from the device's thread and never block.
    elsewhere: whether replies are scored, too, by another program, whose weights may be rounded in another way."""

    @property
    def elsewhere(self) -> bool: ...

    def attach(self, base: str, key: str, lora: Any) -> None:
        """Serve `lora` (a nn.lora.Lora; its live tensors, nothing copied) under `key` on `base`."""

    def detach(self, base: str, key: str) -> None: ...

    def submit(self, prompt: Prompt) -> Generation: ...
