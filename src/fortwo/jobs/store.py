"""The database of jobs and their events.

This module owns every SQL statement about them; the schema is in `jobs.schema`, and is migrated when a store is opened.
It knows nothing of training: a job's plan, report and error are JSON to it. All methods may be called from any thread.
A write transaction begins with its write and never with a read, so that two writers of SQLite wait for each other
instead of failing.

Several servers, each with its own home, may share a database. A job belongs to the server that took it (`owner`), whose
home has its files; no other server runs it. While it runs, its server renews the lease (`lease_until`). When the lease
has expired, that server is taken to be gone, and the job counts as interrupted.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.orm import Session

from fortwo.errors import Conflict, InvalidDataset, NotFound
from fortwo.jobs.database import connect, errors_of, upgrade
from fortwo.jobs.schema import EventRow, FileRow, JobRow
from fortwo.records import Json

Status = Literal["queued", "preparing", "running", "evaluating", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
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


@dataclass(frozen=True)
class Job:
    """One training job. Times are Unix seconds. queued_at, which changes when the job is resumed, orders the queue.
    owner: the id of the home whose server runs it. fine_tuning: what OpenAI's API was asked for, if it made the job."""

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
    fine_tuning: Json | None

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
        try:
            upgrade(self._engine, database_url)
            with self.transaction() as session:  # jobs of before there were owners
                session.execute(update(JobRow).where(JobRow.owner.is_(None)).values(owner=owner))
        except BaseException:
            self.close()
            raise

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
    def reading(self) -> Iterator[Session]:
        with errors_of(self._engine), Session(self._engine) as session:
            yield session

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with errors_of(self._engine), Session(self._engine) as session, session.begin():
            yield session

    def create(
        self,
        *,
        model: str,
        adapter_name: str,
        dataset: Json,
        plan: Json,
        progress: Json,
        fine_tuning: Json | None = None,
        file_ids: Mapping[str, str] = MappingProxyType({}),
        also: Callable[[Session, Job], None] = lambda _session, _job: None,
    ) -> Job:
        """Store a new job at the end of the queue. file_ids: the uploaded files that it reads, by the field of the
        request that names each; also: called in the same transaction. Raises InvalidDataset when one of the files has
        just been deleted."""
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
            fine_tuning=fine_tuning,
            file_ids=list(file_ids.values()) or None,
        )
        with self.transaction() as session:
            session.add(row)
            session.flush()
            session.add(_event_row(row.id, NewEvent("queued", f"Queued: {adapter_name} on {model}.")))
            for name, file_id in file_ids.items():
                file = session.get(FileRow, file_id)
                if file is None or file.deleted_at is not None:
                    raise InvalidDataset(
                        f"{name}.file_id = {file_id!r} was deleted while the job was planned",
                        param=f"{name}.file_id",
                        hint="Upload the file again.",
                    )
            job = _job(row)
            also(session, job)
        self._changed(job.id)
        return job

    def get(self, job_id: str) -> Job:
        with self.reading() as session:
            row = session.get(JobRow, job_id)
            if row is None:
                raise _unknown(job_id)
            return _job(row)

    def dataset(self, job_id: str) -> Json:
        """The dataset of a job (datasets.to_json). It is not part of Job because it may be large."""
        with self.reading() as session:
            dataset = session.execute(select(JobRow.dataset).where(JobRow.id == job_id)).scalar_one_or_none()
            if dataset is None:
                raise _unknown(job_id)
            return dataset

    def jobs(self, limit: int = 100, after: str | None = None) -> list[Job]:
        """At most `limit` jobs, the newest first. after: the id of the job behind which they begin."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        if after is not None:
            last = self.get(after)
            earlier = JobRow.created_at < last.created_at
            query = query.where(or_(earlier, and_(JobRow.created_at == last.created_at, JobRow.id > after)))
        with self.reading() as session:
            return [_job(row) for row in session.scalars(query)]

    def beginning_with(self, prefix: str) -> list[Job]:
        """This server's jobs whose ids begin with these hexadecimal digits."""
        query = select(JobRow).where(JobRow.id.startswith(prefix, autoescape=True), JobRow.owner == self.owner)
        with self.reading() as session:
            return [_job(row) for row in session.scalars(query)]

    def fine_tuned(self) -> list[Job]:
        """This server's jobs that OpenAI's API was asked for and that have published an adapter."""
        asked = JobRow.fine_tuning.is_not(None), JobRow.adapter.is_not(None), JobRow.owner == self.owner
        query = select(JobRow).where(*asked)
        with self.reading() as session:
            return [_job(row) for row in session.scalars(query)]

    def wanted_parents(self) -> set[str]:
        """The adapters, as name@version, on which jobs go on that have not succeeded and may still run."""
        query = select(JobRow.plan).where(JobRow.status != "succeeded", JobRow.owner == self.owner)
        with self.reading() as session:
            parents = {plan.get("parent") for plan in session.scalars(query)}
        return {parent for parent in parents if parent is not None}

    def next_queued(self) -> Job | None:
        """The job at the head of this server's queue, or None when the queue is empty."""
        mine = select(JobRow).where(JobRow.status == "queued", JobRow.owner == self.owner)
        query = mine.order_by(JobRow.queued_at, JobRow.id).limit(1)
        with self.reading() as session:
            row = session.scalars(query).first()
            return None if row is None else _job(row)

    def counts(self) -> dict[str, int]:
        """How many of this server's jobs there are, by status."""
        query = select(JobRow.status, func.count()).where(JobRow.owner == self.owner).group_by(JobRow.status)
        with self.reading() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def running(self) -> list[tuple[str, Json]]:
        """The id and the progress of this server's active jobs."""
        query = select(JobRow.id, JobRow.progress).where(JobRow.status.in_(ACTIVE), JobRow.owner == self.owner)
        with self.reading() as session:
            return [(id, progress) for id, progress in session.execute(query)]

    def queue(self) -> list[str]:
        """The ids of the jobs that wait in this server's queue, the next one first."""
        mine = select(JobRow.id).where(JobRow.status == "queued", JobRow.owner == self.owner)
        with self.reading() as session:
            return list(session.scalars(mine.order_by(JobRow.queued_at, JobRow.id)))

    def put_first(self, job_id: str) -> None:
        """Put a queued job at the head of this server's queue. Raises NotFound, and Conflict for a job that is not
        queued."""
        mine = select(func.min(JobRow.queued_at)).where(JobRow.status == "queued", JobRow.owner == self.owner)
        with self.reading() as session:
            earliest = session.scalar(mine)
        event = NewEvent("queued", "The job was put at the head of the queue.")
        if earliest is None or not self.update(job_id, event, when=("queued",), queued_at=earliest - 1.0):
            raise Conflict(
                f"The status of job {job_id} is {self.get(job_id).status}.",
                param="job_id",
                hint="Only a queued job can be put at the head of the queue.",
            )

    def last_actual(self, model: str) -> Json | None:
        """The measurements of the newest run on this base, or None when there is none."""
        query = select(JobRow.actual).where(JobRow.model == model, JobRow.actual.is_not(None))
        with self.reading() as session:
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
        with self.transaction() as session:
            changed = session.execute(query.returning(JobRow.id)).scalar_one_or_none()
            if changed is not None and event is not None:
                session.add(_event_row(job_id, event))
        if changed is None:
            self.get(job_id)  # raises NotFound
            return False
        self._changed(job_id)
        return True

    def append_event(self, job_id: str, event: NewEvent) -> None:
        """The row of the job is locked first, so that its events become visible in the order of their ids."""
        with self.transaction() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(status=JobRow.status))
            session.add(_event_row(job_id, event))
        self._changed(job_id)

    def events(self, job_id: str, after: int = 0, limit: int = 1000, types: Sequence[str] | None = None) -> list[Event]:
        """At most `limit` events of a job whose ids are greater than `after`, oldest first. types: of these alone."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after).order_by(EventRow.id)
        if types is not None:
            query = query.where(EventRow.type.in_(types))
        with self.reading() as session:
            return [_event(row) for row in session.scalars(query.limit(limit))]

    def newest_events(self, job_id: str, before: int | None, limit: int) -> list[Event]:
        """At most `limit` events of a job, newest first. before: only those with smaller ids."""
        query = select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.id.desc())
        if before is not None:
            query = query.where(EventRow.id < before)
        with self.reading() as session:
            return [_event(row) for row in session.scalars(query.limit(limit))]

    def news(self, job_id: str, after: int) -> tuple[Job, list[Event]]:
        """A job, and its events after `after` as `events` gives them. The job is read first, because its last event is
        written together with its last status."""
        return self.get(job_id), self.events(job_id, after)

    def renew(self) -> None:
        """Extend the leases of this server's active jobs."""
        mine = update(JobRow).where(JobRow.status.in_(ACTIVE), JobRow.owner == self.owner)
        with self.transaction() as session:
            session.execute(mine.values(lease_until=time.time() + LEASE_SECONDS))

    def abandoned(self) -> list[Job]:
        """The active jobs that nobody runs, if this server runs none: its own, and those of servers that are gone."""
        expired = or_(JobRow.lease_until.is_(None), JobRow.lease_until < time.time())
        query = select(JobRow).where(JobRow.status.in_(ACTIVE), or_(JobRow.owner == self.owner, expired))
        with self.reading() as session:
            return [_job(row) for row in session.scalars(query.order_by(JobRow.queued_at, JobRow.id))]

    def ping(self) -> None:
        """Raises DatabaseLocked or DatabaseFailed when the database cannot be read."""
        with self.reading() as session:
            session.execute(select(1))


def _not_before_start(finished: float) -> ColumnElement[float]:
    """When a job ended: not before it started, even if the clock was set back meanwhile."""
    return case((JobRow.started_at > finished, JobRow.started_at), else_=finished)


def _unknown(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}.", param="job_id", hint="GET /api/training/jobs lists the jobs.")


def _event_row(job_id: str, event: NewEvent) -> EventRow:
    return EventRow(job_id=job_id, created_at=time.time(), **vars(event))


def _event(row: EventRow) -> Event:
    return Event(row.id, row.job_id, row.created_at, row.level, row.type, row.message, row.data)  # type: ignore[arg-type]


def _job(row: JobRow) -> Job:
    return Job(**{name: getattr(row, name) for name in Job.__dataclass_fields__})
