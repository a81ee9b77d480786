"""The database on a real PostgreSQL: the schema, what stores promise, a whole job, and a server that goes away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import PASSWORD, Postgres, running
from serving import serve, tiny_settings
from sqlalchemy.orm import Session

from fortwo.errors import Conflict, InvalidRequest
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.jobs.backup import backup
from fortwo.jobs.database import DatabaseFailed, DatabaseLocked, connect, migrations
from fortwo.jobs.idempotency import AnswerStore, Key
from fortwo.jobs.restore import restore
from fortwo.jobs.schema import TableBase
from fortwo.jobs.store import Job, JobStore, NewEvent
from fortwo.settings import Settings
from tests.test_resume import RUN, call, until
from tests.test_server_training import events, get, start

pytestmark = pytest.mark.slow
OLD_JOB = (
    "INSERT INTO jobs (id, status, model, adapter_name, created_at, queued_at, dataset, plan, progress, error) "
    """VALUES ('j', 'failed', 'tiny', '42', 1.0, 1.0, '{}', '{"steps": 3}', '{}', '{"code": "x"}')"""
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as found:
        yield found


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    found = JobStore(url, "here")
    yield found
    found.close()


def create(store: JobStore, name: str = "a", **more: Any) -> Job:
    return store.create(model="tiny", adapter_name=name, dataset={"rows": [name]}, plan={}, progress={}, **more)


def test_the_first_schema_is_upgraded_with_its_rows_to_what_the_code_says(postgres: Postgres, url: str) -> None:
    command.upgrade(migrations(url), "0001")
    postgres.admin(OLD_JOB, url.rpartition("/")[2])
    store = JobStore(url, "here")
    job = store.get("j")
    assert (job.owner, job.plan, job.error, job.report) == ("here", {"steps": 3}, {"code": "x"}, None)
    store.close()
    engine = connect(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), TableBase.metadata) == []
    engine.dispose()
    command.downgrade(migrations(url), "base")
    command.upgrade(migrations(url), "head")


def test_servers_that_start_together_make_the_schema_once(url: str) -> None:
    failed: list[BaseException] = []

    def open_store(owner: int) -> None:
        try:
            JobStore(url, str(owner)).close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=open_store, args=(owner,)) for owner in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_jobs_and_events_are_as_on_sqlite(store: JobStore) -> None:
    first, second = create(store, "a \u2028 \U0001f600"), create(store, "b")
    assert store.get(first.id) == first
    assert store.next_queued() == first
    assert [job.id for job in store.jobs(limit=1, after=second.id)] == [first.id]
    assert [job.id for job in store.beginning_with(first.id[:8])] == [first.id]
    assert store.update(first.id, NewEvent("preparing", "go"), when=["queued"], status="preparing")
    assert not store.update(first.id, NewEvent("cancelled", "late"), when=["queued"], status="cancelled")
    store.append_event(first.id, NewEvent("note", "a \x00 in a text", {"text": "\x00"}))
    assert store.events(first.id)[-1].data == {"text": "\x00"}
    store.update(first.id, error={"code": "x"}, report={"score": 1.5})
    store.update(first.id, error=None)
    assert (store.get(first.id).error, store.get(first.id).report) == (None, {"score": 1.5})
    assert [event.type for event in store.events(first.id)] == ["queued", "preparing", "note"]
    store.put_first(second.id)
    assert store.queue() == [second.id]
    assert store.counts() == {"preparing": 1, "queued": 1}


def test_what_two_writers_note_becomes_visible_in_the_order_of_its_ids(store: JobStore, url: str) -> None:
    """A reader that has seen an event never misses one with a smaller id."""
    job, other = create(store), JobStore(url, "here")
    done = threading.Event()

    def write(into: JobStore) -> None:
        for n in range(60):
            into.append_event(job.id, NewEvent("step", str(n)))

    threads = [threading.Thread(target=write, args=(one,)) for one in (store, other, store)]
    for thread in threads:
        thread.start()
    seen, last = [], 0
    while not done.is_set():
        if not any(thread.is_alive() for thread in threads):
            done.set()
        for event in store.events(job.id, last):
            seen.append(event.id)
            last = event.id
    other.close()
    assert seen == [event.id for event in store.events(job.id)]
    assert len(seen) == 1 + 3 * 60


def test_a_key_makes_one_job_however_often_it_is_sent_at_once(store: JobStore) -> None:
    answers, key = AnswerStore(store), Key("k", "POST /api/training/start", "d")
    got: list[Any] = []

    def ask() -> None:
        got.append(answers.once(key, lambda also: create(store, also=also), lambda job: {"id": job.id}))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 5
    assert len({answer["id"] for answer in got}) == len(store.jobs()) == 1


def test_api_keys_are_found_and_have_one_name(store: JobStore) -> None:
    keys = ApiKeyStore(store)
    key = keys.create("ci", ["read"])
    with pytest.raises(Conflict):
        keys.create("ci", ["chat"])
    found = keys.find(key)
    assert found is not None
    assert found.scopes == ("read",)
    keys.revoke("ci")
    assert keys.find(key) is None


def test_errors_say_what_to_do_and_never_have_the_password(postgres: Postgres, url: str) -> None:
    name = url.rpartition("/")[2]
    postgres.admin("CREATE ROLE weak LOGIN PASSWORD 'weak'")
    wrong = {
        postgres.url(name, password="wrong-secret"): (DatabaseLocked, DatabaseFailed),
        postgres.url("missing"): (DatabaseLocked, DatabaseFailed),
        postgres.url(name, user="weak", password="weak"): DatabaseFailed,
        f"postgresql+nothing://admin:{PASSWORD}@h/d": InvalidRequest,
    }
    for one, expected in wrong.items():
        with pytest.raises(expected) as caught:
            JobStore(one)
        said = f"{caught.value} {caught.value.hint}"
        assert caught.value.hint
        for password in (PASSWORD, "wrong-secret", ":weak@"):
            assert password not in said


def test_a_server_that_goes_away_and_comes_back_is_used_again(postgres: Postgres, store: JobStore) -> None:
    job = create(store)
    postgres.stop()
    try:
        with pytest.raises(DatabaseLocked) as caught:
            store.get(job.id)
        assert caught.value.status == 503
    finally:
        postgres.start()
    assert store.get(job.id) == job


def test_a_row_that_another_program_holds_is_not_waited_for_without_end(
    store: JobStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create(store)
    monkeypatch.setattr("fortwo.jobs.database.LOCK_SECONDS", 1)
    hasty = JobStore(url, "here")
    with Session(store._engine) as session, session.begin():
        session.execute(TableBase.metadata.tables["jobs"].update().values(status="queued"))
        with pytest.raises(DatabaseLocked):
            hasty.append_event(job.id, NewEvent("step", "one"))
    hasty.append_event(job.id, NewEvent("step", "one"))
    hasty.close()


def test_a_job_is_paused_survives_restarts_and_is_published(
    postgres: Postgres, url: str, tiny: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tmp_path, tiny, database_url=url)
    with serve(settings) as served:
        job_id = start(served, "on-postgres", training_config=RUN)["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] >= 2)
        step = call(served, job_id, "pause")["progress"]["step"]
    assert not (tmp_path / "fortwo.db").exists()
    postgres.stop()
    postgres.start()
    with serve(settings) as served:
        assert get(served, job_id)["status"] == "paused"
        call(served, job_id, "resume")
        until(served, job_id, lambda job: job["progress"]["step"] > step)
        postgres.stop()  # while the job runs: it goes on, and is recorded when the database is back
        postgres.start()
        job = served.wait(job_id, seconds=120)
        assert job["status"] == "succeeded", job["error"]
        steps = [event["data"]["step"] for event in events(served, job_id) if event["type"] == "step"]
        assert steps == list(range(1, RUN["max_steps"] + 1))
        assert served.chat(model="on-postgres").status_code == 200
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT status FROM jobs").fetchall() == [("succeeded",)]


def test_what_pg_dump_wrote_comes_back(postgres: Postgres, store: JobStore, url: str) -> None:
    job, other = create(store), postgres.database()
    dump = str(postgres.folder / "dump")
    postgres.run("pg_dump", "--format=custom", f"--file={dump}", url.replace("+psycopg", ""))
    postgres.run("pg_restore", f"--dbname={other.replace('+psycopg', '')}", dump)
    restored = JobStore(other, "here")
    assert restored.jobs() == [job]
    assert create(restored).owner == "here"
    restored.append_event(job.id, NewEvent("step", "one"))  # ids go on behind those that were restored
    assert [event.type for event in restored.events(job.id)] == ["queued", "step"]
    restored.close()


def test_a_backup_says_how_the_database_is_backed_up(url: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", database_url=url)
    for refused in (lambda: backup(settings, tmp_path / "b"), lambda: restore(settings, tmp_path / "b")):
        with pytest.raises(InvalidRequest) as caught:
            refused()
        assert "pg_dump" in (caught.value.hint or "")
        assert PASSWORD not in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "b").exists()
