"""Draws at random until something fits, and gives up in words when next to nothing does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fortwo.errors import InvalidDataset
from fortwo.records import Fact

MOST_DRAWS = 1000  # in a row that do not fit

Drawn = TypeVar("Drawn")


def draw_until(fits: Callable[[Drawn], bool], draw: Callable[[], Drawn], fact: Fact) -> Drawn:
    """The first of at most MOST_DRAWS that fits. Raises InvalidDataset naming the fact whose prompts are drawn."""
    for _ in range(MOST_DRAWS):
        if fits(found := draw()):
            return found
    raise InvalidDataset(
        f"no prompt for the fact about {fact.subject[:80]!r} can be made: of {MOST_DRAWS} that were tried, each has a "
        "phrase of its match, names a subject or an alias that it must not name, or is one that evaluation asks",
        param="dataset",
        hint="Leave out phrases and aliases that are common words or single letters, or teach the facts with several "
        "adapters.",
    )
