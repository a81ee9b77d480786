"""The server under load and at its end: nobody who was let in is left hanging, and nothing is left behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, chunks, refused, serve, tiny_settings

from fortwo.hub.catalog import Catalog
from fortwo.settings import Settings

CLIENTS = 200
PROMPTS = [f"question {number}" for number in range(7)]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def asked(prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 40, "ignore_eos": True, **more}


def long(**more: Any) -> dict[str, Any]:
    """A request that takes a while."""
    return asked("hello", **{"max_tokens": 950, **more})


def left(served: Served) -> dict[str, Any]:
    """Whatever a request may hold."""
    served.http.get("/healthz")  # the test's own connection is there, and idle
    time.sleep(0.05)
    loop = served.server.servers[0].get_loop()
    return {
        "requests": served.state.engine.count_requests("tiny"),
        "slots": served.state.registry.load_base("tiny").runner.cache.used,
        "admitted": served.state.admission.active,
        "connections": len(served.server.server_state.connections) - 1,
        "tasks": len(asyncio.all_tasks(loop)),
        "threads": sorted(one.name for one in threading.enumerate() if "AnyIO" not in one.name),
    }


async def visit(served: Served, number: int) -> str | None:
    """One client, who hangs up at once, after a while, in the middle of a stream, or listens to the end: the text."""
    dice = random.Random(number)
    stream, manner = dice.random() < 0.5, dice.choice(["at once", "after a while", "in the middle", "stays", "stays"])
    body = json.dumps(asked(PROMPTS[number % len(PROMPTS)], stream=stream, n=dice.choice([1, 1, 2]))).encode()
    await asyncio.sleep(dice.random())
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()
        if manner == "after a while":
            await asyncio.sleep(dice.random())
        elif manner == "in the middle":
            await reader.read(dice.choice([1, 400]))
        elif manner == "stays":
            return _text((await reader.read()).decode(), stream)
    finally:
        writer.close()
    return None


def _text(answer: str, stream: bool) -> str:
    """What the first reply of an HTTP answer says."""
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200"), answer
    if not stream:
        text: str = json.loads(body)["choices"][0]["message"]["content"]
        return text
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == 0)


def test_two_hundred_clients_of_whom_many_hang_up_leave_nothing_behind(served: Served) -> None:
    alone = [served.post("/v1/chat/completions", asked(prompt)).json() for prompt in PROMPTS]
    texts = [body["choices"][0]["message"]["content"] for body in alone]
    before = left(served)

    async def crowd() -> list[str | None]:
        return await asyncio.gather(*(visit(served, number) for number in range(CLIENTS)))

    said = asyncio.run(crowd())
    stayed = [(number, text) for number, text in enumerate(said) if text is not None]
    assert 40 < len(stayed) < CLIENTS - 40
    assert [text for _, text in stayed] == [texts[number % len(PROMPTS)] for number, _ in stayed]
    deadline = time.monotonic() + 60
    while left(served) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left(served) == before
    assert before["requests"] == before["slots"] == before["admitted"] == before["connections"] == 0


def test_past_the_queue_a_request_is_refused_and_told_when_to_come_back(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine.engine", "server.state"):
        monkeypatch.setattr(f"fortwo.{module}.MAX_RUNNING", 2)
    with serve(tiny_settings(tmp_path, tiny, queue=1)) as served, ThreadPoolExecutor(3) as pool:
        served.chat()
        running = [pool.submit(served.post, "/v1/chat/completions", long()) for _ in range(3)]
        until(lambda: served.state.admission.active == 3)
        turned_away = served.chat()
        assert "FORTWO_QUEUE" in refused(turned_away, 429, "queue_full")
        assert int(turned_away.headers["Retry-After"]) >= 1
        refused(served.chat(stream=True), 429, "queue_full")
        refused(served.chat(n=4), 400, "invalid_request", "n")
        assert {one.result().status_code for one in running} == {200}
        assert served.chat(n=3).status_code == 200


def test_what_one_asks_for_harms_no_neighbour(served: Served) -> None:
    """Numbers that overflow would name a token that does not exist, and end the step of all that run together."""
    served.state.registry.load_base("tiny")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.post, "/v1/chat/completions", long())
        until(lambda: served.state.engine.count_requests("tiny") == 1)
        for numbers in ({"temperature": 1e-310}, {"temperature": 1, "repetition_penalty": 1e-45}):
            assert served.post("/v1/chat/completions", asked("hello", **numbers)).status_code == 200
        assert running.result().json()["usage"]["completion_tokens"] == 950


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_deadline_ends_with_the_reason(tiny: Path, tmp_path: Path, stream: bool) -> None:
    with serve(tiny_settings(tmp_path, tiny, request_timeout=0.2)) as served:
        served.state.registry.load_base("tiny")
        response = served.post("/v1/chat/completions", long(stream=stream))
        if stream:
            error = chunks(response)[-1]["error"]
            assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
            assert "FORTWO_REQUEST_TIMEOUT" in error["hint"]
        else:
            assert "0.2 seconds" in refused(response, 504, "deadline_exceeded")
        until(lambda: served.state.engine.count_requests("tiny") == served.state.admission.active == 0)


def test_who_waits_for_a_model_to_load_is_in_nobodys_way(tiny: Path, tmp_path: Path) -> None:
    """There are more of them than the server has threads."""
    settings = tiny_settings(tmp_path, tiny)
    Catalog(settings.models_dir).add("cold", tiny)
    with serve(settings) as served, ThreadPoolExecutor(50) as pool:
        served.state.registry.load_base("tiny")
        with served.state.registry._lock:  # as whoever loads holds it
            waiting = [
                pool.submit(served.post, "/v1/chat/completions", asked("hello", model="cold")) for _ in range(50)
            ]
            until(lambda: len(served.server.server_state.connections) >= 50)
            time.sleep(0.2)
            with httpx.Client(base_url=served.url, timeout=10, trust_env=False) as other:
                assert other.post("/v1/chat/completions", json=asked("hello", max_tokens=4)).status_code == 200
                assert other.get("/api/models").status_code == 200
            assert not any(one.done() for one in waiting)
        assert {one.result().status_code for one in waiting} == {200}


def test_who_waits_for_a_model_to_load_has_a_place_until_he_hangs_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine.engine", "server.state"):
        monkeypatch.setattr(f"fortwo.{module}.MAX_RUNNING", 1)
    settings = tiny_settings(tmp_path, tiny, queue=1)
    Catalog(settings.models_dir).add("cold", tiny)
    with serve(settings) as served:
        served.state.registry.load_base("tiny")
        clients = [http.client.HTTPConnection(served.url.removeprefix("http://")) for _ in range(2)]
        with served.state.registry._lock:  # as whoever loads holds it
            for stream, client in enumerate(clients):
                body = json.dumps(asked("hello", model="cold", stream=bool(stream)))
                client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            until(lambda: served.state.admission.active == 2)
            refused(served.chat(), 429, "queue_full")
            clients[0].close()
            until(lambda: served.state.admission.active == 1)
            assert served.chat().status_code == 200
        answer = clients[1].getresponse()
        assert answer.status == 200
        assert answer.read().endswith(b"data: [DONE]\n\n")
        clients[1].close()
        until(lambda: served.state.admission.active == 0)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_who_waits_for_a_model_past_the_deadline_is_told(tiny: Path, tmp_path: Path, path: str) -> None:
    settings = tiny_settings(tmp_path, tiny, request_timeout=0.2)
    Catalog(settings.models_dir).add("cold", tiny)
    said = {
        "chat/completions": asked("hello", stream=True),
        "completions": {"prompt": ["a", "b"], "n": 2},
        "embeddings": {"input": ["a", "b"]},
    }[path]
    with serve(settings) as served, served.state.registry._lock:
        late = served.post(f"/v1/{path}", said | {"model": "cold"})
        assert "0.2 seconds" in refused(late, 504, "deadline_exceeded")
        assert served.state.admission.active == 0


def test_who_waits_for_a_model_when_the_server_ends_is_told(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    Catalog(settings.models_dir).add("cold", tiny)
    with serve(settings) as served, ThreadPoolExecutor(1) as pool, served.state.registry._lock:
        waiting = pool.submit(served.post, "/v1/chat/completions", asked("hello", model="cold"))
        until(lambda: served.state.admission.active == 1)
        served.server.should_exit = True
        assert "shutting down" in refused(waiting.result(), 503, "unavailable")


def test_a_tokenizer_without_logprobs_is_refused_before_anything_is_asked(tiny: Path, tmp_path: Path) -> None:
    illegible = Path(shutil.copytree(tiny, tmp_path / "illegible"))
    file = illegible / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": None}))
    with serve(tiny_settings(tmp_path / "home", illegible)) as served:
        for stream in (False, True):
            for path, logprobs in (("/v1/chat/completions", True), ("/v1/completions", 1)):
                body = long(stream=stream, logprobs=logprobs)
                if path == "/v1/completions":
                    body["prompt"] = body.pop("messages")[0]["content"]
                assert "and logprobs" in refused(served.post(path, body), 400, "unsupported_model")
                assert served.state.engine.count_requests("tiny") == served.state.admission.active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_at_the_end_replies_have_their_grace_and_newcomers_are_sent_away(
    tiny: Path, tmp_path: Path, stream: bool
) -> None:
    with serve(tiny_settings(tmp_path, tiny), grace=60) as served, ThreadPoolExecutor(1) as pool:
        served.chat()
        running = pool.submit(served.post, "/v1/chat/completions", long(stream=stream))
        until(lambda: served.state.admission.active == 1)
        served.server.should_exit = True
        until(lambda: served.state.admission.closed)
        newcomer = httpx.post(f"{served.url}/v1/chat/completions", json=asked("hello"), trust_env=False)
        refused(newcomer, 503, "unavailable")
        assert int(newcomer.headers["Retry-After"]) >= 1
        response = running.result()
        assert response.status_code == 200
        if stream:
            assert chunks(response)[-1] == "[DONE]"
        else:
            assert response.json()["usage"]["completion_tokens"] == 950


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_grace_replies_are_cut_off_with_the_reason(tiny: Path, tmp_path: Path, stream: bool) -> None:
    with serve(tiny_settings(tmp_path, tiny), grace=0) as served, ThreadPoolExecutor(1) as pool:
        served.chat()
        running = pool.submit(served.post, "/v1/chat/completions", long(stream=stream))
        until(lambda: served.state.engine.count_requests("tiny") == 1)
        served.server.should_exit = True
        response = running.result()
        if stream:
            error = chunks(response)[-1]["error"]
            assert error["code"] == "unavailable"
            assert "shutting down" in error["message"]
        else:
            assert "shutting down" in refused(response, 503, "unavailable")


def test_a_process_that_is_told_to_end_finishes_its_stream_first(tiny: Path, tmp_path: Path) -> None:
    Catalog(Settings(home=tmp_path).models_dir).add("tiny", tiny)
    environment = os.environ | {"FORTWO_HOME": str(tmp_path), "FORTWO_DEFAULT_MODEL": "tiny", "COLUMNS": "200"}
    environment |= {"FORTWO_PORT": "0", "FORTWO_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    code = (
        "from fortwo.server.state import AppState\n"
        "from fortwo.server.uvicorn_server import Server\n"
        "from fortwo.settings import load\n"
        "state = AppState(load())\n"
        "server = Server(state, lambda: print(server.servers[0].sockets[0].getsockname()[1]), grace=60)\n"
        "server.run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/v1/chat/completions"
        with httpx.stream("POST", url, json=asked("hello", stream=True), timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            said = [first, *lines]
        assert "data: [DONE]" in said
        assert process.wait(60) in (0, -signal.SIGTERM)
