"""API keys: how they are stored, which scope a request needs, and their limits."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command

from fortwo.errors import Conflict, InvalidRequest, NotFound
from fortwo.jobs.api_keys import PREFIX, ApiKeyStore
from fortwo.jobs.database import migrations
from fortwo.jobs.store import JobStore
from fortwo.server.key_usage import TokenBucket
from fortwo.server.scopes import needed_scope


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield opened
    opened.close()


@pytest.fixture
def keys(store: JobStore) -> ApiKeyStore:
    return ApiKeyStore(store)


def test_a_key_is_found_until_it_is_revoked(keys: ApiKeyStore) -> None:
    first = keys.create("ci", ["train", "read"], requests_per_minute=60, concurrent=2)
    second = keys.create("phone", ["chat"])
    found = keys.find(first)
    assert found is not None
    assert (found.name, found.scopes, found.requests_per_minute, found.concurrent) == ("ci", ("read", "train"), 60, 2)
    assert [key.name for key in keys.all()] == ["ci", "phone"]
    for wrong in ("", PREFIX, first[:-1], first.lower(), f"{first} ", "fortwo_\udce9"):
        assert keys.find(wrong) is None
    keys.revoke("ci")
    assert keys.find(first) is None
    assert keys.find(second) is not None
    assert keys.find(keys.create("ci", ["read"])) is not None
    assert keys.find(first) is None
    with pytest.raises(NotFound, match="'nobody'"):
        keys.revoke("nobody")


def test_only_the_hash_is_in_the_database(keys: ApiKeyStore, tmp_path: Path) -> None:
    key = keys.create("ci", ["read"])
    assert len(key) >= len(PREFIX) + 43  # 256 bits in letters of 6 bits
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        assert database.execute("SELECT digest FROM api_keys").fetchone() == (hashlib.sha256(key.encode()).hexdigest(),)
        dump = "\n".join(database.iterdump())
    database.close()
    assert key not in dump
    assert key.removeprefix(PREFIX) not in dump


def test_everything_that_is_wrong_is_named_and_nothing_is_stored(keys: ApiKeyStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        keys.create("a b", ["read", "wirte"], requests_per_minute=0, concurrent=-1)
    for word in ("'a b'", "'wirte'", "requests_per_minute = 0", "concurrent = -1"):
        assert word in caught.value.message
    assert "read, chat, train, admin" in str(caught.value.hint)
    with pytest.raises(InvalidRequest, match="no scope"):
        keys.create("ci", [])
    assert keys.all() == []
    key = keys.create("ci", ["read"])
    with pytest.raises(Conflict, match="'ci'"):
        keys.create("ci", ["admin"])
    assert keys.find(key) == keys.all()[0]


def test_a_database_of_the_first_schema_gets_keys_and_keeps_its_jobs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    command.upgrade(migrations(url), "0001")
    with sqlite3.connect(tmp_path / "old.db") as old:
        old.execute(
            "INSERT INTO jobs (id, status, model, adapter_name, created_at, queued_at, dataset, plan, progress) "
            "VALUES ('j', 'succeeded', 'tiny', '42', 1.0, 1.0, '{}', '{}', '{}')"
        )
    old.close()
    store = JobStore(url)
    keys = ApiKeyStore(store)
    assert keys.all() == []
    assert keys.find(keys.create("ci", ["read"])) is not None
    assert store.get("j").adapter_name == "42"
    store.close()
    command.downgrade(migrations(url), "0003")
    with sqlite3.connect(tmp_path / "old.db") as old:
        assert old.execute("SELECT id FROM jobs").fetchall() == [("j",)]
    old.close()


@pytest.mark.parametrize(
    ("request_line", "scope"),
    [
        ("GET /api/models", "read"),
        ("HEAD /v1/models", "read"),
        ("GET /api/training/jobs/1/events", "read"),
        ("GET /api/adapters/42/report", "read"),
        ("GET /metrics", "read"),
        ("GET /api/tags", "read"),
        ("POST /api/show", "read"),
        ("GET /nowhere", "read"),
        ("POST /v1/chat/completions", "chat"),
        ("POST /v1/responses", "chat"),
        ("POST /v1/embeddings", "chat"),
        ("POST /api/chat", "chat"),
        ("POST /api/generate", "chat"),
        ("POST /completion", "chat"),
        ("POST /tokenize", "chat"),
        ("POST /api/training/start", "train"),
        ("POST /api/training/jobs/1/cancel", "train"),
        ("POST /api/data/preview", "train"),
        ("POST /v1/files", "train"),
        ("GET /v1/files", "read"),
        ("GET /v1/files/file-1/content", "train"),
        ("DELETE /v1/files/file-1", "train"),
        ("POST /v1/fine_tuning/jobs", "train"),
        ("POST /api/adapters/42/export", "train"),
        ("POST /api/adapters/42/export/plan", "train"),
        ("GET /api/training/jobs/1/request", "train"),
        ("GET /api/training/jobs/1/next-try", "train"),
        ("GET /api/data/hub", "train"),
        ("POST /api/facts/questions", "train"),
        ("POST /api/adapters/import", "admin"),
        ("GET /api/exports/1", "read"),
        ("GET /api/exports/1/files/a/b", "train"),
        ("GET /api/exports/1/archive", "train"),
        ("DELETE /api/exports/1", "train"),
        ("POST /api/models/tiny/load", "admin"),
        ("DELETE /api/models/tiny", "admin"),
        ("DELETE /api/adapters/42", "admin"),
        ("DELETE /api/adapters/export", "admin"),
        ("POST /api/adapters/export/load", "admin"),
        ("POST /api/adapters/42/promote", "admin"),
        ("POST /api/adapters/prune", "admin"),
        ("POST /v1/load_lora_adapter", "admin"),
        ("DELETE /api/delete", "admin"),
        ("DELETE /v1/models/42", "admin"),
        ("POST /v1/chat/completions/", "admin"),
        ("PATCH /api/anything/new", "admin"),
        ("POST /v1/files\n/x", "admin"),
    ],
)
def test_the_scope_of_a_request(request_line: str, scope: str) -> None:
    method, _, path = request_line.partition(" ")
    assert needed_scope(method, path) == scope


def test_a_bucket_lets_so_many_through_and_then_as_many_a_minute() -> None:
    bucket = TokenBucket(3, now=100.0)
    assert [bucket.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(100.0) == pytest.approx(20.0)
    assert bucket.take(110.0) == pytest.approx(10.0)
    assert bucket.take(121.0) == 0
    assert bucket.take(121.0) > 0
    assert [bucket.take(1000.0) for _ in range(4)] == [0, 0, 0, pytest.approx(20.0)]
