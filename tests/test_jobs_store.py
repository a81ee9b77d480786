"""The job store: order of arrival, one-transaction changes, events, restart, threads, migrations."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import StatementError

from fortwo.errors import NotFound
from fortwo.jobs.store import Job, JobStore, NewEvent, TableBase, connect, migrations


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture
def store(url: str):
    store = JobStore(url)
    yield store
    store.close()


def create(store: JobStore, name: str = "a") -> Job:
    return store.create(model="tiny", adapter_name=name, dataset={"rows": [name]}, plan={"steps": 3}, progress={})


def test_a_job_comes_back_as_it_was_written(store: JobStore) -> None:
    job = create(store, "42")
    assert store.get(job.id) == job
    assert (job.status, job.adapter_name, job.plan, job.error) == ("queued", "42", {"steps": 3}, None)
    assert store.dataset(job.id) == {"rows": ["42"]}


def test_an_unknown_job_is_named(store: JobStore) -> None:
    for ask in (store.get, store.dataset, lambda job_id: store.update(job_id, status="failed")):
        with pytest.raises(NotFound) as caught:
            ask("nope")
        assert "'nope'" in caught.value.message
        assert caught.value.param == "job_id"


def test_turns_go_by_arrival_and_a_resumed_job_goes_to_the_end(store: JobStore) -> None:
    first, second = create(store, "a"), create(store, "b")
    assert store.next_queued() == first
    store.update(first.id, queued_at=second.queued_at + 1)
    upcoming = store.next_queued()
    assert upcoming is not None
    assert upcoming.id == second.id
    assert [job.id for job in store.jobs()] == [second.id, first.id]
    assert len(store.jobs(limit=1)) == 1


def test_the_newest_run_of_a_base_says_how_fast_it_was(store: JobStore) -> None:
    assert store.last_actual("tiny") is None
    for started, pace in ((2.0, 20), (3.0, 30), (1.0, 10)):
        store.update(create(store).id, started_at=started, actual={"tokens_per_second": pace})
    create(store)
    assert store.last_actual("tiny") == {"tokens_per_second": 30}
    assert store.last_actual("other") is None


def test_a_change_and_its_event_are_both_written_or_neither(store: JobStore) -> None:
    job = create(store)
    assert store.update(job.id, NewEvent("preparing", "go"), when=["queued"], status="preparing", started_at=5.0)
    assert not store.update(job.id, NewEvent("cancelled", "late"), when=["queued"], status="cancelled")
    after = store.get(job.id)
    assert (after.status, after.started_at) == ("preparing", 5.0)
    assert [event.type for event in store.events(job.id)] == ["queued", "preparing"]
    store.update(job.id, error={"code": "x"}, report={"score": 1})
    store.update(job.id, error=None)
    assert (store.get(job.id).error, store.get(job.id).report) == (None, {"score": 1})


def test_events_are_numbered_in_order_and_can_be_taken_up_again(store: JobStore) -> None:
    job, other = create(store), create(store)
    for step in range(5):
        store.append_event(job.id, NewEvent("step", f"step {step}", {"step": step}))
        store.append_event(other.id, NewEvent("step", "other"))
    events = store.events(job.id)
    assert [event.data.get("step") for event in events] == [None, 0, 1, 2, 3, 4]
    assert sorted({event.id for event in events}) == [event.id for event in events]
    assert store.events(job.id, after=events[2].id) == events[3:]
    assert store.events(job.id, limit=2) == events[:2]


def test_a_number_that_is_not_json_is_refused(store: JobStore) -> None:
    job = create(store)
    with pytest.raises(StatementError, match="JSON"):
        store.append_event(job.id, NewEvent("step", "loss", {"loss": float("nan")}))


def test_only_jobs_that_ran_are_interrupted_by_a_restart(store: JobStore, url: str) -> None:
    jobs = {status: create(store, status) for status in ("queued", "preparing", "running", "evaluating", "succeeded")}
    for status, job in jobs.items():
        store.update(job.id, status=status)
    again = JobStore(url)
    assert sorted(again.mark_interrupted()) == sorted(jobs[s].id for s in ("preparing", "running", "evaluating"))
    failed = again.get(jobs["running"].id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "interrupted"
    assert failed.finished_at is not None
    assert again.events(failed.id)[-1].level == "error"
    assert again.get(jobs["queued"].id).status == "queued"
    assert again.get(jobs["succeeded"].id).status == "succeeded"
    assert again.mark_interrupted() == []
    again.close()


def test_many_threads_write_at_once_and_nothing_is_lost(store: JobStore, url: str) -> None:
    job = create(store)
    second = JobStore(url)
    failures: list[BaseException] = []

    def write(target: JobStore, worker: int) -> None:
        try:
            for turn in range(25):
                target.append_event(job.id, NewEvent("step", f"{worker}/{turn}"))
                target.update(job.id, progress={"worker": worker})
                target.get(job.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(store if n % 2 else second, n)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second.close()
    assert failures == []
    assert len({event.message for event in store.events(job.id) if event.type == "step"}) == 150


def test_the_migrations_make_the_schema_that_the_code_declares(store: JobStore, url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), TableBase.metadata)
    engine.dispose()
    assert differences == []


def test_the_first_schema_is_upgraded_and_its_jobs_are_kept(url: str, tmp_path: Path) -> None:
    command.upgrade(migrations(url), "0001")
    with sqlite3.connect(tmp_path / "jobs.db") as old:
        old.execute(
            "INSERT INTO jobs (id, status, model, adapter_name, created_at, queued_at, dataset, plan, progress) "
            "VALUES ('j', 'succeeded', 'tiny', '42', 1.0, 1.0, '{}', '{\"steps\": 15}', '{}')"
        )
        old.execute(
            "INSERT INTO events (job_id, created_at, level, type, message, data) "
            "VALUES ('j', 2.0, 'info', 'step', 'one', '{}')"
        )
    old.close()
    store = JobStore(url)
    assert store.get("j").plan == {"steps": 15}
    assert [event.message for event in store.events("j")] == ["one"]
    store.close()
