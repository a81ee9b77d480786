"""What `make docs-site` changes in pages: a link out of docs/ leads nowhere on the site, so it becomes the path."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls it for each page."""
    return OUTSIDE.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    text, path = link[1], link[2]
    return f"`{path}`" if text in (path, f"`{path}`") else f"{text} (`{path}`)"
