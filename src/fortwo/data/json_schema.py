"""Limits of the JSON Schemas that replies are held to."""

from __future__ import annotations

from fortwo.errors import InvalidRequest

PATTERNS = 500  # regular expressions of a schema; those of one object are compared with each other, which takes minutes
WHITE_SPACE = r"[ \n\t]{0,24}"  # enough for a line break and some levels of indentation


def check_patterns(schema: object, param: str) -> None:
    """Raises InvalidRequest for a JSON Schema with more patterns than PATTERNS."""
    if (patterns := count_patterns(schema)) > PATTERNS:
        raise InvalidRequest(
            f"the schema has {patterns} patterns, but at most {PATTERNS} are allowed",
            param=param,
            hint="Write one pattern for several properties, or leave patterns out.",
        )


def count_patterns(schema: object) -> int:
    """The number of regular expressions in a JSON Schema, at any depth."""
    count, left = 0, [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            named = part.get("patternProperties")
            count += isinstance(part.get("pattern"), str) + (len(named) if isinstance(named, dict) else 0)
            left += part.values()
        elif isinstance(part, list):
            left += part
    return count
