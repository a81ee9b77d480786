"""API keys: each has a name, scopes and limits. Only the SHA-256 of a key is stored.

A key is 256 random bits, so its hash needs neither salt nor stretching: nobody can try them all. All servers that share
the database accept its keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from fortwo import disk
from fortwo.errors import Conflict, InvalidRequest, NotFound, all_of
from fortwo.jobs.schema import ApiKeyRow
from fortwo.jobs.store import JobStore

PREFIX = "fortwo_"  # by which people, and programs that look for leaked secrets, recognise a key
KEY_BYTES = 32
LONGEST_NAME = 64
MOST = 1_000_000  # of a limit
READ, CHAT, TRAIN, ADMIN = "read", "chat", "train", "admin"
SCOPES = {
    READ: "lists, states, reports, events and metrics",
    CHAT: "replies, embeddings and tokens",
    TRAIN: "datasets, uploaded files, jobs and exports",
    ADMIN: "everything, also what is loaded and deleted",
}


@dataclass(frozen=True)
class ApiKey:
    """digest: SHA-256 of the key, in hexadecimal digits. requests_per_minute, concurrent: None for no limit.
    created_at: Unix seconds."""

    name: str
    digest: str
    scopes: tuple[str, ...]
    requests_per_minute: int | None
    concurrent: int | None
    created_at: float

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or ADMIN in self.scopes


class ApiKeyStore:
    """The keys of a database. All methods raise DatabaseLocked or DatabaseFailed when the database refuses."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def create(
        self, name: str, scopes: Sequence[str], requests_per_minute: int | None = None, concurrent: int | None = None
    ) -> str:
        """A new key, which cannot be read again. Raises InvalidRequest with everything that is wrong, and Conflict when
        there is a key of this name."""
        if found := _findings(name, scopes, {"requests_per_minute": requests_per_minute, "concurrent": concurrent}):
            raise all_of(found)
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        row = ApiKeyRow(
            name=name,
            digest=_digest(key),
            scopes=[scope for scope in SCOPES if scope in scopes],
            requests_per_minute=requests_per_minute,
            concurrent=concurrent,
            created_at=time.time(),
        )
        try:
            with self._store.transaction() as session:
                session.add(row)
        except IntegrityError:
            raise Conflict(
                f"There already is a key {name!r}.",
                param="name",
                hint=f"Choose another name, or first run: fortwo keys revoke {name}",
            ) from None
        return key

    def all(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        with self._store.reading() as session:
            return [_key(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at))]

    def find(self, key: str) -> ApiKey | None:
        """The stored key that this text is, if it is one and was not revoked."""
        digest = _digest(key)
        with self._store.reading() as session:
            row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.digest == digest)).first()
            return _key(row) if row is not None and hmac.compare_digest(row.digest, digest) else None

    def revoke(self, name: str) -> None:
        """Forget a key. Raises NotFound, which lists the names."""
        with self._store.transaction() as session:
            gone = session.execute(delete(ApiKeyRow).where(ApiKeyRow.name == name).returning(ApiKeyRow.name)).first()
        if gone is None:
            names = ", ".join(key.name for key in self.all())
            raise NotFound(
                f"There is no key {name!r}.",
                param="name",
                hint=f"There are: {names}." if names else "There are no keys.",
            )


def _findings(name: str, scopes: Sequence[str], limits: dict[str, int | None]) -> list[InvalidRequest]:
    found = []
    if len(name) > LONGEST_NAME or not disk.NAME.fullmatch(name):
        found.append(
            InvalidRequest(
                f"name = {name!r} is not allowed.",
                param="name",
                hint=f"Use up to {LONGEST_NAME} letters, digits, '.', '_' and '-', a letter or digit first, no '..'.",
            )
        )
    known = f"The scopes are {', '.join(SCOPES)}."
    if not scopes:
        found.append(InvalidRequest("The key has no scope.", param="scope", hint=known))
    unknown = [scope for scope in scopes if scope not in SCOPES]
    found += [InvalidRequest(f"scope = {scope!r} does not exist.", param="scope", hint=known) for scope in unknown]
    for param, limit in limits.items():
        if limit is not None and not 1 <= limit <= MOST:
            found.append(
                InvalidRequest(f"{param} = {limit} is not allowed.", param=param, hint=f"Give 1 to {MOST}, or nothing.")
            )
    return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: ApiKeyRow) -> ApiKey:
    return ApiKey(row.name, row.digest, tuple(row.scopes), row.requests_per_minute, row.concurrent, row.created_at)
