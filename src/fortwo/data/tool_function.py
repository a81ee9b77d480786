"""Functions that a reply may call: the JSON Schema of their arguments, as a whole and for each argument by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.errors import InvalidRequest
from fortwo.records import Json

STRUCTURES = frozenset({"array", "object"})
ANY_TYPE = frozenset({"string", "integer", "number", "boolean", "null"}) | STRUCTURES

_WHOLE = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "additionalProperties"}
DEFINITIONS = ("$defs", "definitions")
_NO_KEYWORDS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_EACH = {"type", "properties", "required", "additionalProperties", *DEFINITIONS, *_NO_KEYWORDS}
_OF_TEXTS = {"pattern", "format", "minLength", "maxLength", "not", "if"}
_SCALARS = {"integer", "number", "boolean"}
_OF_SCALARS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
_DEPTH = 32  # of references and alternatives within each other


@dataclass(frozen=True)
class Argument:
    """What an argument that stands by itself may be. types: of JSON, which its schema allows. texts: the strings that
    it may be; None for any."""

    schema: Json
    types: frozenset[str]
    texts: tuple[str, ...] | None = None
    required: bool = False

    @property
    def is_text(self) -> bool:
        return self.types == {"string"}

    @property
    def possible(self) -> bool:
        return bool(self.types - {"string"}) or ("string" in self.types and self.texts != ())

    def may_be_structure(self, text: str) -> bool:
        """Whether a value that begins with this text is an object or a list; a string does not begin like one where
        those are allowed."""
        return text.lstrip().startswith(("{", "[")) and bool(self.types & STRUCTURES)

    def value(self, text: str) -> str:
        """The JSON text of the value that stands as this text: JSON of a type that the argument may have, or else a
        string."""
        if self.is_text:
            return json.dumps(text, ensure_ascii=False)
        try:
            found = type_of(json.loads(text, parse_constant=_no_constant))
        except (ValueError, RecursionError):
            found = "string"
        return text.strip() if found in self.types - {"string"} else json.dumps(text, ensure_ascii=False)


ANY = Argument({}, ANY_TYPE)


@dataclass(frozen=True)
class Function:
    """A function that a reply may call. parameters: the JSON Schema of its arguments. strict: every keyword of the
    schema is enforced; otherwise those that cannot be are left out."""

    name: str
    parameters: Json
    strict: bool = False

    def schema(self) -> Json:
        """The schema that the arguments are held to. Arguments that the schema does not name are not written, unless it
        allows them expressly."""
        closed = {} if _WHOLE & self.parameters.keys() or not self._named else {"additionalProperties": False}
        return {"type": "object", **self.parameters, **closed, "x-guidance": self.guidance}

    @property
    def guidance(self) -> Json:
        return {"whitespace_pattern": WHITE_SPACE, "lenient": not self.strict}

    @property
    def _named(self) -> bool:
        return isinstance(self.parameters.get("properties"), dict)

    @cached_property
    def arguments(self) -> dict[str, Argument]:
        """The arguments that the schema names, in its order, each by itself."""
        return {name: self._argument(schema, name in self._required) for name, schema in self._properties.items()}

    @cached_property
    def others(self) -> Argument | None:
        """What arguments may be that the schema does not name; None where there may be none."""
        allowed = self._parameters.get("additionalProperties", not self._named)
        return None if allowed is False else self._argument(allowed, required=False)

    def check_arguments(self) -> None:
        """Raises InvalidRequest for what cannot be enforced where each argument stands by itself."""
        for name, argument in self.arguments.items():
            if argument.required and not argument.possible:
                raise _cannot_follow(f"no value of {name!r} can be written")
        if missing := [name for name in self._required if name not in self.arguments]:
            raise _cannot_follow(f"{missing[0]!r} is required but is not among the properties")
        if not self.strict:
            return
        if unknown := sorted(self._parameters.keys() - _EACH):
            raise _cannot_follow(f"{unknown[0]} cannot be enforced where each argument stands by itself")
        for name, argument in self.arguments.items():
            if "string" in argument.types and argument.texts is None:
                for keyword in self._keywords(argument.schema):
                    raise _cannot_follow(f"{keyword} of {name!r} cannot be enforced where a text stands without quotes")

    @cached_property
    def _parameters(self) -> Json:
        """The parameters, with a reference in place of the whole followed."""
        found = self._referred(self.parameters) or {}
        return {**found, **{key: value for key, value in self.parameters.items() if key != "$ref"}}

    @property
    def _properties(self) -> Json:
        found = self._parameters.get("properties")
        return found if isinstance(found, dict) else {}

    @property
    def _required(self) -> list[str]:
        found = self._parameters.get("required")
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def _argument(self, schema: Any, required: bool) -> Argument:
        types, texts = self._allowed(schema)
        others = types - {"string"}
        if texts is not None:
            spoken = Argument({}, others | {"string"})
            texts = tuple(text for text in texts if spoken.value(text).startswith('"'))
        definitions = {key: self.parameters[key] for key in DEFINITIONS if key in self.parameters}
        return Argument({**definitions, **(schema if isinstance(schema, dict) else {})}, types, texts, required)

    def _allowed(self, schema: Any, depth: int = 0) -> tuple[frozenset[str], tuple[str, ...] | None]:
        """The types of JSON that a schema allows, and the strings; None for any."""
        if schema is False:
            return frozenset(), ()
        types, texts = ANY_TYPE, None
        if not isinstance(schema, dict) or depth > _DEPTH:
            return types, texts
        named = schema.get("type")
        if isinstance(named, str | list):
            types = frozenset([named] if isinstance(named, str) else [one for one in named if isinstance(one, str)])
            types |= {"integer"} if "number" in types else set()
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            types &= {type_of(value) for value in values}
            texts = tuple(value for value in values if isinstance(value, str))
        for options in self._options(schema):
            found = [self._allowed(option, depth + 1) for option in options]
            types &= frozenset().union(*(kinds for kinds, _ in found))
            of_strings = [words for kinds, words in found if "string" in kinds]
            if None not in of_strings:
                said = tuple(dict.fromkeys(text for words in of_strings for text in words or ()))
                texts = said if texts is None else tuple(text for text in texts if text in said)
        return types, texts

    def _options(self, schema: Json) -> Iterator[list[Any]]:
        """Lists of schemas, of each of which one holds for a value that the schema allows."""
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list):
                yield options
        if isinstance(parts := schema.get("allOf"), list):
            yield from ([part] for part in parts)
        if (referred := self._referred(schema)) is not None:
            yield [referred]

    def _keywords(self, schema: Any, depth: int = 0) -> Iterator[str]:
        """What a schema of any string demands of strings, and of other values that are texts like them."""
        if not isinstance(schema, dict) or depth > _DEPTH:
            return
        types, _ = self._allowed(schema)
        of_texts = _OF_TEXTS if "string" in types else set()
        of_scalars = _OF_SCALARS if types & _SCALARS else set()
        yield from sorted(schema.keys() & (of_texts | of_scalars))
        for options in self._options(schema):
            for option in options:
                yield from self._keywords(option, depth + 1)

    def _referred(self, schema: Json) -> Json | None:
        """The definition that a schema refers to; None if it refers to none."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        found: Any = self.parameters
        for step in reference.removeprefix("#/").split("/"):
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else None


def type_of(value: Any) -> str:
    """The type of a JSON value, as JSON Schema names it. A number without a fraction is an integer."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {str: "string", int: "integer", type(None): "null", list: "array", dict: "object"}
    return names[type(value)]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _cannot_follow(fault: str) -> InvalidRequest:
    return InvalidRequest(
        f"the schema cannot be followed: {fault}",
        param="tools",
        hint="Correct the schema, remove the part that the message names, or set strict to false.",
    )
