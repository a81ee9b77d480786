"""Functions that a reply may call: the JSON Schema of their arguments, as a whole and for each argument by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.data.schema_references import References
from fortwo.errors import InvalidRequest
from fortwo.records import Json

STRUCTURES = frozenset({"array", "object"})
ANY_TYPE = frozenset({"string", "integer", "number", "boolean", "null"}) | STRUCTURES

_WHOLE = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "additionalProperties"}
_DEFINITIONS = ("$defs", "definitions")
_NO_KEYWORDS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_EACH = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_NO_KEYWORDS}
_OF_TEXTS = {"pattern", "format", "minLength", "maxLength", "not", "if"}
_SCALARS = {"integer", "number", "boolean"}
_OF_SCALARS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
_OPEN = _WHOLE - {"$ref", "additionalProperties"}  # beside which arguments may have no name
_REFERENCES = 1000  # among the alternatives of an argument

Allowed = tuple[frozenset[str], "tuple[str, ...] | None"]
"""The types of JSON that a schema allows, and the strings; None for any."""

_NOTHING: Allowed = (frozenset(), ())


@dataclass(frozen=True)
class Argument:
    """What an argument that stands by itself may be. schema: with all that it refers to. types: of JSON, which its
    schema allows. texts: the strings that it may be; None for any. keywords: of the schema of a strict function, those
    that cannot be enforced on a text without quotes."""

    schema: Json
    types: frozenset[str]
    texts: tuple[str, ...] | None = None
    required: bool = False
    keywords: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return self.types == {"string"}

    @property
    def possible(self) -> bool:
        return bool(self.types - {"string"}) or ("string" in self.types and self.texts != ())

    def may_be_structure(self, text: str) -> bool:
        """Whether a value that begins with this text is an object or a list; a string does not begin like one where
        those are allowed."""
        return text.lstrip(" \n\t").startswith(("{", "[")) and bool(self.types & STRUCTURES)

    def without(self, mark: str) -> Argument:
        """The argument without the strings that contain the mark."""
        return self if self.texts is None else replace(self, texts=tuple(one for one in self.texts if mark not in one))

    def value(self, text: str) -> str:
        """The JSON text of the value that stands as this text: JSON of a type that the argument may have, or else a
        string."""
        if self.is_text:
            return json.dumps(text, ensure_ascii=False)
        if "string" not in self.types:
            return text.strip()
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
        """The arguments that the schema names, in its order, each by itself. Raises InvalidRequest for a reference that
        points nowhere."""
        properties, required = self._properties
        found = {name: self._argument(schema, name in required) for name, schema in properties.items()}
        if self.others is not None:
            found |= {name: replace(self.others, required=True) for name in required if name not in found}
        return found

    @cached_property
    def others(self) -> Argument | None:
        """What arguments may be that the schema does not name; None where there may be none."""
        closed = bool(self._properties[0]) or self._named
        allowed = self._parameters.get("additionalProperties", not closed or bool(_OPEN & self._parameters.keys()))
        return None if allowed is False else self._argument(allowed, required=False)

    def check_arguments(self) -> None:
        """Raises InvalidRequest for what cannot be enforced where each argument stands by itself."""
        for name, argument in self.arguments.items():
            if argument.required and not argument.possible:
                raise _cannot_follow(f"no value of {name!r} can be written")
        if missing := [name for name in self._properties[1] if name not in self.arguments]:
            raise _cannot_follow(f"{missing[0]!r} is required but is not among the properties")
        if not self.strict:
            return
        if unknown := sorted(self._parameters.keys() - _EACH):
            raise _cannot_follow(f"{unknown[0]} cannot be enforced where each argument stands by itself")
        others = {} if self.others is None else {"additionalProperties": self.others}
        for name, argument in {**self.arguments, **others}.items():
            for keyword in argument.keywords:
                raise _cannot_follow(f"{keyword} of {name!r} cannot be enforced where a text stands without quotes")

    @cached_property
    def _references(self) -> References:
        return References(self.parameters)

    @cached_property
    def _parameters(self) -> Json:
        """The parameters, with a reference in place of the whole followed."""
        reference = self.parameters.get("$ref")
        found = self._references.target(reference) if isinstance(reference, str) else {}
        own = {key: value for key, value in self.parameters.items() if key != "$ref"}
        return {**found, **own} if isinstance(found, dict) else own

    @cached_property
    def _properties(self) -> tuple[Json, list[str]]:
        """The schemas of the arguments, and the names of those that are required: with those of schemas that hold
        besides (allOf), and with the arguments of alternatives, of which none is required."""
        properties: Json = {}
        required: list[str] = []
        followed: set[str] = set()
        left: list[tuple[Any, bool]] = [(self._parameters, True)]
        while left:
            part, holds = left.pop(0)
            if not isinstance(part, dict):
                continue
            if isinstance(named := part.get("properties"), dict):
                properties |= {name: schema for name, schema in named.items() if name not in properties}
            if holds and isinstance(names := part.get("required"), list):
                required += [name for name in names if isinstance(name, str) and name not in required]
            within: list[tuple[Any, bool]] = []
            if isinstance(reference := part.get("$ref"), str) and reference not in followed:
                followed.add(reference)
                within.append((self._references.target(reference), holds))
            for keyword in ("allOf", "anyOf", "oneOf"):
                if isinstance(parts := part.get(keyword), list):
                    within += [(one, holds and keyword == "allOf") for one in parts]
            left = within + left
        return properties, required

    def _argument(self, schema: Any, required: bool) -> Argument:
        types, texts = self._allowed(schema)
        if texts is not None:
            spoken = Argument({}, types | {"string"})
            texts = tuple(
                text for text in texts if spoken.value(text).startswith('"') and not spoken.may_be_structure(text)
            )
        keywords = self._keywords(schema) if self.strict and "string" in types else ()
        told = tuple(one for one in keywords if texts is None or one in _OF_TEXTS)
        return Argument(self._references.alone(schema), types, texts, required, told)

    @cached_property
    def _known(self) -> dict[str, Allowed]:
        """What is allowed at the references that were followed."""
        return {}

    def _allowed(self, schema: Any) -> Allowed:
        """What a schema allows. References may go in circles, so what is at them grows until nothing is added."""
        order = self._followed(schema)
        known = self._known
        known.update(dict.fromkeys(order, _NOTHING))
        grown = bool(order)
        while grown:
            grown = False
            for reference in order:
                found = self._allowed_by(self._references.target(reference))
                grown |= found != known[reference]
                known[reference] = found
        return self._allowed_by(schema)

    def _followed(self, schema: Any) -> list[str]:
        """The references among the alternatives of a schema that are not known yet, those that others lead to first."""
        order: list[str] = []
        entered = set(self._known)
        path: list[tuple[str | None, Iterator[str]]] = [(None, _references_of(schema))]
        while path:
            reference, rest = path[-1]
            further = next((one for one in rest if one not in entered), None)
            if further is None:
                path.pop()
                order += [] if reference is None else [reference]
                continue
            entered.add(further)
            path.append((further, _references_of(self._references.target(further))))
            if len(path) + len(order) > _REFERENCES:
                raise _cannot_follow(f"an argument has more than {_REFERENCES} references among its alternatives")
        return order

    def _allowed_by(self, schema: Any) -> Allowed:
        """What a schema allows, by what is known of the references."""
        if schema is False:
            return _NOTHING
        types, texts = ANY_TYPE, None
        if not isinstance(schema, dict):
            return types, texts
        named = schema.get("type")
        if isinstance(named, str | list):
            types = frozenset([named] if isinstance(named, str) else [one for one in named if isinstance(one, str)])
            types |= {"integer"} if "number" in types else set()
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            types &= {type_of(value) for value in values}
            texts = tuple(value for value in values if isinstance(value, str))
        found = [[self._allowed_by(option) for option in options] for options in _options(schema)]
        if isinstance(reference := schema.get("$ref"), str):
            found.append([self._known[reference]])
        for allowed in found:
            types &= frozenset().union(*(kinds for kinds, _ in allowed))
            of_strings = [words for kinds, words in allowed if "string" in kinds]
            if None not in of_strings:
                said = dict.fromkeys(text for words in of_strings for text in words or ())
                texts = tuple(said) if texts is None else tuple(text for text in texts if text in said)
        return types, texts

    def _keywords(self, schema: Any) -> Iterator[str]:
        """What a schema demands of strings, and of other values that are texts like them."""
        followed: set[str] = set()
        left = [schema]
        while left:
            part = left.pop()
            if not isinstance(part, dict):
                continue
            types, _ = self._allowed(part)
            of_texts = _OF_TEXTS if "string" in types else set()
            of_scalars = _OF_SCALARS if types & _SCALARS else set()
            yield from sorted(part.keys() & (of_texts | of_scalars))
            left += [option for options in _options(part) for option in options]
            if isinstance(reference := part.get("$ref"), str) and reference not in followed:
                followed.add(reference)
                left.append(self._references.target(reference))


def _options(schema: Json) -> Iterator[list[Any]]:
    """Lists of schemas, of each of which one holds for a value that the schema allows."""
    for keyword in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(keyword), list):
            yield options
    if isinstance(parts := schema.get("allOf"), list):
        yield from ([part] for part in parts)


def _references_of(schema: Any) -> Iterator[str]:
    """The references among the alternatives of a schema."""
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        for options in _options(schema):
            for option in options:
                yield from _references_of(option)


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
