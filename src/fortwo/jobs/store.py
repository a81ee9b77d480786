"""The database of jobs and their events.

This module owns the schema, which is migrated when a store is opened, and every SQL statement. It knows nothing of
training: a job's plan, report and error are JSON to it. All methods may be called from any thread. A write transaction
begins with its write and never with a read, so that two writers of SQLite wait for each other instead of failing.

Several servers, each with its own home, may share a database. A job belongs to the server that took it (`owner`), whose
home has its files; no other server runs it. While it runs, its server renews the lease (`lease_until`). When the lease
has expired, that server is taken to be gone, and the job counts as interrupted.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sqlalchemy import JSON, ColumnElement, Double, ForeignKey, Index, String, Text, case, or_, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fortwo.errors import NotFound
from fortwo.jobs.database import connect, errors_of, upgrade
from fortwo.records import Json

Status = Literal["queued", "preparing", "running", "evaluating", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
ACTIVE: tuple[Status, ...] = ("preparing", "running", "evaluating")

LEASE_SECONDS = 120.0  # without a renewal; `renew` is called far more often

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
    owner: Mapped[str | None] = mapped_column(String(32))
    lease_until: Mapped[float | None]

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
    """One training job. Times are Unix seconds. queued_at, which changes when the job is resumed, orders the queue.
    owner: the id of the home whose server runs it."""

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
    owner: str | None

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


class JobStore:
    """The jobs of one database. owner: the id of this server's home. Methods that take a job's id raise NotFound when
    there is no such job. All raise DatabaseLocked or DatabaseFailed when the database refuses."""

    def __init__(self, database_url: str, owner: str = "") -> None:
        self._engine = connect(database_url)
        self.owner = owner
        self._listeners: list[Callable[[str], None]] = []
        upgrade(self._engine, database_url)
        with self._transaction() as session:  # jobs of before there were owners
            session.execute(update(JobRow).where(JobRow.owner.is_(None)).values(owner=owner))

    def close(self) -> None:
        self._engine.dispose()

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each job that this store changes, after the change, on the thread that made
        it."""
        self._listeners.append(listener)

    def _changed(self, job_id: str) -> None:
        for listener in self._listeners:
            listener(job_id)

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with errors_of(self._engine), Session(self._engine) as session:
            yield session

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with errors_of(self._engine), Session(self._engine) as session, session.begin():
            yield session

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
            owner=self.owner,
        )
        with self._transaction() as session:
            session.add(row)
            session.flush()
            session.add(_event_row(row.id, NewEvent("queued", f"Queued: {adapter_name} on {model}.")))
            job = _job(row)
        self._changed(job.id)
        return job

    def get(self, job_id: str) -> Job:
        with self._reading() as session:
            row = session.get(JobRow, job_id)
            if row is None:
                raise _unknown(job_id)
            return _job(row)

    def dataset(self, job_id: str) -> Json:
        """The dataset of a job (datasets.to_json). It is not part of Job because it may be large."""
        with self._reading() as session:
            dataset = session.execute(select(JobRow.dataset).where(JobRow.id == job_id)).scalar_one_or_none()
            if dataset is None:
                raise _unknown(job_id)
            return dataset

    def jobs(self, limit: int = 100) -> list[Job]:
        """At most `limit` jobs, the newest first."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        with self._reading() as session:
            return [_job(row) for row in session.scalars(query)]

    def next_queued(self) -> Job | None:
        """The job at the head of this server's queue, or None when the queue is empty."""
        mine = select(JobRow).where(JobRow.status == "queued", JobRow.owner == self.owner)
        query = mine.order_by(JobRow.queued_at, JobRow.id).limit(1)
        with self._reading() as session:
            row = session.scalars(query).first()
            return None if row is None else _job(row)

    def last_actual(self, model: str) -> Json | None:
        """The measurements of the newest run on this base, or None when there is none."""
        query = select(JobRow.actual).where(JobRow.model == model, JobRow.actual.is_not(None))
        with self._reading() as session:
            return session.scalars(query.order_by(JobRow.started_at.desc()).limit(1)).first()

    def update(
        self, job_id: str, event: NewEvent | None = None, *, when: Iterable[Status] = (), **changes: Any
    ) -> bool:
        """Change fields of a job and append an event, in one transaction.

        when: the statuses in which the change is allowed; empty means any. In other statuses nothing is written and
        False is returned.
        """
        allowed = tuple(when)
        if changes.get("status") in ACTIVE:
            changes |= {"owner": self.owner, "lease_until": time.time() + LEASE_SECONDS}
        if changes.get("finished_at") is not None:
            changes["finished_at"] = _not_before_start(changes["finished_at"])
        query = update(JobRow).where(JobRow.id == job_id).values(**changes)
        if allowed:
            query = query.where(JobRow.status.in_(allowed))
        with self._transaction() as session:
            changed = session.execute(query.returning(JobRow.id)).scalar_one_or_none()
            if changed is not None and event is not None:
                session.add(_event_row(job_id, event))
        if changed is None:
            self.get(job_id)  # raises NotFound
            return False
        self._changed(job_id)
        return True

    def append_event(self, job_id: str, event: NewEvent) -> None:
        with self._transaction() as session:
            session.add(_event_row(job_id, event))
        self._changed(job_id)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """At most `limit` events of a job whose ids are greater than `after`, oldest first."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after).order_by(EventRow.id)
        with self._reading() as session:
            return [
                Event(row.id, row.job_id, row.created_at, row.level, row.type, row.message, row.data)  # type: ignore[arg-type]
                for row in session.scalars(query.limit(limit))
            ]

    def news(self, job_id: str, after: int) -> tuple[Job, list[Event]]:
        """A job, and its events after `after` as `events` gives them. The job is read first, because its last event is
        written together with its last status."""
        return self.get(job_id), self.events(job_id, after)

    def renew(self) -> None:
        """Extend the leases of this server's active jobs."""
        mine = update(JobRow).where(JobRow.status.in_(ACTIVE), JobRow.owner == self.owner)
        with self._transaction() as session:
            session.execute(mine.values(lease_until=time.time() + LEASE_SECONDS))

    def abandoned(self) -> list[Job]:
        """The active jobs that nobody runs, if this server runs none: its own, and those of servers that are gone."""
        expired = or_(JobRow.lease_until.is_(None), JobRow.lease_until < time.time())
        query = select(JobRow).where(JobRow.status.in_(ACTIVE), or_(JobRow.owner == self.owner, expired))
        with self._reading() as session:
            return [_job(row) for row in session.scalars(query.order_by(JobRow.queued_at, JobRow.id))]

    def ping(self) -> None:
        """Raises DatabaseLocked or DatabaseFailed when the database cannot be read."""
        with self._reading() as session:
            session.execute(select(1))


def _not_before_start(finished: float) -> ColumnElement[float]:
    """When a job ended: not before it started, even if the clock was set back meanwhile."""
    return case((JobRow.started_at > finished, JobRow.started_at), else_=finished)


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}.", param="job_id", hint="GET /api/training/jobs lists the jobs.")


def _event_row(job_id: str, event: NewEvent) -> EventRow:
    return EventRow(job_id=job_id, created_at=time.time(), **vars(event))


def _job(row: JobRow) -> Job:
    return Job(**{name: getattr(row, name) for name in Job.__dataclass_fields__})
