"""What bench/serve.py asks of everybody: requests, the figure that is read off, and the factors that fortwo aims at."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.streams import Ask, Timing
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.records import Message

STREAMS = 64  # at most, together
ADAPTERS = 64
IN_BATCH = 8  # different adapters in a mixed batch
PREFILL = 512  # tokens
CONTEXT = 1024  # tokens that every request fits in

_KINDS = ("small", "old", "brave", "silent", "clever", "lost", "golden", "tired")
_HEROES = ("fox", "robot", "sailor", "baker", "river", "clock", "painter", "dragon")


@dataclass(frozen=True)
class Workload:
    """asks: the requests of a round, sent together. peers: who takes part beside fortwo, each with fortwo's target."""

    name: str
    asks: Callable[[int], list[Ask]]
    figure: Callable[[Timing], float]
    peers: dict[str, float | None]


def one_adapter(quick: bool) -> Workload:
    return Workload(f"{STREAMS} streams, 1 adapter", _streams(STREAMS, 16 if quick else 32, 1), _together, {})


def all_adapters(quick: bool) -> Workload:
    name = f"{STREAMS} streams, {ADAPTERS} adapters"
    return Workload(name, _streams(STREAMS, 16 if quick else 32, ADAPTERS), _together, {})


def against_peers(renderer: ChatTemplateRenderer, quick: bool) -> list[Workload]:
    long, medium, short = (64, 32, 16) if quick else (128, 64, 32)
    return [
        Workload(
            f"1 stream, {long} new tokens, after the first",
            _streams(1, long, 0),
            lambda timing: (timing.tokens - 1) / (timing.whole - timing.first),
            {"llama.cpp": 1.4, "transformers": 5.0, "vLLM": None},
        ),
        Workload(
            f"8 streams, {IN_BATCH} adapters, {medium} new tokens each",
            _streams(8, medium, IN_BATCH),
            _together,
            {"llama.cpp": 2.0, "vLLM": 2.5, "PEFT": 5.0},
        ),
        Workload(
            f"32 streams, {IN_BATCH} adapters, {short} new tokens each",
            _streams(32, short, IN_BATCH),
            _together,
            {"llama.cpp": 2.0, "vLLM": 2.0, "PEFT": 2.0, "transformers": 2.0},
        ),
        Workload(
            f"prefill of {PREFILL} tokens, to the first new one",
            lambda number: [Ask(prompt(renderer, number), 1)],
            lambda timing: timing.prompt / timing.first,
            {"llama.cpp": 3.0, "vLLM": None, "transformers": None},
        ),
    ]


def story(number: int, place: int = 0) -> tuple[dict[str, str], ...]:
    """A short request that differs from those of every other number and place."""
    kind, hero = _KINDS[place % len(_KINDS)], _HEROES[place // len(_KINDS) % len(_HEROES)]
    return ({"role": "user", "content": f"Write story number {number} about a {kind} {hero}."},)


def prompt(renderer: ChatTemplateRenderer, number: int) -> tuple[dict[str, str], ...]:
    """Messages that are PREFILL tokens, and share no beginning with those of another number: nothing is cached."""
    words = random.Random(number)
    text = f"{number}:"
    while True:
        text += f" {words.choice(_KINDS)}"
        messages = [Message("system", text), Message("user", "Go on.")]
        if (found := len(renderer.encode_prompt(messages))) >= PREFILL:
            assert found == PREFILL, found  # each of the words is one token
            return tuple({"role": one.role, "content": one.content} for one in messages)


def _streams(count: int, tokens: int, different: int) -> Callable[[int], list[Ask]]:
    return functools.partial(_stories, count, tokens, different)


def _stories(count: int, tokens: int, different: int, number: int) -> list[Ask]:
    """`count` short requests over as many `different` adapters; 0 is the plain base."""
    return [
        Ask(story(number, place), tokens, f"a{place % different:02}" if different else None) for place in range(count)
    ]


def _together(timing: Timing) -> float:
    """Tokens per second of all replies, from the requests to the end of the last."""
    return timing.tokens / timing.whole
