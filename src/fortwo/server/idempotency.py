"""The header Idempotency-Key, by which a client repeats a request without having it carried out twice."""

from __future__ import annotations

import hashlib

from fastapi import Request

from fortwo.errors import InvalidRequest
from fortwo.jobs.idempotency import Key

HEADER = "idempotency-key"
LONGEST = 255


def given_key(request: Request) -> str | None:
    """The header's value; None without it. Raises InvalidRequest for one that is empty or too long."""
    key = request.headers.get(HEADER)
    if key is not None and not 1 <= len(key.strip()) <= LONGEST:
        raise InvalidRequest(
            f"The header Idempotency-Key has {len(key.strip())} characters.",
            param="Idempotency-Key",
            hint=f"Send 1 to {LONGEST} characters, such as a UUID.",
        )
    return None if key is None else key.strip()


def key_of(request: Request, content: bytes) -> Key | None:
    """The key of a request, or None. content: what makes two requests the same, for example the body."""
    key = given_key(request)
    if key is None:
        return None
    return Key(key, f"{request.method} {request.url.path}", hashlib.sha256(content).hexdigest())
