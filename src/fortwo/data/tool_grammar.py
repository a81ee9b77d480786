"""A grammar for replies that may or must call tools, in llguidance's variant of Lark's syntax.

A reply is free text until the marker with which calls begin; from there on each token must continue a call of an
offered function, with arguments of its JSON Schema. llguidance reads a control token only by its number, so texts come
in pieces: a text, or the number of a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.data.tool_form import ID, ToolForm
from fortwo.records import Json

Split = Callable[[str], "list[str | int]"]
"""Cuts a text at the tokens that a grammar names by number."""

_ANY_TEXT = r"(.|\n)*"
_WHOLE = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "additionalProperties"}


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
        guidance = {"whitespace_pattern": WHITE_SPACE, "lenient": not self.strict}
        return {"type": "object", **self.parameters, **closed, "x-guidance": guidance}

    @property
    def _named(self) -> bool:
        return isinstance(self.parameters.get("properties"), dict)


@dataclass(frozen=True)
class ToolUse:
    """What a reply may do. required: it calls; otherwise it may be text instead, or have text before its calls.
    parallel: several calls. reply: the JSON Schema of a reply without calls, as text; None for free text."""

    functions: tuple[Function, ...]
    required: bool = False
    parallel: bool = True
    reply: str | None = None


def grammar(form: ToolForm, use: ToolUse, split: Split) -> str:
    """The grammar of a reply. `use.reply` needs a form with a marker."""
    names = [f"call_{number}" for number in range(len(use.functions))]
    more = f"({_sequence(form.between, split, form)} call)*" if use.parallel and form.between is not None else ""
    body = f"call {more} {_sequence(form.closing, split, form)}"
    rules = [f"call: {' | '.join(names)}"]
    for name, function in zip(names, use.functions, strict=True):
        arguments = json.dumps(function.schema(), ensure_ascii=False)
        rules.append(f"{name}: {_sequence(function.name + form.middle, split, form)} {name}_arguments")
        rules.append(f"{name}_arguments: %json {arguments}")
    if use.required or use.reply is not None:
        calls = f"{_sequence(form.opening, split, form)} {body}"
        start = [f"start: {calls}"] if use.reply is None or use.required else [f"start: reply | {calls}"]
        if not use.required and use.reply is not None:
            guided = json.loads(use.reply) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            start.append(f"reply: %json {json.dumps(guided, ensure_ascii=False)}")
    else:
        start = _free_start(form, body, split)
    return "\n".join([*start, *rules]) + "\n"


def _free_start(form: ToolForm, body: str, split: Split) -> list[str]:
    """The rules of a reply that may be text, and may have text before its calls."""
    rest = form.opening.removeprefix(form.marker)
    calls = f"{_sequence(rest, split, form)} {body}"
    if not form.marker:
        return [
            f"start: TEXT | {_sequence(form.opening, split, form)} {body}",
            f"TEXT: /{_ANY_TEXT}/ & ~/{_spaced(form.opening)}{_ANY_TEXT}/",
        ]
    first, *others = split(form.marker)
    if isinstance(first, str):
        others_sequence = " ".join(_piece(piece, form) for piece in others)
        return [
            f"start: TEXT | head {others_sequence} {calls}",
            f"TEXT: /{_ANY_TEXT}/",
            f"head[lazy]: TEXT {_quoted(first)}",
        ]
    spelled = _escaped(form.marker)
    return [
        f"start: TEXT | TEXT {_sequence(form.marker, split, form)} {calls}",
        f"TEXT: /{_ANY_TEXT}/ & ~/{_ANY_TEXT}{spelled}{_ANY_TEXT}/",
    ]


def _sequence(text: str, split: Split, form: ToolForm) -> str:
    pieces: list[str | int] = []
    for piece in split(text):
        pieces += [piece] if isinstance(piece, int) else re.split(f"({ID})", piece)
    return " ".join(_piece(piece, form) for piece in pieces if piece != "")


def _piece(piece: str | int, form: ToolForm) -> str:
    if isinstance(piece, int):
        return f"<[{piece}]>"
    if piece == ID:
        return "/[a-zA-Z0-9]{9}/" if form.short_ids else "/[a-zA-Z0-9_-]{1,64}/"
    return _quoted(piece)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """The text as a regular expression between slashes."""
    return re.sub(r"([!-/:;=?@\[-`{-~])", r"\\\1", text).replace("\n", r"\n")


def _spaced(opening: str) -> str:
    """The opening as a regular expression, with any white space between its parts and before them."""
    parts = re.findall(r"\w+|[^\w\s]", opening.partition(ID)[0])
    return r"\s*" + r"\s*".join(map(_escaped, parts))
