"""Answers of requests that must not be carried out twice: a client that got no answer sends its Idempotency-Key again.

The answer is stored in the transaction that creates what was asked for, so a server that dies in between has done both
or neither. A key is remembered for KEY_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from fortwo.errors import Conflict
from fortwo.jobs.schema import KeyRow
from fortwo.jobs.store import JobStore
from fortwo.records import Json

KEY_SECONDS = 24 * 3600.0

T = TypeVar("T")
Also = Callable[[Session, T], None]  # called with what was created, in its transaction


@dataclass(frozen=True)
class Key:
    """request: method and path; digest: SHA-256 of what is asked for."""

    key: str
    request: str
    digest: str


class AnswerStore:
    """The remembered answers of one server."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def once(self, key: Key | None, create: Callable[[Also[T]], T], answer: Callable[[T], Json]) -> Json:
        """The answer for what `create` makes, or the remembered one when the key was used before. create: called with a
        function that it must call in its transaction. Raises Conflict for a key of another request."""
        if key is None:
            return answer(create(lambda _session, _made: None))
        if (known := self._find(key)) is not None:
            return known

        def remember(session: Session, made: T) -> None:
            session.execute(delete(KeyRow).where(KeyRow.created_at < time.time() - KEY_SECONDS))
            row = KeyRow(owner=self._store.owner, **vars(key), answer=answer(made), created_at=time.time())
            session.add(row)

        try:
            return answer(create(remember))
        except IntegrityError:  # another request with this key was faster
            if (known := self._find(key)) is None:
                raise
            return known

    def _find(self, key: Key) -> Json | None:
        with self._store.reading() as session:
            row = session.get(KeyRow, (self._store.owner, key.key))
            if row is None or row.created_at < time.time() - KEY_SECONDS:
                return None
            if (row.request, row.digest) == (key.request, key.digest):
                return row.answer
        raise Conflict(
            f"Idempotency-Key {key.key!r} was used for another request: {row.request} with another content.",
            param="Idempotency-Key",
            hint="Send a new key, or the same request as before.",
            code="idempotency_key_reused",
        )
