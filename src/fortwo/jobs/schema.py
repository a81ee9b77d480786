"""The tables of the database. A change needs a migration in `jobs/migrations/versions`."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fortwo.records import Json


class WrittenText(TypeDecorator[str]):
    """Text that somebody wrote. The replacement character takes the place of NUL, which PostgreSQL cannot store."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.replace("\0", "\ufffd")


class TableBase(DeclarativeBase):
    type_annotation_map: ClassVar = {Json: JSON(none_as_null=True), list[str]: JSON(none_as_null=True), float: Double}


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
    fine_tuning: Mapped[Json | None]
    file_ids: Mapped[list[str] | None] = mapped_column(deferred=True)

    __table_args__ = (Index("jobs_by_status", "status", "queued_at"),)


class EventRow(TableBase):
    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(WrittenText)
    data: Mapped[Json]

    __table_args__ = (Index("events_by_job", "job_id", "id"), {"sqlite_autoincrement": True})


class FileRow(TableBase):
    """An uploaded file, or one of results. Its content is in the home of `owner`."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(WrittenText)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]

    __table_args__ = (Index("files_by_owner", "owner", "created_at"),)


class KeyRow(TableBase):
    """What a request with an Idempotency-Key was answered. digest: SHA-256 of what it asked for."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(32), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))
    answer: Mapped[Json]
    created_at: Mapped[float]

    __table_args__ = (Index("keys_by_age", "created_at"),)


class ApiKeyRow(TableBase):
    """A key of `fortwo keys create`. digest: SHA-256 of the key, which is stored nowhere."""

    __tablename__ = "api_keys"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    concurrent: Mapped[int | None]
    created_at: Mapped[float]

    __table_args__ = (Index("api_keys_by_digest", "digest", unique=True),)
