"""A grammar for replies that may or must call tools, in llguidance's variant of Lark's syntax.

A reply is free text until the marker with which calls begin; from there on each token must continue a call of an
offered function, with arguments of its JSON Schema. llguidance reads a control token only by its number, so texts come
in pieces: a text, or the number of a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.data.tool_form import ID, SHORT_ID, SeparateArguments, ToolForm
from fortwo.data.tool_function import STRUCTURES, Argument, Function
from fortwo.errors import InvalidRequest
from fortwo.records import Json

Split = Callable[[str], "list[str | int]"]
"""Cuts a text at the tokens that a grammar names by number."""

_EMPTY = '""'

_ANY_TEXT = r"(.|\n)*"
_STRUCTURE = r"[ \n\t]*[{\[]"
_KEY = "[a-zA-Z0-9_.-]{1,64}"  # of an argument that the schema does not name


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
    body, rules = _calls(form, use, split) if form.separate is None else _separate_calls(form, use, split)
    if use.required or use.reply is not None:
        lead = f"{_piece(form.lead, form)}?" if form.lead else ""
        calls = f"{lead} {_sequence(form.opening, split, form)} {body}"
        start = [f"start: {calls}"] if use.reply is None or use.required else [f"start: reply | {calls}"]
        if not use.required and use.reply is not None:
            guided = json.loads(use.reply) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            start.append(f"reply: %json {json.dumps(guided, ensure_ascii=False)}")
    else:
        start = _free_start(form, use, body, split)
    return "\n".join([*start, *rules]) + "\n"


def _calls(form: ToolForm, use: ToolUse, split: Split) -> tuple[str, list[str]]:
    """What follows the opening of calls whose arguments are JSON objects, and its rules."""
    names = [f"call_{number}" for number in range(len(use.functions))]
    more = f"({_sequence(form.between, split, form)} call)*" if use.parallel and form.between is not None else ""
    rules = [f"call: {' | '.join(names)}"]
    for name, function in zip(names, use.functions, strict=True):
        arguments = json.dumps(function.schema(), ensure_ascii=False)
        rules.append(f"{name}: {_quoted(function.name)} {_sequence(form.middle, split, form)} {name}_arguments")
        rules.append(f"{name}_arguments: %json {arguments}")
    return f"call {more} {_sequence(form.closing, split, form)}", rules


def _free_start(form: ToolForm, use: ToolUse, body: str, split: Split) -> list[str]:
    """The rules of a reply that may be text, and may have text before its calls. A reply that begins like a call of
    an offered function without its marker is one."""
    text = f"/{_ANY_TEXT}/"
    if not form.marker:
        return [
            f"start: TEXT | {_sequence(form.opening, split, form)} {body}",
            f"TEXT: {text} & ~/{form.pattern(form.opening)}{_ANY_TEXT}/",
        ]
    wholes, rules, heads = "", list[str](), list[str]()
    for number, bare in enumerate(form.bare):
        for index, function in enumerate(use.functions):
            head = form.pattern(bare.opening + function.name + bare.middle)
            heads.append(WHITE_SPACE + head.removeprefix(WHITE_SPACE))
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
        text += f" & ~/{_ANY_TEXT}{form.pattern(form.marker)}{_ANY_TEXT}/"
    return [*start, f"TEXT: {text}", *rules]


# ---------------------------------------------------------------- arguments one by one


def _separate_calls(form: ToolForm, use: ToolUse, split: Split) -> tuple[str, list[str]]:
    """What follows the opening of calls whose arguments are written one by one, and its rules. Arguments stand in the
    order of the schema; what it does not name may follow.

    A text ends lazily with the mark after a value, so that mark is a part of the value's rule, and what follows a value
    begins after it.
    """
    assert form.separate is not None
    white, mark = form.value_end
    parallel = use.parallel and form.between is not None

    def ends(closing: str, between: str) -> str:
        more = f" | ({_sequence(between, split, form)} calls)" if parallel else ""
        return f"({_sequence(closing, split, form) or _EMPTY}{more})"

    after = ends(form.past_value(form.closing), form.past_value(form.between or ""))
    nones = form.separate.none_closing, form.separate.none_between
    first, *others = split(mark)
    rest = " ".join(_piece(piece, form) for piece in others)
    lazy, end = ("[lazy]", _quoted(first)) if isinstance(first, str) else ("", _piece(first, form))
    value = f"/{_ANY_TEXT}/" + ("" if lazy else f" & ~/{_ANY_TEXT}{form.pattern(mark)}{_ANY_TEXT}/")
    rules = [
        f"calls: {' | '.join(f'call_{number}' for number in range(len(use.functions)))}",
        f"after: {after}",
        f"none: {ends(*(text.removeprefix(form.name_end) for text in nones))}",
        f"marked: {_sequence(white + mark, split, form)}",
        f"text: any_text {rest}",
        f"any_text{lazy}: TEXT_VALUE {end}",
        f"plain_text: any_plain_text {rest}",
        f"any_plain_text{lazy}: PLAIN_VALUE {end}",
        f"TEXT_VALUE: {value}",
        f"PLAIN_VALUE: {value} & ~/{_STRUCTURE}{_ANY_TEXT}/",
    ]
    values = _Values(form, split)
    for number, function in enumerate(use.functions):
        rules += _separate_call(f"call_{number}", function, form, form.separate, split, values)
    return "calls", [*rules, *values.rules]


def _separate_call(
    name: str, function: Function, form: ToolForm, separate: SeparateArguments, split: Split, values: _Values
) -> Iterator[str]:
    """The rules of a call, from the name of the function on."""
    function.check_arguments()
    head = _sequence(form.middle.removeprefix(form.name_end), split, form)
    middle = _sequence(separate.middle, split, form)
    more = _sequence(form.past_value(separate.between), split, form)
    arguments = [(key, one.without(form.value_end[1])) for key, one in function.arguments.items()]
    _check_writable(arguments, form, separate)
    arguments = [(key, one) for key, one in arguments if one.possible and separate.middle not in key]
    others = function.others if function.others and function.others.possible else None
    starts, last = list[str](), len(arguments)
    for index, (key, argument) in enumerate(arguments):
        value = values.rule(argument, function)
        yield f"{name}_{index}: {_quoted(key)} {middle} {value} {name}_then_{index + 1}"
        later = "" if argument.required else f" | {name}_then_{index + 1}"
        yield f"{name}_then_{index}: {more} {name}_{index}{later}"
        if not any(earlier.required for _, earlier in arguments[:index]):
            starts.append(f"{head} {name}_{index}")
    may_be_none = not any(argument.required for _, argument in arguments)
    if others is not None:
        named = f" & ~/({'|'.join(form.pattern(key) for key in function.arguments)})/" if function.arguments else ""
        yield f"{name.upper()}_KEY: /{_KEY}/{named}"
        yield f"{name}_other: {name.upper()}_KEY {middle} {values.rule(others, function)} {name}_then_{last}"
        starts += [f"{head} {name}_other"] * may_be_none
    yield f"{name}_then_{last}: after{'' if others is None else f' | {more} {name}_other'}"
    starts += ["none"] * may_be_none
    yield f"{name}: {_quoted(function.name)} {_sequence(form.name_end, split, form)} {name}_arguments"
    yield f"{name}_arguments: {' | '.join(starts)}"


def _check_writable(arguments: list[tuple[str, Argument]], form: ToolForm, separate: SeparateArguments) -> None:
    """Raises InvalidRequest for a required argument that this form cannot write."""
    for key, argument in arguments:
        if argument.required and (separate.middle in key or not argument.possible):
            raise InvalidRequest(
                f"the schema cannot be followed: {key!r} or each of its values contains {separate.middle!r} or "
                f"{form.value_end[1]!r}, which this base writes around arguments",
                param="tools",
                hint="Choose another name for the argument, or other values.",
            )


class _Values:
    """The rules of values and of the mark after each, one for all arguments that may be the same."""

    def __init__(self, form: ToolForm, split: Split) -> None:
        self.rules: list[str] = []
        self._form = form
        self._split = split
        self._names: dict[str, str] = {}

    def rule(self, argument: Argument, function: Function) -> str:
        """The name of the rule."""
        about = [argument.schema, sorted(argument.types), argument.texts, function.guidance]
        key = json.dumps(about, ensure_ascii=False)
        if key not in self._names:
            self._names[key] = f"value_{len(self._names)}"
            self.rules += self._rules(self._names[key], argument, function)
        return self._names[key]

    def _rules(self, name: str, argument: Argument, function: Function) -> Iterator[str]:
        """A text that is JSON of another type which the argument may have counts as such, so only what begins like an
        object or a list has to be kept out of the texts there."""
        structures, others = argument.types & STRUCTURES, argument.types - {"string"}
        options = []
        if "string" in argument.types:
            if argument.texts is None:
                options, others = ["plain_text" if structures else "text"], structures
            elif argument.texts:
                options = [f"{name}_texts"]
                yield from self._one_of(f"{name}_texts", argument.texts)
        if others:
            options.append(f"{name}_json marked")
            schema = argument.schema if "string" not in argument.types else _only(others, argument.schema)
            yield f"{name}_json: %json {json.dumps(schema | {'x-guidance': function.guidance}, ensure_ascii=False)}"
        yield f"{name}: {' | '.join(options)}"

    def _one_of(self, name: str, texts: Collection[str]) -> Iterator[str]:
        """One of the texts, with the mark. The mark is a part of the terminal if it is text: a terminal takes as much
        as it can, and one text may be the beginning of another with the mark."""
        said = "|".join(self._form.pattern(text) for text in texts if text)
        mark = "".join(self._form.value_end)
        whole = self._split(mark) == [mark]
        options = [f"{name.upper()} {'' if whole else 'marked'}"] if said else []
        yield f"{name}: {' | '.join([*options, *['marked'] * ('' in texts)])}"
        if said:
            yield f"{name.upper()}: /({said}){self._form.pattern(mark) if whole else ''}/"


def _only(types: Collection[str], schema: Json) -> Json:
    """The schema, with values of these types alone."""
    own = {key: value for key, value in schema.items() if key != "$defs"}
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return definitions | {"allOf": [own, {"type": sorted(types)}]}


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
    return f"/{form.pattern(piece)}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
