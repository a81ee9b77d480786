"""Event streams of jobs: they are woken instead of asking, there is a limit of them, and they get an end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.jobs.store import JobStore, NewEvent

STREAMS = 40


@pytest.fixture
def quiet(tiny: Path, tmp_path: Path) -> Iterator[Served]:
    """A server with room for STREAMS event streams, whose queue takes no jobs."""
    with serve(tiny_settings(tmp_path / "home", tiny, max_streams=STREAMS)) as served:
        yield served


def _job(store: JobStore, **changes: Any) -> str:
    """A job that the server's queue does not take: it is said to run already."""
    plan = {"computed": {"steps": 3}}
    other = JobStore(str(store._engine.url), "elsewhere")  # until `update` takes it
    job = other.create(model="tiny", adapter_name="a", dataset={}, plan=plan, progress={})
    other.close()
    store.update(job.id, status="running", **changes)
    return job.id


class Reader(threading.Thread):
    """A client that reads one stream until it ends."""

    def __init__(self, url: str, job_id: str) -> None:
        super().__init__()
        self._url = f"{url}/api/training/jobs/{job_id}/events"
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        with httpx.stream("GET", self._url, timeout=60, trust_env=False) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("event: "):
                    self.events.append(line.removeprefix("event: "))


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_idle_streams_ask_nothing_and_all_hear_what_happens(quiet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    store = quiet.state.jobs
    job_id = _job(store)
    asked: list[int] = []
    news = store.news
    monkeypatch.setattr(store, "news", lambda job_id, after: (asked.append(after), news(job_id, after))[1])
    readers = [Reader(quiet.url, job_id) for _ in range(STREAMS)]
    _wait(lambda: all(len(reader.events) == 1 for reader in readers))
    time.sleep(0.5)  # in which the last of them looks once more and finds nothing
    before = len(asked)
    time.sleep(1)  # long enough for five looks of each stream, if they looked
    assert len(asked) == before
    for step in range(3):
        store.append_event(job_id, NewEvent("step", f"step {step}"))
        _wait(lambda heard=step + 2: all(len(reader.events) == heard for reader in readers))
    assert len(asked) - before < STREAMS  # they share what they read
    store.update(job_id, NewEvent("succeeded", "done"), status="succeeded")
    for reader in readers:
        reader.join()
        assert reader.events == ["queued", "step", "step", "step", "succeeded"]


def test_a_stream_follows_a_job_of_another_server(quiet: Served) -> None:
    other = JobStore(str(quiet.state.jobs._engine.url), "elsewhere")
    job = other.create(model="tiny", adapter_name="a", dataset={}, plan={}, progress={})
    other.update(job.id, NewEvent("running", "go"), status="running")
    reader = Reader(quiet.url, job.id)
    _wait(lambda: reader.events == ["queued", "running"])
    other.update(job.id, NewEvent("failed", "no"), status="failed")
    reader.join()
    assert reader.events[-1] == "failed"
    assert quiet.http.get(f"/api/training/jobs/{job.id}").json()["status"] == "failed"
    other.close()


def test_a_job_that_another_server_runs_is_not_touched(quiet: Served) -> None:
    other = JobStore(str(quiet.state.jobs._engine.url), "elsewhere")
    job = other.create(model="tiny", adapter_name="a", dataset={}, plan={}, progress={})
    other.update(job.id, NewEvent("running", "go"), status="running")
    for what in ("cancel", "pause"):
        said = refused(quiet.http.post(f"/api/training/jobs/{job.id}/{what}"), 409, "conflict", "job_id")
        assert "another server" in said
    assert other.get(job.id).status == "running"
    other.close()


def test_streams_are_limited(quiet: Served) -> None:
    job_id = _job(quiet.state.jobs)
    path = f"/api/training/jobs/{job_id}/events"
    with ExitStack() as opened:
        for _ in range(STREAMS):
            client = opened.enter_context(httpx.Client(base_url=quiet.url, trust_env=False, timeout=20))
            opened.enter_context(client.stream("GET", path))
        response = quiet.http.get(path)
        assert "FORTWO_MAX_STREAMS" in refused(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
    _wait(lambda: quiet.state.streams.count == 0)
    reader = Reader(quiet.url, job_id)
    _wait(lambda: reader.events == ["queued"])
    quiet.state.jobs.update(job_id, NewEvent("failed", "no"), status="failed")
    reader.join()


def test_streams_that_are_refused_or_over_take_no_place(quiet: Served) -> None:
    job_id = _job(quiet.state.jobs)
    quiet.state.jobs.update(job_id, NewEvent("failed", "no"), status="failed")
    last = {"Last-Event-ID": str(quiet.state.jobs.events(job_id)[-1].id)}
    for _ in range(2 * STREAMS):
        assert quiet.http.get(f"/api/training/jobs/{job_id}/events", headers=last).status_code == 204
        assert quiet.http.get("/api/training/jobs/none/events").status_code == 404
    assert quiet.state.streams.count == 0


@pytest.mark.parametrize("last", ["9223372036854775808", "-1", "x", "1e3"])
def test_an_event_id_that_no_event_has_is_refused(quiet: Served, last: str) -> None:
    job_id = _job(quiet.state.jobs)
    response = quiet.http.get(f"/api/training/jobs/{job_id}/events", headers={"Last-Event-ID": last})
    assert refused(response, 400, "invalid_request", "last-event-id")


def test_streams_get_an_end_at_shutdown(quiet: Served) -> None:
    job_id = _job(quiet.state.jobs)
    ends: list[str] = []

    def read() -> None:
        with httpx.stream(
            "GET", f"{quiet.url}/api/training/jobs/{job_id}/events", timeout=60, trust_env=False
        ) as response:
            ends.extend(response.iter_lines())  # raises RemoteProtocolError when the stream is cut off

    reader = threading.Thread(target=read)
    reader.start()
    _wait(lambda: quiet.state.streams.count == 1 and ends)
    quiet.server.should_exit = True
    reader.join()
    last = [line for line in ends if line]
    assert last[-2] == "event: shutdown"
    assert json.loads(last[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
