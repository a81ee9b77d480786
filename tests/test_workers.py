"""Calls that take long run on threads of their own, few at once, and end when nobody waits for them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.data import datasets
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.preview import check_row_length
from fortwo.errors import InvalidDataset, Overloaded, Unavailable
from fortwo.records import Example, Message
from fortwo.server.state import PLANNING_THREADS, PLANNING_WAITING
from fortwo.server.workers import WorkerPool


class Line:
    """The request of a client that may disconnect."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def _held(release: threading.Event, begun: list[str] | None = None, name: str = "") -> Callable[[Any], str]:
    def work(check: Callable[[], None]) -> str:
        if begun is not None:
            begun.append(name)
        while not release.wait(0.01):
            check()
        return name

    return work


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_few_run_few_wait_and_the_rest_is_refused() -> None:
    async def main() -> None:
        pool, release = WorkerPool("test", 2, 1), threading.Event()
        calls = [asyncio.create_task(pool.run(Line(), _held(release, name=str(n)))) for n in range(3)]  # type: ignore[arg-type]
        await _until(lambda: pool.active == 3)
        with pytest.raises(Overloaded) as caught:
            await pool.run(Line(), _held(release))  # type: ignore[arg-type]
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        release.set()
        assert await asyncio.gather(*calls) == ["0", "1", "2"]
        assert pool.active == 0
        pool.close()

    asyncio.run(main())


def test_a_call_ends_when_its_client_leaves_and_one_that_waits_never_begins() -> None:
    async def main() -> None:
        pool, release = WorkerPool("test", 1, 4), threading.Event()
        begun: list[str] = []
        lines = [Line() for _ in range(3)]
        calls = [
            asyncio.create_task(pool.run(line, _held(release, begun, str(n))))  # type: ignore[arg-type]
            for n, line in enumerate(lines)
        ]
        await _until(lambda: begun == ["0"] and pool.active == 3)
        lines[1].gone.set()
        await _until(lambda: pool.active == 2)
        lines[0].gone.set()
        await _until(lambda: begun == ["0", "2"])  # the first stopped although it was never released
        release.set()
        assert await calls[2] == "2"
        for call in calls[:2]:
            with pytest.raises(Unavailable):
                await call
        pool.close()

    asyncio.run(main())


def test_closing_ends_what_runs_and_what_waits() -> None:
    async def main() -> None:
        pool = WorkerPool("test", 1, 4)
        calls = [asyncio.create_task(pool.run(Line(), _held(threading.Event()))) for _ in range(3)]  # type: ignore[arg-type]
        await _until(lambda: pool.active == 3)
        pool.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, Unavailable) for end in ends)
        with pytest.raises(Unavailable):
            await pool.run(Line(), _held(threading.Event()))  # type: ignore[arg-type]

    asyncio.run(main())


def test_reading_a_dataset_can_be_ended_between_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 100)
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen == 7:
            raise Unavailable("gone")

    for spec in ({"path": str(file)}, {"examples": [{"prompt": "a", "completion": "b"}] * 100}):
        seen = 0
        with pytest.raises(Unavailable):
            datasets.load(spec, [tmp_path], check)
        assert seen == 7


def test_a_row_that_cannot_fit_is_refused_before_it_is_tokenised(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatTemplateRenderer(tiny)
    monkeypatch.setattr(renderer, "_encode", lambda *_: pytest.fail("it was tokenised"))
    for row in (
        Example((Message("user", "a" * 200_000), Message("assistant", "b")), 3),
        Example((), 3, text="a" * 200_000),
    ):
        with pytest.raises(InvalidDataset, match="line 3 has 20000"):
            check_row_length(row, renderer, 1024)
    check_row_length(Example((), 3, text=" " * 200_000 + "a"), renderer, 1024)


@pytest.fixture
def planner(tiny: Path, tmp_path: Path) -> Any:
    """A server with a dataset that takes seconds to plan."""
    folder = tmp_path / "home" / "data"
    folder.mkdir(parents=True)
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(150_000)]
    (folder / "many.json").write_text(json.dumps(rows))
    with serve(tiny_settings(tmp_path / "home", tiny)) as served:
        yield served


BODY = {"adapter_name": "n", "objective": "sft", "dataset": {"path": "many.json"}}


def test_plans_hold_up_nobody_and_end_with_their_clients(planner: Served) -> None:
    pool = planner.state.planning
    assert planner.chat().status_code == 200
    body = json.dumps(BODY).encode()
    head = (
        "POST /api/training/plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    host, port = planner.url.removeprefix("http://").split(":")
    with ExitStack() as clients:
        for _ in range(PLANNING_THREADS + PLANNING_WAITING):
            client = clients.enter_context(socket.create_connection((host, int(port))))
            client.sendall(head.encode() + body)
        while pool.active < PLANNING_THREADS + PLANNING_WAITING:
            pass
        for path in ("plan", "start"):
            answer = planner.post(f"/api/training/{path}", BODY)
            refused(answer, 429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        for path in ("/healthz", "/api/models", "/v1/models", "/api/training/jobs", "/api/adapters"):
            assert planner.http.get(path).status_code == 200
        assert planner.chat().status_code == 200
    while pool.active:  # the clients have hung up: all end soon, or this test never does
        pass
    assert planner.http.get("/api/training/jobs").json()["jobs"] == []


def test_a_plan_does_not_hold_up_the_end_of_the_server(tiny: Path, planner: Served) -> None:
    answers: list[httpx.Response] = []
    client = threading.Thread(target=lambda: answers.append(planner.post("/api/training/plan", BODY)))
    client.start()
    while not planner.state.planning.active:
        pass
    planner.server.should_exit = True
    client.join()
    refused(answers[0], 503, "unavailable")


def test_changes_that_wait_for_a_model_hold_up_neither_chat_nor_lists(served: Served) -> None:
    """Their lock is held while a base is loaded, which may take minutes."""
    assert served.chat().status_code == 200
    paths = [("POST", "/api/adapters/none/unload"), ("DELETE", "/api/adapters/none")]
    answers: list[int] = []

    def ask(method: str, path: str) -> None:
        with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
            answers.append(http.request(method, path).status_code)

    clients = [threading.Thread(target=ask, args=paths[n % 2]) for n in range(60)]
    with served.state.registry._lock:
        for client in clients:
            client.start()
        while served.state.control.active < 60:
            pass
        assert served.chat().status_code == 200
        for path in ("/healthz", "/readyz", "/api/training/jobs", "/api/adapters"):
            assert served.http.get(path).status_code == 200
    for client in clients:
        client.join()
    assert answers == [404] * 60
