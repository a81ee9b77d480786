"""Jobs and their events in a database: what was asked, planned, done and found.

Owns the schema (brought up to date when a store is opened) and every SQL statement. Knows nothing of training:
a job's request, plan, report and error are JSON to it. Safe from any thread. A write transaction opens with its
write, never with a read, so that SQLite has no read lock to upgrade and two writers queue instead of failing.
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
    "hint": "Resume the job: it goes on from its last checkpoint.",
}


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {Json: JSON(none_as_null=True), float: Double}


class JobRow(Base):
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


class EventRow(Base):
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
    """One training run. Times are Unix seconds; queued_at moves when the job is resumed and fixes whose turn it is."""

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
    def at_rest(self) -> bool:
        """Nothing more happens to it unless it is asked for."""
        return self.ended or self.status == "paused"


@dataclass(frozen=True)
class Note:
    """An event to be: the store gives it its number and its time."""

    type: str
    message: str
    data: Json = field(default_factory=dict)
    level: Level = "info"


@dataclass(frozen=True)
class Event:
    """What happened to a job. Numbers grow in the order of events and are never used twice."""

    id: int
    job_id: str
    created_at: float
    level: Level
    type: str
    message: str
    data: Json


def migrations(database_url: str) -> Config:
    """Alembic's configuration: the migrations travel inside the package, so no file beside it is needed."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    return config


def connect(database_url: str) -> Engine:
    """An engine; SQLite gets a write-ahead log, foreign keys and patience with a writer at work."""
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
    """All jobs of one database."""

    def __init__(self, database_url: str) -> None:
        self._engine = connect(database_url)
        config = migrations(database_url)
        with self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()

    def create(self, *, model: str, adapter_name: str, dataset: Json, plan: Json, progress: Json) -> Job:
        """A new job, queued behind all others."""
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
            session.add(_event(row.id, Note("queued", f"Queued: {adapter_name} on {model}.")))
            return _job(row)

    def get(self, job_id: str) -> Job:
        with Session(self._engine) as session:
            row = session.get(JobRow, job_id)
            if row is None:
                raise _unknown(job_id)
            return _job(row)

    def dataset(self, job_id: str) -> Json:
        """The rows a job was given, kept apart from Job because they may be many."""
        with Session(self._engine) as session:
            found = session.execute(select(JobRow.dataset).where(JobRow.id == job_id)).scalar_one_or_none()
            if found is None:
                raise _unknown(job_id)
            return found

    def jobs(self, limit: int = 100) -> list[Job]:
        """The newest first."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        with Session(self._engine) as session:
            return [_job(row) for row in session.scalars(query)]

    def next_queued(self) -> Job | None:
        """Whose turn it is."""
        query = select(JobRow).where(JobRow.status == "queued").order_by(JobRow.queued_at, JobRow.id).limit(1)
        with Session(self._engine) as session:
            row = session.scalars(query).first()
            return None if row is None else _job(row)

    def last_actual(self, model: str) -> Json | None:
        """What the newest run on this base really took."""
        query = select(JobRow.actual).where(JobRow.model == model, JobRow.actual.is_not(None))
        with Session(self._engine) as session:
            return session.scalars(query.order_by(JobRow.started_at.desc()).limit(1)).first()

    def update(self, job_id: str, note: Note | None = None, *, when: Iterable[Status] = (), **changes: Any) -> bool:
        """Change fields of a job and append an event, both or neither.

        when: statuses in which the change is allowed (empty: any). False, and nothing is written, in another one.
        """
        allowed = tuple(when)
        changed = update(JobRow).where(JobRow.id == job_id).values(**changes)
        if allowed:
            changed = changed.where(JobRow.status.in_(allowed))
        with Session(self._engine) as session, session.begin():
            touched = session.execute(changed.returning(JobRow.id)).scalar_one_or_none()
            if touched is not None and note is not None:
                session.add(_event(job_id, note))
        if touched is None:
            self.get(job_id)
        return touched is not None

    def append_event(self, job_id: str, note: Note) -> None:
        with Session(self._engine) as session, session.begin():
            session.add(_event(job_id, note))

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job numbered above `after`, oldest first."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after).order_by(EventRow.id)
        with Session(self._engine) as session:
            return [
                Event(row.id, row.job_id, row.created_at, row.level, row.type, row.message, row.data)  # type: ignore[arg-type]
                for row in session.scalars(query.limit(limit))
            ]

    def mark_interrupted(self) -> list[str]:
        """For the start of a server: jobs that ran when the last one died are failed. Their ids."""
        query = (
            update(JobRow)
            .where(JobRow.status.in_(ACTIVE))
            .values(status="failed", error=INTERRUPTED, finished_at=time.time())
            .returning(JobRow.id)
        )
        with Session(self._engine) as session, session.begin():
            ids = list(session.scalars(query))
            for job_id in ids:
                session.add(_event(job_id, Note("failed", INTERRUPTED["message"], {"error": INTERRUPTED}, "error")))
        return ids


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}.", param="job_id", hint="GET /api/training/jobs lists the jobs.")


def _event(job_id: str, note: Note) -> EventRow:
    return EventRow(
        job_id=job_id,
        created_at=time.time(),
        level=note.level,
        type=note.type,
        message=note.message,
        data=note.data,
    )


def _job(row: JobRow) -> Job:
    return Job(**{name: getattr(row, name) for name in Job.__dataclass_fields__})
