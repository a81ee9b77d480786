"""Learns the form of calls from a chat template, by what it writes of conversations with calls of made-up tools.

What stands around the names and the arguments of those calls is the form. If the template writes the arguments as no
JSON object, calls with three arguments, with one, with none, and with values that are no strings show how it writes
them one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from fortwo.data.template_environment import TemplateFailure, TemplateRefusal
from fortwo.data.tool_form import ID, SeparateArguments, ToolForm
from fortwo.records import Json

Apply = Callable[[list[Json], "list[Json] | None", bool], str]
"""The template's text, control tokens included: of messages, of tools, and with or without the generation prompt."""

_NAMES = ("probe_function_one", "probe_function_two")
_ARGUMENTS = ({"probe_key_one": "probe value one"}, {"probe_key_two": "probe value two"})
_IDS = (("call_0probe1one0probe1one0", "call_0probe2two0probe2two0"), ("probe1one", "probe2two"))  # any, and short
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A function.",
            "parameters": {"type": "object", "properties": {key: {"type": "string", "description": "A text."}}},
        },
    }
    for name, arguments in zip(_NAMES, _ARGUMENTS, strict=True)
    for key in arguments
]
_THIRD: Json = {"probe_key_three": "probe value three"}
_STRINGS = ('He said "no",\n<b>yes</b> \\ {0} & more', f"é\t{'long ' * 40}.", "17", "true", "[1]", '{"a": null}', "")
_VALUES: tuple[Any, ...] = (17, -2.5, True, False, None, ["probe item", {"probe": None}], {"probe": [1, False]}, [], {})
_ASKED: Json = {"role": "user", "content": "Hello"}


class UnknownForm(Exception):
    """The template writes no tools, or their calls in a form that cannot be learned; the text says which."""


class _Unreadable(UnknownForm):
    """The template cannot do with the arguments as they were handed over."""


class _NoObject(UnknownForm):
    """The template does not write the arguments as a JSON object."""


def learn_form(apply: Apply, ends: Collection[str]) -> ToolForm:
    """The form that the template writes. ends: the texts of the tokens that end a reply. Raises UnknownForm."""
    try:
        prompt = apply([_ASKED], _TOOLS, True)
        if prompt == apply([_ASKED], None, True):
            raise UnknownForm("it does not write the tools that are offered")
    except (TemplateRefusal, TemplateFailure) as error:
        raise UnknownForm(f"it refuses tools: {error}") from None
    _check_answer(apply, prompt)
    reasons: list[str] = []
    for as_text in (False, True):
        for ids in _IDS:
            calls = [_call(*probe, as_text) for probe in zip(ids, _NAMES, _ARGUMENTS, strict=True)]
            try:
                one = _turn(apply, prompt, calls[:1], ends)
                if not as_text and repr(_ARGUMENTS[0]) in one:
                    raise _Unreadable("it writes the arguments of a call as Python does")
                return _form(one, _turn(apply, prompt, calls, ends), ids, as_text)
            except _NoObject:
                return _separate_form(partial(_turn, apply, prompt, ends=ends))
            except UnknownForm as error:
                reasons.append(str(error))
                unreadable = isinstance(error, _Unreadable)
        if not unreadable:  # a template that reads an object does not want text
            break
    raise UnknownForm(reasons[0])


def _check_answer(apply: Apply, prompt: str) -> None:
    """Raises UnknownForm for a template that writes something between the prompt and the text of an answer: a reply
    then has control tokens of its own."""
    with suppress(TemplateRefusal, TemplateFailure):
        whole = apply([_ASKED, {"role": "assistant", "content": "Answer"}], _TOOLS, False)
        if whole.startswith(prompt) and not whole.removeprefix(prompt).lstrip().startswith("Answer"):
            raise UnknownForm("it writes more than the text of an answer into the assistant's turn")


def _call(id: str, name: str, arguments: Json, as_text: bool = False) -> Json:
    given = json.dumps(arguments) if as_text else arguments
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given}}


def _turn(apply: Apply, prompt: str, calls: list[Json], ends: Collection[str]) -> str:
    """What the template writes after the generation prompt for an assistant that makes these calls, up to the end of
    its turn; "" for several calls that it refuses. Raises UnknownForm."""
    try:
        whole = apply([_ASKED, {"role": "assistant", "content": "", "tool_calls": calls}], _TOOLS, False)
    except (TemplateRefusal, TemplateFailure) as error:
        if len(calls) > 1:
            return ""
        raise _Unreadable(f"it refuses an assistant's call: {error}") from None
    if not whole.startswith(prompt):
        raise UnknownForm("it writes a finished call differently from the prompt that asks for it")
    turn = whole.removeprefix(prompt)
    end = min((turn.find(end) for end in ends if end in turn), default=len(turn))
    return turn[:end] if end < len(turn) else turn.rstrip()


def _form(one: str, two: str, ids: Sequence[str], as_text: bool) -> ToolForm:
    """The form of a turn with one call and of one with two. Raises UnknownForm."""
    opening, middle, closing = _parts(_without_ids(one, ids), 0)
    between = _between(_without_ids(two, ids), (opening, middle, closing))
    lead, opening = _opening(opening)
    return ToolForm(opening, middle, between, closing, as_text, ids is _IDS[1], lead)


def _without_ids(text: str, ids: Sequence[str]) -> str:
    """The text with ID for each id. Raises UnknownForm."""
    for id in ids:
        text = text.replace(id, ID)
    if any(id[-9:] in text for id in ids):
        raise UnknownForm("it writes a part of an id")
    return text


def _opening(text: str) -> tuple[str, str]:
    """The white space before the opening of a call, and the opening. Raises UnknownForm."""
    opening = text.lstrip()
    if not opening:
        raise UnknownForm("nothing in what it writes shows where a call begins")
    return text.removesuffix(opening), opening


def _between(two: str, parts: tuple[str, str, str]) -> str | None:
    """What stands between two calls; None if they are not written like one call."""
    try:
        opening, middle, rest = _parts(two, 0)
        between, second, closing = _parts(rest, 1)
    except UnknownForm:
        return None
    same = (opening, middle, closing) == parts and second == middle
    return between if same else None


def _parts(text: str, call: int) -> tuple[str, str, str]:
    """What stands before the name of a probe's call, between the name and the arguments, and after those."""
    name, arguments = _NAMES[call], _ARGUMENTS[call]
    before, found, rest = text.partition(name)
    if not found:
        raise UnknownForm("it does not write the name of the function that is called")
    for start in (match.start() for match in re.finditer(r"\{", rest)):
        try:
            value, end = json.JSONDecoder().raw_decode(rest, start)
        except ValueError:
            continue
        if value == arguments:
            if name in rest[:start] or name in rest[end:]:
                raise UnknownForm("it writes the name of the function more than once")
            return before, rest[:start], rest[end:]
    raise _NoObject


# ---------------------------------------------------------------- arguments one by one


def _separate_form(turn: Callable[[list[Json]], str]) -> ToolForm:
    """The form of a template that writes arguments one by one. turn: what it writes of calls. Raises UnknownForm."""
    reasons = []
    for ids in _IDS:
        try:
            return _separate(partial(_written, turn, ids), ids is _IDS[1])
        except UnknownForm as error:
            reasons.append(str(error))
    raise UnknownForm(
        "it does not write the arguments of a call as a JSON object after the name of the function, and how it writes "
        f"them one by one cannot be learned: {reasons[0]}"
    )


def _written(turn: Callable[[list[Json]], str], ids: Sequence[str], *arguments: Json) -> str:
    """The turn that calls as many of the made-up functions with these arguments."""
    calls = [_call(id, name, given) for id, name, given in zip(ids, _NAMES, arguments, strict=False)]
    return _without_ids(turn(calls), ids)


def _separate(written: Callable[..., str], short_ids: bool) -> ToolForm:
    """The form. written: gives the turn that calls functions with these arguments. Raises UnknownForm."""
    (name, _), (first, second) = _NAMES, _ARGUMENTS
    opening, head, middle, closing = _around(written(first), name, *_spoken(first))
    three = _around(written(first | second | _THIRD), name, *_spoken(first | second | _THIRD))
    between = three[3]
    if three != [opening, head, middle, between, middle, between, middle, closing]:
        raise UnknownForm("it writes an argument differently if there are others")
    none_opening, none_closing = _around(written({}), name)
    if none_opening != opening:
        raise UnknownForm("it writes the beginning of a call differently if there are no arguments")
    as_text = _needs_text(written, (opening + name + head, middle, closing))
    calls = _between_separate(written, (opening, head, middle, closing, none_closing))
    lead, opening = _opening(opening)
    separate = SeparateArguments(middle, between, calls[1] if calls else "", none_closing, as_text)
    between_calls = calls[0] if calls else None
    form = ToolForm(opening, head, between_calls, closing, short_ids=short_ids, lead=lead, separate=separate)
    _check_signs(form, separate)
    return form


def _spoken(arguments: Json) -> Iterator[str]:
    for key, value in arguments.items():
        yield from (key, value)


def _around(text: str, *parts: str) -> list[str]:
    """What stands before, between and after the parts in the text. Raises UnknownForm if they are not in it once, in
    this order."""
    found, rest = [], text
    for part in parts:
        if text.count(part) != 1:
            what = "the name of the function" if part in _NAMES else "the name or the value of an argument"
            raise UnknownForm(f"it writes {what} more than once" if part in text else f"it does not write {what}")
        before, there, rest = rest.partition(part)
        if not there:
            raise UnknownForm("it writes the parts of a call in another order")
        found.append(before)
    return [*found, rest]


def _needs_text(written: Callable[..., str], around: tuple[str, str, str]) -> bool:
    """Whether the template has to get values that are no strings as JSON text, because it writes them otherwise.

    around: what stands before the key, between key and value, and after the value. Raises UnknownForm if it changes
    strings, or writes values of some types between other texts.
    """
    ((key, _),) = _ARGUMENTS[0].items()
    head, middle, closing = around
    before, after = head + key + middle, closing

    def value(given: Any) -> str:
        text = written({key: given})
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before + after)):
            raise UnknownForm("it writes some values between other texts than others, or leaves them out")
        return text[len(before) : len(text) - len(after)]

    if any(value(text) != text for text in _STRINGS):
        raise UnknownForm("it does not write a string as it stands")
    return not all(_is_json(value(one), one) for one in _VALUES)


def _is_json(text: str, value: Any) -> bool:
    try:
        return json.dumps(json.loads(text)) == json.dumps(value)
    except ValueError:
        return False


def _between_separate(written: Callable[..., str], parts: tuple[str, str, str, str, str]) -> tuple[str, str] | None:
    """What stands between two calls, of which the first has arguments or none; None if they are not written like one
    call."""
    (name, other), (first, second) = _NAMES, _ARGUMENTS
    opening, head, middle, closing, none_closing = parts
    try:
        both = _around(written(first, second), name, *_spoken(first), other, *_spoken(second))
        only_second = _around(written({}, second), name, other, *_spoken(second))
        only_first = _around(written(first, {}), name, *_spoken(first), other)
    except UnknownForm:
        return None
    between, none_between = both[3], only_second[1]
    same = (
        both == [opening, head, middle, between, head, middle, closing]
        and only_second == [opening, none_between, head, middle, closing]
        and only_first == [opening, head, middle, between, none_closing]
    )
    return (between, none_between) if same else None


def _check_signs(form: ToolForm, one: SeparateArguments) -> None:
    """Raises UnknownForm where a reader could not tell the parts of a call from each other."""
    mark = form.value_end[1]
    if len(mark) < 2 or not mark.endswith((">", "]")):  # anything else may be a part of many strings
        raise UnknownForm("nothing in what it writes shows where a value ends")
    if any(ID in text for text in (form.middle, one.middle, one.between)):
        raise UnknownForm("it writes the id of a call among the arguments")
    if not one.middle:
        raise UnknownForm("nothing stands between an argument's name and its value")
    ends = [form.closing] if form.between is None else [form.closing, form.between]
    if any(_are_alike(form.past_value(one.between), form.past_value(end)) for end in ends):
        raise UnknownForm("nothing in what it writes shows whether another argument follows")
    nones = [one.none_closing] if form.between is None else [one.none_closing, one.none_between]
    if any(_are_alike(form.middle, none) for none in nones if none):
        raise UnknownForm("nothing in what it writes shows whether a call has arguments")
    if any(re.match(r"[a-zA-Z0-9_.-]", text) for text in (form.middle, *nones)) or not form.middle:
        raise UnknownForm("nothing in what it writes shows where the name of the function ends")


def _are_alike(text: str, other: str) -> bool:
    return text.startswith(other) or other.startswith(text)
