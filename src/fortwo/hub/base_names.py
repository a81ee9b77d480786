"""Which base models other programs mean by a name: an id, a path, or the name of a hub repository. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fortwo.hub.catalog import ModelEntry


def bases_named(named: str, entries: Sequence[ModelEntry]) -> list[str]:
    """The ids of the bases that a base_model_name_or_path means: by the first of these rules that finds any. The id,
    the path or the hub repository that it comes from; then the last part of the name, in any case, as an id or as the
    last part of where a base comes from."""
    sources = {entry.id: _place(entry.source) for entry in entries}
    paths = {id: {source, str(Path(source).resolve())} for id, source in sources.items() if source.startswith("/")}
    last = _last_part(named)
    for found in (
        [id for id in sources if id == named],
        [id for id, same in paths.items() if os.path.normpath(named) in same],
        [id for id, source in sources.items() if source.casefold() == named.casefold()],
        [id for id in sources if id.casefold() == last],
        [id for id, source in sources.items() if _last_part(source).removesuffix(".gguf") == last],
    ):
        if found:
            return found
    return []


def _place(source: str) -> str:
    """A path, or a hub repository without the revision that is kept of it."""
    kind, _, place = source.partition(":")
    return place.partition("@")[0] if kind == "hub" else place


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
