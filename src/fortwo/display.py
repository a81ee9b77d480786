"""Values as text for people, the same in the terminal and in reports."""

from __future__ import annotations

from typing import Any


def value(thing: Any) -> str:
    """A value as text for people: yes and no, thousands separators, four digits."""
    if isinstance(thing, bool) or thing is None:
        return {True: "yes", False: "no", None: "-"}[thing]
    if isinstance(thing, int):
        return f"{thing:,}"
    if isinstance(thing, float):
        return f"{thing:.4g}"
    if isinstance(thing, list | tuple):
        return ", ".join(value(item) for item in thing)
    if isinstance(thing, dict):
        return ", ".join(f"{key} {value(item)}" for key, item in thing.items()) or "-"
    return str(thing)
