"""Which scope of an API key a request needs. What is not named here needs admin, so that a new route is closed."""

from __future__ import annotations

import re

from fortwo.jobs.api_keys import ADMIN, CHAT, READ, TRAIN
from fortwo.server.request_body import SAFE_METHODS

CHAT_PATHS = frozenset(
    "/v1/chat/completions /v1/completions /v1/responses /v1/embeddings /api/chat /api/generate /api/embed "
    "/api/embeddings /tokenize /detokenize /apply-template /completion".split()
)
_READ_BY_POST = frozenset({"/api/show"})
# Content that a read key must not take away: rows of datasets, and adapters.
_CONTENT = re.compile(
    r"/v1/files/[^/]+/content|/api/exports/[^/]+/(files/.*|archive)|/api/training/jobs/[^/]+/(request|next-try)"
    r"|/api/data/.*",
    re.DOTALL,
)
_TRAIN = re.compile(
    r"/api/training/.*|/api/data/.*|/api/facts/.*|/v1/files(/.*)?|/v1/fine_tuning/.*|/api/exports/.*"
    r"|/api/adapters/[^/]+/export(/plan)?",
    re.DOTALL,
)


def needed_scope(method: str, path: str) -> str:
    """read, chat, train or admin. path: decoded, as it is routed."""
    if path in CHAT_PATHS:
        return CHAT
    if method in SAFE_METHODS:
        return TRAIN if _CONTENT.fullmatch(path) else READ
    if path in _READ_BY_POST:
        return READ
    return TRAIN if _TRAIN.fullmatch(path) else ADMIN
