"""The job store: order of arrival, one-transaction changes, events, restart, threads, migrations."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.event import listen, listens_for, remove
from sqlalchemy.exc import StatementError

from fortwo.errors import InvalidRequest, NotFound
from fortwo.jobs.database import DatabaseFailed, DatabaseLocked, connect, migrations, newest_revision
from fortwo.jobs.schema import TableBase
from fortwo.jobs.store import LEASE_SECONDS, Job, JobStore, NewEvent


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


def test_only_jobs_that_ran_are_abandoned_at_a_restart(store: JobStore, url: str) -> None:
    jobs = {status: create(store, status) for status in ("queued", "preparing", "running", "evaluating", "succeeded")}
    for status, job in jobs.items():
        store.update(job.id, status=status)
    again = JobStore(url)
    assert [job.id for job in again.abandoned()] == [jobs[s].id for s in ("preparing", "running", "evaluating")]
    again.close()


def test_parents_are_wanted_until_their_jobs_have_succeeded(store: JobStore) -> None:
    jobs = {status: create(store, status) for status in ("queued", "failed", "succeeded")}
    for status, job in jobs.items():
        store.update(job.id, status=status, plan={**job.plan, "parent": f"{status}@1"})
    create(store, "alone")
    assert store.wanted_parents() == {"queued@1", "failed@1"}


def test_servers_that_share_a_database_leave_each_others_jobs_alone(tmp_path: Path, url: str) -> None:
    first, second = JobStore(url, "first"), JobStore(url, "second")
    running, queued = create(first, "a"), create(first, "b")
    first.update(running.id, status="running")
    assert second.next_queued() is None
    assert second.beginning_with(running.id[:8]) == []
    assert [job.id for job in first.beginning_with(running.id[:8])] == [running.id]
    assert second.abandoned() == []
    found = first.next_queued()
    assert found is not None
    assert found.id == queued.id
    with sqlite3.connect(tmp_path / "jobs.db") as database:  # the first server stopped renewing its lease long ago
        database.execute("UPDATE jobs SET lease_until = lease_until - ?", (2 * LEASE_SECONDS,))
    assert [job.id for job in second.abandoned()] == [running.id]
    first.renew()
    assert second.abandoned() == []
    first.close()
    second.close()


def test_a_job_of_before_there_were_owners_gets_the_first_server_that_starts(url: str, tmp_path: Path) -> None:
    command.upgrade(migrations(url), "0001")
    with sqlite3.connect(tmp_path / "jobs.db") as old:
        old.execute(
            "INSERT INTO jobs (id, status, model, adapter_name, created_at, queued_at, dataset, plan, progress) "
            "VALUES ('j', 'queued', 'tiny', '42', 1.0, 1.0, '{}', '{}', '{}')"
        )
    old.close()
    store = JobStore(url, "first")
    other = JobStore(url, "second")
    assert store.next_queued() == store.get("j")
    assert other.next_queued() is None
    store.close()
    other.close()


def test_a_change_is_told_after_it_was_stored(store: JobStore) -> None:
    told: list[tuple[str, int]] = []
    store.listen(lambda job_id: told.append((job_id, len(store.events(job_id)))))
    job = create(store)
    store.append_event(job.id, NewEvent("step", "one"))
    store.update(job.id, NewEvent("preparing", "go"), status="preparing")
    store.update(job.id, NewEvent("cancelled", "late"), when=["queued"], status="cancelled")  # nothing changes
    assert told == [(job.id, 1), (job.id, 2), (job.id, 3)]


def test_a_job_never_ends_before_it_started(store: JobStore) -> None:
    job = create(store)
    store.update(job.id, status="running", started_at=5000.0)
    store.update(job.id, status="failed", finished_at=10.0)  # the clock was set back
    assert store.get(job.id).finished_at == 5000.0
    store.update(job.id, finished_at=6000.0)
    assert store.get(job.id).finished_at == 6000.0
    store.update(job.id, finished_at=None)
    assert store.get(job.id).finished_at is None


def test_a_locked_database_is_named_and_may_be_tried_again(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fortwo.jobs.database.LOCK_SECONDS", 0.05)
    job = create(store)
    store._engine.dispose()  # its connections wait longer
    with sqlite3.connect(tmp_path / "jobs.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseLocked, match=r"jobs\.db") as caught:
            store.append_event(job.id, NewEvent("step", "one"))
        assert (caught.value.status, caught.value.retry_after is not None) == (503, True)
        assert store.get(job.id) == job  # reading works
        other.rollback()
    store.append_event(job.id, NewEvent("step", "one"))


def test_a_full_disk_is_named(store: JobStore) -> None:
    job = create(store)
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    store._engine.dispose()

    @listens_for(store._engine, "connect")
    def _limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(DatabaseFailed, match=r"jobs\.db.*full") as caught:
        store.append_event(job.id, NewEvent("step", "x" * 100_000))
    assert caught.value.status == 507
    assert "space" in (caught.value.hint or "")
    assert [event.type for event in store.events(job.id)] == ["queued"]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:6000])


def _garble_header(file: Path) -> None:
    file.write_bytes(b"not a database at all" * 50 + file.read_bytes()[1050:])


def _garble_pages(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096 * 2 : 4096 * 6] = b"\xa5" * (4096 * 4)
    file.write_bytes(content)


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _newer(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()


@pytest.mark.parametrize("damage", [_cut, _garble_header, _garble_pages, _directory, _newer])
def test_a_database_that_cannot_be_used_is_refused_at_the_start(
    url: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = JobStore(url)
    for n in range(20):
        create(store, "x" * 2000 + str(n))
    store.close()
    damage(tmp_path / "jobs.db")
    with pytest.raises(DatabaseFailed, match=r"jobs\.db") as caught:
        JobStore(url)
    assert caught.value.hint


@pytest.mark.parametrize("wrong", ["fortwo.db", "nothing://x", "sqlite:///{folder}/file/jobs.db"])
def test_a_url_that_cannot_be_used_is_refused(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((InvalidRequest, DatabaseFailed)) as caught:
        JobStore(wrong.format(folder=tmp_path))
    assert caught.value.hint


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


def test_a_migration_that_is_killed_at_any_statement_is_done_at_the_next_start(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    killed = 0
    for statement in range(1, 100):
        url = f"sqlite:///{tmp_path / f'{statement}.db'}"
        command.upgrade(migrations(url), "0001")
        seen = 0

        def end(*_: object, statement: int = statement) -> None:
            nonlocal seen
            seen += 1
            if seen == statement:
                raise Killed

        listen(Engine, "after_cursor_execute", end)
        try:
            JobStore(url).close()
        except Killed:
            killed += 1
        finally:
            remove(Engine, "after_cursor_execute", end)
        JobStore(url).close()
        if seen < statement:
            break
    assert killed > 10


def test_the_newest_revision_is_the_one_that_alembic_ends_at(url: str) -> None:
    assert newest_revision() == ScriptDirectory.from_config(migrations(url)).get_current_head()


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
