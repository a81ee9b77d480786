"""The database of jobs and their events.

This module owns the schema, which is migrated when a store is opened, and every SQL statement. It knows nothing of
training: a job's plan, report and error are JSON to it. All methods may be called from any thread. A write transaction
begins with its write and never with a read, so that two writers of SQLite wait for each other instead of failing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, Double, Engine, ForeignKey, Index, String, Text, create_engine, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fortwo.errors import NotFound
from fortwo.records import Json

Status = Literal["queued", "preparing", "running", "evaluating", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
ACTIVE: tuple[Status, ...] = ("preparing", "running", "evaluating")

INTERRUPTED: Json = {
    "message": "This job was interrupted: the server stopped while it ran.",
    "type": "server_error",
    "code": "interrupted",
    "param": None,
    "hint": "Resume the job: it continues from its last checkpoint.",
}


class TableBase(DeclarativeBase):
    type_annotation_map: ClassVar = {Json: JSON(none_as_null=True), float: Double}


class JobRow(TableBase):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    status: Mapped[str] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(Text)
    adapter_name: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float]
    queued_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    dataset: Mapped[Json] = mapped_column(deferred=True)
    plan: Mapped[Json]
    progress: Mapped[Json]
    actual: Mapped[Json | None]
    report: Mapped[Json | None]
    adapter: Mapped[Json | None]
    error: Mapped[Json | None]

    __table_args__ = (Index("jobs_by_status", "status", "queued_at"),)


class EventRow(TableBase):
    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json]

    __table_args__ = (Index("events_by_job", "job_id", "id"), {"sqlite_autoincrement": True})


@dataclass(frozen=True)
class Job:
    """One training job. Times are Unix seconds. queued_at, which changes when the job is resumed, orders the queue."""

    id: str
    status: Status
    model: str
    adapter_name: str
    created_at: float
    queued_at: float
    started_at: float | None
    finished_at: float | None
    plan: Json
    progress: Json
    actual: Json | None
    report: Json | None
    adapter: Json | None
    error: Json | None

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def ended_or_paused(self) -> bool:
        """Nothing more happens to the job unless a user asks for it."""
        return self.ended or self.status == "paused"


@dataclass(frozen=True)
class NewEvent:
    """An event to store; the database gives it its number and its time."""

    type: str
    message: str
    data: Json = field(default_factory=dict)
    level: Level = "info"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. Ids grow in the order of the events and are never used twice."""

    id: int
    job_id: str
    created_at: float
    level: Level
    type: str
    message: str
    data: Json


def migrations(database_url: str) -> Config:
    """Alembic's configuration. The migrations are part of the package, so that no alembic.ini is needed."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    return config


def connect(database_url: str) -> Engine:
    """An engine. SQLite gets a write-ahead log, foreign keys, and waits up to 30 seconds for another writer."""
    engine = create_engine(database_url, json_serializer=partial(json.dumps, allow_nan=False))
    if engine.dialect.name == "sqlite":
        if engine.url.database:
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(engine, "connect")
        def _prepare(connection: Any, _record: Any) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


class JobStore:
    """The jobs of one database. Methods that take a job's id raise NotFound when there is no such job."""

    def __init__(self, database_url: str) -> None:
        self._engine = connect(database_url)
        config = migrations(database_url)
        with self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()

    def create(self, *, model: str, adapter_name: str, dataset: Json, plan: Json, progress: Json) -> Job:
        """Store a new job at the end of the queue."""
        now = time.time()
        row = JobRow(
            id=str(uuid.uuid4()),
            status="queued",
            model=model,
            adapter_name=adapter_name,
            created_at=now,
            queued_at=now,
            dataset=dataset,
            plan=plan,
            progress=progress,
        )
        with Session(self._engine) as session, session.begin():
            session.add(row)
            session.flush()
            session.add(_event_row(row.id, NewEvent("queued", f"Queued: {adapter_name} on {model}.")))
            return _job(row)

    def get(self, job_id: str) -> Job:
        with Session(self._engine) as session:
            row = session.get(JobRow, job_id)
            if row is None:
                raise _unknown(job_id)
            return _job(row)

    def dataset(self, job_id: str) -> Json:
        """The dataset of a job (datasets.to_json). It is not part of Job because it may be large."""
        with Session(self._engine) as session:
            dataset = session.execute(select(JobRow.dataset).where(JobRow.id == job_id)).scalar_one_or_none()
            if dataset is None:
                raise _unknown(job_id)
            return dataset

    def jobs(self, limit: int = 100) -> list[Job]:
        """At most `limit` jobs, the newest first."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        with Session(self._engine) as session:
            return [_job(row) for row in session.scalars(query)]

    def next_queued(self) -> Job | None:
        """The job at the head of the queue, or None when the queue is empty."""
        query = select(JobRow).where(JobRow.status == "queued").order_by(JobRow.queued_at, JobRow.id).limit(1)
        with Session(self._engine) as session:
            row = session.scalars(query).first()
            return None if row is None else _job(row)

    def last_actual(self, model: str) -> Json | None:
        """The measurements of the newest run on this base, or None when there is none."""
        query = select(JobRow.actual).where(JobRow.model == model, JobRow.actual.is_not(None))
        with Session(self._engine) as session:
            return session.scalars(query.order_by(JobRow.started_at.desc()).limit(1)).first()

    def update(
        self, job_id: str, event: NewEvent | None = None, *, when: Iterable[Status] = (), **changes: Any
    ) -> bool:
        """Change fields of a job and append an event, in one transaction.

        when: the statuses in which the change is allowed; empty means any. In other statuses nothing is written and
        False is returned.
        """
        allowed = tuple(when)
        query = update(JobRow).where(JobRow.id == job_id).values(**changes)
        if allowed:
            query = query.where(JobRow.status.in_(allowed))
        with Session(self._engine) as session, session.begin():
            changed = session.execute(query.returning(JobRow.id)).scalar_one_or_none()
            if changed is not None and event is not None:
                session.add(_event_row(job_id, event))
        if changed is None:
            self.get(job_id)  # raises NotFound
        return changed is not None

    def append_event(self, job_id: str, event: NewEvent) -> None:
        with Session(self._engine) as session, session.begin():
            session.add(_event_row(job_id, event))

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most `limit` events of a job whose ids are greater than `after`, oldest first."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after).order_by(EventRow.id)
        with Session(self._engine) as session:
            return [
                Event(row.id, row.job_id, row.created_at, row.level, row.type, row.message, row.data)  # type: ignore[arg-type]
                for row in session.scalars(query.limit(limit))
            ]

    def mark_interrupted(self) -> list[str]:
        """Mark all jobs that are still active as failed, because the server that ran them died. Returns their ids."""
        query = (
            update(JobRow)
            .where(JobRow.status.in_(ACTIVE))
            .values(status="failed", error=INTERRUPTED, finished_at=time.time())
            .returning(JobRow.id)
        )
        with Session(self._engine) as session, session.begin():
            ids = list(session.scalars(query))
            for job_id in ids:
                session.add(
                    _event_row(job_id, NewEvent("failed", INTERRUPTED["message"], {"error": INTERRUPTED}, "error"))
                )
        return ids


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}.", param="job_id", hint="GET /api/training/jobs lists the jobs.")


def _event_row(job_id: str, event: NewEvent) -> EventRow:
    return EventRow(job_id=job_id, created_at=time.time(), **vars(event))


def _job(row: JobRow) -> Job:
    return Job(**{name: getattr(row, name) for name in Job.__dataclass_fields__})
