"""References within a JSON Schema (`$ref`): what each points to, and parts of a schema that can stand by themselves."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from fortwo.errors import InvalidRequest
from fortwo.records import Json

_MAPS = {"properties", "patternProperties", "dependentSchemas"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_PARTS = {
    *("items", "additionalItems", "unevaluatedItems", "contains"),
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("not", "if", "then", "else"),
}
_FOUND_BY = {"$defs", "definitions", "$id", "$anchor", "$schema"}  # what a reference is found by in the whole


class References:
    """Those of the schema `whole`."""

    def __init__(self, whole: Json) -> None:
        self._whole = whole

    def target(self, reference: str) -> Any:
        """The schema that a reference points to. Raises InvalidRequest for one that does not point into the whole."""
        found: Any = self._whole
        first, *steps = reference.split("/")
        if first != "#":
            raise _cannot_follow(reference)
        for step in (unquote(one).replace("~1", "/").replace("~0", "~") for one in steps):
            if isinstance(found, dict) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                raise _cannot_follow(reference)
        if not isinstance(found, dict | bool):
            raise _cannot_follow(reference)
        return found

    def alone(self, schema: Any) -> Json:
        """The schema with all that it refers to, and nothing else of the whole. Raises InvalidRequest as `target`."""
        names: dict[str, str] = {}
        left: list[str] = []

        def rewritten(key: str, value: Any) -> Any:
            if key == "$ref" and isinstance(value, str):
                if value not in names:
                    names[value] = f"of{len(names)}"
                    left.append(value)
                return f"#/$defs/{names[value]}"
            if key in _MAPS and isinstance(value, dict):
                return {name: whole(one) for name, one in value.items()}
            if isinstance(value, list) and key in _LISTS | _PARTS:
                return [whole(one) for one in value]
            return whole(value) if key in _PARTS else value

        def whole(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {key: rewritten(key, one) for key, one in value.items() if key not in _FOUND_BY}

        alone = whole(schema) if isinstance(schema, dict) else {}
        definitions: Json = {}
        while left:
            reference = left.pop()
            definitions[names[reference]] = whole(self.target(reference))
        return {**alone, "$defs": definitions} if definitions else alone


def _cannot_follow(reference: str) -> InvalidRequest:
    return InvalidRequest(
        f"the schema cannot be followed: nothing in it is at the reference {reference!r}",
        param="tools",
        hint='Point to a place within the schema, such as "#/$defs/NAME".',
    )
