"""What a client of a chat server sees: when the tokens of its replies came, for any server that speaks OpenAI's API.

Times are those of arrival; nothing is split into lines, nor parsed, before the last reply has ended: the client shares
the processor with the server that it measures.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PATIENCE = 300  # seconds that a server may be silent
ATONCE = 1 << 16  # bytes of a stream, at most


class Broken(Exception):
    """A peer that cannot be measured, and why."""


@dataclass(frozen=True)
class Ask:
    """One request. tokens: how long its reply is made, whatever it says; adapter None is the plain base."""

    messages: tuple[dict[str, str], ...]
    tokens: int
    adapter: str | None = None


@dataclass(frozen=True)
class Timing:
    """Of requests sent together. first, whole: seconds until the earliest reply began, until the last one ended.
    prompt, tokens: of all requests, of all replies."""

    first: float
    whole: float
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Heard:
    """One reply. sent: when it was asked for; times: when each piece of its text came (a token is a piece, seldom two
    are), and its end; prompt, tokens: how long both are."""

    sent: float
    times: list[float]
    prompt: int
    tokens: int


def chat(port: int, base: str, asks: list[Ask]) -> Timing:
    """Send all requests at the same moment, greedy and past the model's end token. Raises Broken."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(asks)) as pool:
        replies = list(pool.map(lambda ask: _pieces(port, base, ask), asks))
    heard = [_read(began, pieces) for pieces in replies]
    short = [(ask.tokens, one.tokens) for ask, one in zip(asks, heard, strict=True)]
    if wrong := [f"{said} of {asked}" for asked, said in short if said != asked]:
        raise Broken(f"replies are not as long as was asked: {', '.join(wrong)} tokens")
    return Timing(
        first=min(one.times[0] for one in heard) - began,
        whole=max(one.times[-1] for one in heard) - began,
        prompt=sum(one.prompt for one in heard),
        tokens=sum(one.tokens for one in heard),
    )


def hear(port: int, base: str, ask: Ask) -> Heard:
    """One request by itself, as chat sends it. Raises Broken."""
    sent = time.perf_counter()
    return _read(sent, _pieces(port, base, ask))


def _pieces(port: int, base: str, ask: Ask) -> list[tuple[float, bytes]]:
    """The event stream as it came, each piece with its time."""
    body = {
        "model": base if ask.adapter is None else ask.adapter,
        "messages": ask.messages,
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise Broken(f"HTTP {response.status}: {response.read().decode(errors='replace')[:300]}")
        pieces = []
        while piece := response.read1(ATONCE):
            pieces.append((time.perf_counter(), piece))
        return pieces
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def lines(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each line, with the time at which its end came."""
    at, begun = 0.0, b""
    for at, piece in pieces:
        *whole, begun = (begun + piece).split(b"\n")
        for line in whole:
            yield at, line
    yield at, begun


def _read(sent: float, pieces: list[tuple[float, bytes]]) -> Heard:
    times, usage = [], None
    for at, line in lines(pieces):
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[len(b"data: ") :])
        if "error" in chunk:
            raise Broken(str(chunk["error"]))
        usage = chunk.get("usage") or usage
        if any(choice["delta"].get("content") or choice.get("finish_reason") for choice in chunk["choices"]):
            times.append(at)
    if usage is None:
        raise Broken("the stream ended before its usage")
    return Heard(sent, times, usage["prompt_tokens"], usage["completion_tokens"])
