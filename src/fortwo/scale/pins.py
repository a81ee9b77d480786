"""Which model a request means, decided once: the head reads the store, and the replica answers with exactly that.

A version's files never change and its number is never given twice, so a pin means the same everywhere and for ever.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from urllib.parse import parse_qsl

from fortwo.errors import Conflict
from fortwo.server.errors import PLAIN_PATHS
from fortwo.server.ollama import without_tag
from fortwo.server.scopes import CHAT_PATHS

# Of llama.cpp's API: the paths whose requests may leave the model out.
DEFAULTED_PATHS = frozenset({"/tokenize", "/detokenize", "/apply-template", "/completion"})
PROPS = "/props"  # the only one by GET, with the model in the query
REPLICA_ROUTES = frozenset(("POST", path) for path in CHAT_PATHS) | {("GET", PROPS)}


@dataclass(frozen=True)
class Pin:
    """What a request is answered with. name: as the request wrote it; ref: the base, name@3 or name@job-step that it
    means; digest: of the base or of the adapter's files."""

    name: str
    ref: str
    digest: str

    def check(self, digest: str) -> None:
        """Raises Conflict unless the replica found what the head meant."""
        if digest != self.digest:
            raise Conflict(
                f"{self.ref} has the digest {digest} on this replica, but {self.digest} on the head.",
                param="model",
                hint="Let all machines see the same FORTWO_HOME, its models included.",
                code="replica_differs",
            )


def requested_model(path: str, query: bytes, body: bytes, default: str) -> str | None:
    """The model that a request names, without Ollama's :latest; None if the body has none where the API wants one, or
    cannot be read. path: of REPLICA_ROUTES; default: what llama.cpp's paths mean without a model."""
    if path == PROPS:
        return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)).get("model", default)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = given.get("model") if isinstance(given, dict) else None
    if model is None and isinstance(given, dict) and path in DEFAULTED_PATHS:
        return default
    if not isinstance(model, str):
        return None
    return without_tag(model) if path in PLAIN_PATHS else model
