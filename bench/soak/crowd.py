"""Many clients while a job trains: chats, lists and uploads; some hang up, some send bad bodies."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from bench.soak.server import Running, new_home, running, used

CLIENTS = 64
HANG_UPS, BAD = 0.2, 0.1  # shares of all requests
CACHE_MB = "16"  # which some thousand requests fill
WARM_UP, FULL = 500, 0.9  # requests, until this share of the cache is in use and memory is read for the first time
MOST_WARM_UPS = 10
PARTS = 4  # after each of which memory is read
GROWTH = 0.05  # of memory, that is no fault
BODIES = (
    b'{"model": "tiny", "mess',
    b"[" * 5000,
    b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a" * 1_000_000}]}).encode(),
    json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": "hot"}).encode(),
    b'{"model": "tiny", "messages": "\\ud800"}',
    b"x" * (17 << 20),
)


def ask(folder: Path, requests: int, seed: int) -> int:
    """The number of faults: requests that did not end or ended with a status from 500 on (429 and 503 with a time to
    wait are answers), memory, files or threads that are not given back."""
    outcomes: Counter[str] = Counter()
    chats: list[float] = []
    with running(new_home(folder, "crowd"), FORTWO_CACHE_MB=CACHE_MB) as server:
        server.train("long", 1_000_000)
        for number in range(MOST_WARM_UPS):
            _crowd(server, WARM_UP, seed + PARTS + number, Counter(), [])
            if _cache_usage(server) > FULL:
                break
        print(f"warm-up: {WARM_UP * (number + 1)} requests, cache {_cache_usage(server):.0%} full", flush=True)
        found = [_settled(server)]
        seconds = 0.0
        for number in range(PARTS):
            began = time.monotonic()
            _crowd(server, requests // PARTS, seed + number, outcomes, chats)
            seconds += time.monotonic() - began
            found.append(_settled(server))
        before, after = found[0], found[-1]
        step = server.jobs()[0]["progress"]["step"]
        server.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        server.process.wait()
    chats.sort()
    print(f"{sum(outcomes.values())} requests of {CLIENTS} clients in {seconds:.0f} s: {dict(outcomes.most_common())}")
    print(f"chat: median {chats[len(chats) // 2]:.2f} s, p99 {chats[len(chats) * 99 // 100]:.2f} s; job at step {step}")
    print(
        f"memory {' -> '.join(f'{one[0] >> 20}' for one in found)} MiB; files {before[1]} -> {after[1]}; threads",
        end=" ",
    )
    print(f"{before[2]} -> {after[2]}; SIGTERM to the end {time.monotonic() - stopped:.1f} s")
    wrong = sum(count for end, count in outcomes.items() if not end.isdigit() and end != "hung up")
    wrong += sum(count for end, count in outcomes.items() if end.isdigit() and int(end) >= 500 and end != "503")
    grown = after[0] > before[0] * (1 + GROWTH)
    return wrong + grown + (after[1] > before[1]) + (after[2] > before[2])


def _cache_usage(server: Running) -> float:
    """The share of its limit that the cache has memory for."""
    lines = server.http.get("/metrics").text.splitlines()
    return max(float(line.split()[-1]) for line in lines if line.startswith("fortwo_cache_usage_ratio{"))


def _settled(server: Running) -> tuple[int, int, int]:
    """Memory, files and threads once nothing is under way but the job."""
    time.sleep(15)  # threads that wait for work end after ten seconds
    return used(server.process.pid)


def _crowd(server: Running, requests: int, seed: int, outcomes: Counter[str], chats: list[float]) -> None:
    share = -(-requests // CLIENTS)
    url = str(server.http.base_url)
    clients = [
        threading.Thread(target=_client, args=(url, share, random.Random(seed * CLIENTS + number), outcomes, chats))
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def _client(url: str, count: int, chance: random.Random, outcomes: Counter[str], chats: list[float]) -> None:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        for _ in range(count):
            kind = chance.random()
            try:
                if kind < HANG_UPS:
                    outcome = _hang_up(http, chance)
                elif kind < HANG_UPS + BAD:
                    headers = {"Content-Type": "application/json"}
                    answer = http.post("/v1/chat/completions", content=chance.choice(BODIES), headers=headers)
                    outcome = str(answer.status_code)
                else:
                    outcome = str(chance.choice((_chat, _chat, _chat, _list, _upload))(http, chance, chats))
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            outcomes[outcome] += 1


def _body(chance: random.Random, tokens: int, stream: bool = False) -> dict[str, object]:
    said = [{"role": "user", "content": f"{chance.random()}"}]
    return {"model": "tiny", "messages": said, "max_tokens": tokens, "stream": stream}


def _chat(http: httpx.Client, chance: random.Random, chats: list[float]) -> int:
    began = time.monotonic()
    answer = http.post("/v1/chat/completions", json=_body(chance, chance.randrange(1, 12)))
    if answer.is_success:
        chats.append(time.monotonic() - began)
    return answer.status_code


def _list(http: httpx.Client, chance: random.Random, chats: list[float]) -> int:
    del chats
    return http.get(chance.choice(("/v1/models", "/api/adapters", "/api/training/jobs", "/healthz"))).status_code


def _upload(http: httpx.Client, chance: random.Random, chats: list[float]) -> int:
    del chats
    file = ("rows.jsonl", json.dumps({"text": str(chance.random())}).encode())
    return http.post("/api/data/rows", files={"file": file}).status_code


def _hang_up(http: httpx.Client, chance: random.Random) -> str:
    """A stream or a whole reply that nobody waits for."""
    timeout = chance.uniform(0.01, 0.3)
    call: Callable[..., object] = http.post
    with suppress(httpx.HTTPError):
        if chance.random() < 0.5:
            with http.stream("POST", "/v1/chat/completions", json=_body(chance, 200, stream=True), timeout=10) as reply:
                next(reply.iter_lines(), None)
        else:
            call("/v1/chat/completions", json=_body(chance, 200), timeout=timeout)
    return "hung up"
