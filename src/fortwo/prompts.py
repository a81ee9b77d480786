"""What the engine is asked and what it answers, and the Protocols through which training and its callers meet it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

MAX_RUNNING = 96  # requests of one base that decode together
MIN_ROW_TOKENS = 128  # capacity of the cache's smallest rows; that of others is a power of two times this


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0, penalties of 0 and a repetition_penalty of 1 change nothing.

    max_tokens 0 asks about the prompt alone. stop strings end the reply and are not part of it.
    logit_bias: what is added to the logits of these tokens.
    logprobs: how many of the likeliest tokens are told with each token's own log-probability; None tells neither.
    prompt_logprobs: the same of the prompt's tokens.
    json_schema: the reply is JSON that this schema (JSON text) describes. ignore_eos: no token ends the reply.
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
    ignore_eos: bool = False


@dataclass(frozen=True)
class Prompt:
    """A generation request: token ids, and which weights answer: a resident base's id and, for an adapter, its key
    (the digest of a published version, the job id of one in training); None is the plain base. continues: the reply's
    text goes on where the prompt's ends, instead of beginning an answer. kept: what is computed for it stays in memory,
    as far as there is room, for requests that begin alike. embed: what is wanted is Generation.embedding, with
    max_tokens 0."""

    base: str
    tokens: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = Sampling()
    continues: bool = False
    kept: bool = True
    embed: bool = False


FinishReason = Literal["stop", "length", "cancelled", "error"]
NOT_NUMBERS = "the model's logits are not numbers (nan or infinite)"  # the `error` of a reply that its weights ended


@dataclass(frozen=True)
class Logprob:
    """A token's natural log-probability in the model's own distribution: of its logits as they are, before bias,
    penalties, temperature and whatever else decides. top: the likeliest tokens with theirs, likeliest first. Of a
    prompt's first token, which nothing comes before, there is none."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of a running generation; the last one carries finish_reason. logprobs: of the tokens that `text` is made
    of, when they were asked for; those of the prompt come first, with no text."""

    text: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[Logprob, ...] = ()


class Generation(Protocol):
    """Handle of a submitted Prompt. Every one ends: done becomes True with a finish_reason. cached_tokens: how many of
    the prompt's tokens needed no computing. embedding: of length 1; empty before the end, and when nobody asked."""

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
    """The serving path as training sees it. All calls come from the device owner's thread and never block."""

    def attach(self, base: str, key: str, lora: Any) -> None:
        """Serve `lora` (a nn.lora.Lora; its live tensors, nothing copied) under `key` on `base`."""

    def detach(self, base: str, key: str) -> None: ...

    def submit(self, prompt: Prompt) -> Generation: ...
