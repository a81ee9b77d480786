"""What a killed server and a database that refuses leave behind: nothing is lost, doubled or misnamed."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serve, tiny_settings

from fortwo.adapters.version_files import STATE
from tests.test_resume import RUN, call, until
from tests.test_server_training import LONG, get, start

SHORT = {"max_steps": 4, "learning_rate": 1e-2}
FACTS = {"facts": [{"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}]}


def _database(served: Served) -> sqlite3.Connection:
    return sqlite3.connect(served.state.settings.home / "fortwo.db", isolation_level=None)


def _forget_the_end(home: Path, job_id: str, status: str = "evaluating", error: str = "null") -> None:
    """The database as it is when the server is killed after it published and before it stored that."""
    with sqlite3.connect(home / "fortwo.db") as database:
        database.execute(
            "UPDATE jobs SET status = ?, adapter = 'null', report = 'null', error = ?, finished_at = NULL WHERE id = ?",
            (status, error, job_id),
        )
        database.execute("DELETE FROM events WHERE job_id = ? AND type IN ('succeeded', 'failed')", (job_id,))
    database.close()


def _versions(served: Served, name: str) -> list[dict[str, Any]]:
    return list(served.http.get(f"/api/adapters/{name}").json()["versions"])


@pytest.mark.parametrize("resume", [False, True], ids=["by default", "FORTWO_RESUME"])
def test_a_job_that_had_published_when_the_server_was_killed_has_succeeded(
    tiny: Path, tmp_path: Path, resume: bool
) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as first:
        job = first.wait(start(first, "w", training_config=SHORT)["job_id"])
        assert job["status"] == "succeeded"
        events = [event.type for event in first.state.jobs.events(job["job_id"])]
    _forget_the_end(tmp_path, job["job_id"])
    with serve(tiny_settings(tmp_path, tiny, resume=resume)) as second:
        after = get(second, job["job_id"])
        for field in ("status", "adapter", "report", "error"):
            assert after[field] == job[field], field
        assert [event.type for event in second.state.jobs.events(job["job_id"])] == events
        assert [version["version"] for version in _versions(second, "w")] == [1]


def test_a_version_that_was_stored_but_not_yet_current_when_the_server_was_killed_becomes_current(
    tiny: Path, tmp_path: Path
) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as first:
        job = first.wait(start(first, "w", training_config=SHORT)["job_id"])
    _forget_the_end(tmp_path, job["job_id"])
    state = tmp_path / "adapters" / "w" / STATE
    state.write_text(json.dumps({**json.loads(state.read_text()), "current": []}))
    with serve(tiny_settings(tmp_path, tiny)) as second:
        after = get(second, job["job_id"])
        assert (after["status"], after["error"]) == ("succeeded", None)
        assert _versions(second, "w")[0]["current"]
        assert second.chat(model="w").status_code == 200


def test_a_job_that_missed_its_targets_when_the_server_was_killed_has_failed_for_that(
    tiny: Path, tmp_path: Path
) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as first:
        job = first.wait(
            start(first, "w", objective="override", dataset=FACTS, training_config={"max_steps": 2})["job_id"],
            seconds=120,
        )
        assert job["error"]["code"] == "targets_missed"
    _forget_the_end(tmp_path, job["job_id"])
    with serve(tiny_settings(tmp_path, tiny)) as second:
        after = get(second, job["job_id"])
        for field in ("status", "adapter", "report", "error"):
            assert after[field] == job[field], field
        assert not _versions(second, "w")[0]["current"]


def test_resuming_a_job_that_had_published_does_not_publish_it_again(tiny: Path, tmp_path: Path) -> None:
    """A database of before such jobs were noticed, or a restored backup, calls it interrupted."""
    with serve(tiny_settings(tmp_path, tiny)) as served:
        job = served.wait(start(served, "w", training_config=SHORT)["job_id"])
        _forget_the_end(tmp_path, job["job_id"], "failed", json.dumps({"code": "interrupted", "message": "x"}))
        after = call(served, job["job_id"], "resume")
        assert (after["status"], after["adapter"], after["error"]) == ("succeeded", job["adapter"], None)
        assert len(_versions(served, "w")) == 1
        # The same for one that is queued or paused according to the backup: it trains again, to the same version.
        _forget_the_end(tmp_path, job["job_id"], "paused")
        served.state.adapters.delete("w")  # nothing of it is left: now it must publish
        call(served, job["job_id"], "resume")
        again = served.wait(job["job_id"])
        assert again["adapter"]["digest"] == job["adapter"]["digest"]
        _forget_the_end(tmp_path, job["job_id"], "paused")
        call(served, job["job_id"], "resume")
        third = served.wait(job["job_id"])
        assert (third["status"], third["adapter"]) == ("succeeded", again["adapter"])
        assert len(_versions(served, "w")) == 1


def test_a_run_goes_on_while_the_database_is_locked_and_nothing_is_missing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fortwo.jobs.database.LOCK_SECONDS", 0.05)
    with serve(tiny_settings(tmp_path, tiny)) as served:
        steps = 400
        job_id = start(served, "w", training_config=RUN | {"max_steps": steps})["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 3)
        lock = _database(served)
        lock.execute("BEGIN IMMEDIATE")
        held = get(served, job_id)["progress"]["step"]
        response = served.post(
            "/api/training/start", {"adapter_name": "x", "dataset": {"examples": [{"prompt": "a", "completion": "b"}]}}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
        assert "fortwo.db" in response.json()["error"]["message"]
        assert served.chat().status_code == 200
        deadline = time.monotonic() + 120
        while not served.state.adapters.names() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served.state.adapters.names() == ("w",)  # it trained to its end and published
        job = get(served, job_id)
        assert job["status"] in ("running", "evaluating")
        assert job["progress"]["step"] <= held + 1
        lock.execute("ROLLBACK")
        lock.close()
        job = served.wait(job_id)
        assert job["status"] == "succeeded", job["error"]
        recorded = [
            event.data["step"] for event in served.state.jobs.events(job_id, limit=10_000) if event.type == "step"
        ]
        assert recorded == list(range(1, steps + 1))
        assert job["report"] is not None
        assert job["actual"]["steps"] == steps


def test_a_run_that_failed_while_the_database_refused_says_why(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fortwo.jobs.database.LOCK_SECONDS", 0.05)
    with serve(tiny_settings(tmp_path, tiny)) as served:
        job_id = start(served, "w", training_config=RUN | LONG)["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 3)
        lock = _database(served)
        lock.execute("BEGIN IMMEDIATE")

        def explode() -> None:
            task = served.state.engine._tasks[0]

            def failing() -> Any:
                raise MemoryError("no more of it")
                yield

            task._events.close()
            task._events = failing()

        served.state.engine.call(explode).result()
        while served.state.engine._tasks:
            time.sleep(0.01)
        lock.execute("ROLLBACK")
        lock.close()
        job = served.wait(job_id)
        assert job["status"] == "failed"
        assert "no more of it" in job["error"]["message"]
        following = served.wait(start(served, "v", training_config=SHORT)["job_id"])
        assert following["status"] == "succeeded"  # the queue goes on


def test_two_homes_may_share_a_database(tiny: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with serve(tiny_settings(tmp_path / "one", tiny, database_url=url)) as one:
        running = start(one, "w", training_config=RUN | LONG)["job_id"]
        queued = start(one, "v", training_config=SHORT)["job_id"]
        until(one, running, lambda job: job["progress"]["step"] > 3)
        with serve(tiny_settings(tmp_path / "two", tiny, database_url=url)) as two:
            assert get(two, running)["status"] == "running"
            theirs = two.wait(start(two, "u", training_config=SHORT)["job_id"])
            assert theirs["status"] == "succeeded"
            assert two.state.adapters.names() == ("u",)
            assert get(two, queued)["status"] == "queued"
        call(one, running, "cancel")
        assert one.wait(queued)["status"] == "succeeded"
        assert one.state.adapters.names() == ("v",)


def test_a_home_keeps_its_id(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as first:
        job = first.wait(start(first, "w", training_config=SHORT)["job_id"])
        owner = first.state.jobs.owner
    with serve(tiny_settings(tmp_path, tiny)) as second:
        assert second.state.jobs.owner == owner
        assert second.state.jobs.get(job["job_id"]).owner == owner
