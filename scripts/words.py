"""Fails when a word that was replaced comes back: names that were given up, and phrases that nobody understood."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHERE = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "src/**/*.py",
    "src/**/*.c",
    "src/**/*.h",
    "bench/*.py",
    "tests/*.py",
)
HISTORY = ("docs/lab-notes.md",)  # it may quote what there was
INSTEAD = {
    r"\bclass (House|Door|Guest|Residents|Relay|Teacher|Diary|Shelf)\b": "the names in docs/architecture.md",
    r"what disturbs only adds": "other load can only make a run slower, so the minimum is taken",
    r"[Ww]hoever is in\b": "requests in flight",
    r"ends? by himself": "finishes",
    r"more than \w+ may not\b": "the limit is ...",
    r"\bfortwo\.models\b": "kernels, quantization, nn, execution or hub",
}


def found() -> Iterator[str]:
    """One line for each place that holds such a word."""
    files = sorted(path for pattern in WHERE for path in ROOT.glob(pattern))
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name in HISTORY:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, instead in INSTEAD.items():
                if match := re.search(pattern, line):
                    yield f"{name}:{number}: {match[0]!r} is not used any more; write: {instead}"


if __name__ == "__main__":
    sys.exit("\n".join(found()) or None)
