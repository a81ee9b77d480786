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
from fortwo.data.tool_form import ID, SHORT_ID, ToolForm, pattern
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
        rules.append(f"{name}: {_quoted(function.name)} {_sequence(form.middle, split, form)} {name}_arguments")
        rules.append(f"{name}_arguments: %json {arguments}")
    if use.required or use.reply is not None:
        calls = f"{_sequence(form.opening, split, form)} {body}"
        start = [f"start: {calls}"] if use.reply is None or use.required else [f"start: reply | {calls}"]
        if not use.required and use.reply is not None:
            guided = json.loads(use.reply) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            start.append(f"reply: %json {json.dumps(guided, ensure_ascii=False)}")
    else:
        start = _free_start(form, use, body, split)
    return "\n".join([*start, *rules]) + "\n"


def _free_start(form: ToolForm, use: ToolUse, body: str, split: Split) -> list[str]:
    """The rules of a reply that may be text, and may have text before its calls. A reply that begins like the bare JSON
    of a call of an offered function is one."""
    text = f"/{_ANY_TEXT}/"
    if not form.marker:
        return [
            f"start: TEXT | {_sequence(form.opening, split, form)} {body}",
            f"TEXT: {text} & ~/{pattern(form.opening)}{_ANY_TEXT}/",
        ]
    wholes, rules, heads = "", list[str](), list[str]()
    for number, bare in enumerate(form.bare):
        for index, function in enumerate(use.functions):
            heads.append(pattern(bare.opening + function.name + bare.middle))
            wholes += f" | bare_{number}_{index}"
            closing = _sequence(bare.closing, split, form)
            rules.append(f"bare_{number}_{index}: /{heads[-1]}/ call_{index}_arguments {closing}")
    if heads:
        text += f" & ~/({'|'.join(heads)}){_ANY_TEXT}/"
    first, *others = split(form.marker)
    calls = f"{_sequence(form.opening.removeprefix(form.marker), split, form)} {body}"
    if isinstance(first, str):
        others_sequence = " ".join(_piece(piece, form) for piece in others)
        start = [f"start: TEXT | head {others_sequence} {calls}{wholes}", f"head[lazy]: TEXT {_quoted(first)}"]
    else:
        start = [f"start: TEXT | TEXT {_sequence(form.marker, split, form)} {calls}{wholes}"]
        text += f" & ~/{_ANY_TEXT}{pattern(form.marker)}{_ANY_TEXT}/"
    return [*start, f"TEXT: {text}", *rules]


def _sequence(text: str, split: Split, form: ToolForm) -> str:
    pieces: list[str | int] = []
    for piece in split(text):
        pieces += [piece] if isinstance(piece, int) else re.split(f"({ID})", piece)
    return " ".join(_piece(piece, form) for piece in pieces if piece != "")


def _piece(piece: str | int, form: ToolForm) -> str:
    if isinstance(piece, int):
        return f"<[{piece}]>"
    if piece == ID and form.short_ids:
        return f"/{SHORT_ID.pattern}/"
    return f"/{pattern(piece)}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
