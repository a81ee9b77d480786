"""The form in which a base's chat template writes calls of tools, learned from what the template itself writes.

Families differ in how the assistant calls a tool: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, a list of
such objects after `[TOOL_CALLS]`, `{"name": ..., "parameters": ...}` alone, or the name and then the arguments. A
conversation with calls of made-up tools is rendered, and what stands around their names and arguments is the form. So
no family has to be known by name. The form serves three purposes: a grammar holds replies to it, a parser finds calls
in replies, and messages are handed to the template as it wants them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.data.template_environment import TemplateFailure, TemplateRefusal
from fortwo.records import Json

ID = "\0"  # stands in the texts of a form for the id of a call
ID_PATTERN = "[a-zA-Z0-9_-]{1,64}"
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")

Apply = Callable[[list[Json], "list[Json] | None", bool], str]
"""The template's text, control tokens included: of messages, of tools, and with or without the generation prompt."""

_TOKENS = re.compile(r'\s+|[{}\[\],:"]|[^\s{}\[\],:"]+')
_JSON_BEGINS = re.compile(r"\s*(\[\s*)?\{")
_JSON_ENDS = re.compile(r"\s*\}(\s*\])?")
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
_ASKED: Json = {"role": "user", "content": "Hello"}


def pattern(text: str) -> str:
    """A regular expression, in the syntax that Python and Rust share, for a text of a form. ID stands for any id. There
    may be any white space between the signs of JSON, because models do not always write as much as the template."""
    tokens = _TOKENS.findall(text)
    parts: list[str] = []
    for index, token in enumerate(tokens):
        if token.isspace():
            free = _is_free(tokens, index - 1) or _is_free(tokens, index + 1)
            parts.append(WHITE_SPACE if free else _escaped(token))
            continue
        if _are_apart(tokens, index - 1, index):
            parts.append(WHITE_SPACE)
        parts.append(_escaped(token))
    if tokens and _is_free(tokens, len(tokens) - 1) and tokens[-1] in _BRACKETS + ":":  # arguments may follow
        parts.append(WHITE_SPACE)
    return "".join(parts).replace(ID, ID_PATTERN)


_BRACKETS = "{}[]"


def _is_free(tokens: Sequence[str], index: int) -> bool:
    """Whether there is a sign of JSON at the index. A bracket around a word, as in [NAME], is none."""
    if not 0 <= index < len(tokens) or tokens[index] not in tuple('{}[]:,"'):
        return False
    inside = {"[": tokens[index + 1 : index + 2], "]": tokens[max(0, index - 1) : index]}.get(tokens[index], [])
    return not any(re.match(r"[^\s{}\[\],:\"]", one) for one in inside)


def _are_apart(tokens: Sequence[str], before: int, after: int) -> bool:
    """Whether white space may stand between two neighbours: between signs of JSON, and around its brackets, but not
    within its strings."""
    left, right = _is_free(tokens, before), _is_free(tokens, after)
    if left and right:
        return not tokens[before] == tokens[after] == '"'
    if left:
        return tokens[before] in _BRACKETS and not tokens[after].isspace()
    if right and before < 0:
        return tokens[after] in _BRACKETS + ","
    return right and tokens[after] in _BRACKETS and not tokens[before].isspace()


def _escaped(text: str) -> str:
    return re.sub(r"([!-/:;=?@\[-^`{-~])", r"\\\1", text).replace("\n", r"\n")


class UnknownForm(Exception):
    """The template writes no tools, or their calls in a form that cannot be learned; the text says which."""


class _Unreadable(UnknownForm):
    """The template cannot do with the arguments as they were handed over."""


@dataclass(frozen=True)
class ToolForm:
    """A message's calls are `opening`, name, `middle`, arguments as a JSON object; for each further call `between`,
    name, `middle`, arguments; then `closing`. Control tokens are spelled out, and ID stands for the id of a call.

    between: None where a message holds one call at most. arguments_as_text: the template takes the arguments of a call
    as JSON text, not as an object. short_ids: it takes only ids of nine letters and digits.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    arguments_as_text: bool = False
    short_ids: bool = False

    @cached_property
    def marker(self) -> str:
        """The text with which calls begin within a reply; "" where their JSON follows nothing, so that only a whole
        reply can be a call."""
        before_id = self.opening.partition(ID)[0]
        found = _JSON_BEGINS.search(before_id)
        return (before_id[: found.start()] if found else before_id).rstrip()

    @cached_property
    def bare(self) -> tuple[ToolForm, ...]:
        """The JSON of a call without its marker, alone and in a block of Markdown: so small models write it as a whole
        reply. Empty where a call is no JSON by itself, or has no marker anyway."""
        rest = self.opening.removeprefix(self.marker).lstrip()
        closers = _JSON_ENDS.match(self.closing)
        if not self.marker or not _JSON_BEGINS.match(rest) or closers is None or ID in rest + self.closing:
            return ()
        fence = "```"
        return (
            ToolForm(rest, self.middle, None, closers[0]),
            ToolForm(f"{fence}json\n{rest}", self.middle, None, f"{closers[0]}\n{fence}"),
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return self.opening, self.middle, self.between or "", self.closing

    def messages(self, messages: Sequence[Json]) -> list[Json]:
        """The messages as the template takes them: with arguments and ids of calls in its form."""
        return [self._message(message) for message in (_with_ids(messages) if self._needs_ids else messages)]

    @property
    def _needs_ids(self) -> bool:
        return self.short_ids or any(ID in text for text in self.texts)

    def _message(self, message: Json) -> Json:
        formed = dict(message)
        if calls := message.get("tool_calls"):
            formed["tool_calls"] = [self._call(call) for call in calls]
        if given := message.get("tool_call_id"):
            formed["tool_call_id"] = self._id(given)
        return formed

    def _call(self, call: Json) -> Json:
        formed = dict(call)
        if self.arguments_as_text:
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            formed["function"] = call["function"] | {"arguments": text}
        if given := call.get("id"):
            formed["id"] = self._id(given)
        return formed

    def _id(self, given: str) -> str:
        if not self.short_ids or SHORT_ID.fullmatch(given):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:9]


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
            calls = _probe_calls(ids, as_text)
            try:
                one = _turn(apply, prompt, calls[:1], ends)
                if not as_text and repr(_ARGUMENTS[0]) in one:
                    raise _Unreadable("it writes the arguments of a call as Python does")
                return _form(one, _turn(apply, prompt, calls, ends), ids, as_text)
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


def _probe_calls(ids: Sequence[str], as_text: bool) -> list[Json]:
    return [
        {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for id, name, arguments in zip(ids, _NAMES, _ARGUMENTS, strict=True)
    ]


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
    opening, middle, closing = _parts(one, 0)
    for id in ids:
        opening, middle, closing = (text.replace(id, ID) for text in (opening, middle, closing))
    if any(id[-9:] in text for id in ids for text in (opening, middle, closing)):
        raise UnknownForm("it writes a part of an id")
    opening = opening.lstrip()
    if not opening:
        raise UnknownForm("nothing in what it writes shows where a call begins")
    return ToolForm(opening, middle, _between(two, ids, (opening, middle, closing)), closing, as_text, ids is _IDS[1])


def _between(two: str, ids: Sequence[str], parts: tuple[str, str, str]) -> str | None:
    """What stands between two calls; None if they are not written like one call."""
    try:
        opening, middle, rest = _parts(two, 0)
        between, second, closing = _parts(rest, 1)
    except UnknownForm:
        return None
    for id in ids:
        opening, middle, between, second, closing = (
            text.replace(id, ID) for text in (opening, middle, between, second, closing)
        )
    same = (opening.lstrip(), middle, closing) == parts and second == middle
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
    raise UnknownForm("it does not write the arguments of a call as a JSON object after the name of the function")


def _with_ids(messages: Sequence[Json]) -> list[Json]:
    """The messages, in which each call has an id, and each result that of the call that it answers: results without
    ids answer the calls in their order."""
    known = {call["id"] for message in messages for call in message.get("tool_calls", ()) if call.get("id")}
    fresh = (id for id in (f"call{number:05}" for number in range(1, 100_000)) if id not in known)
    open_ids: list[str] = []
    completed = []
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [call if call.get("id") else call | {"id": next(fresh)} for call in calls]
            message = message | {"tool_calls": calls}
            open_ids = [call["id"] for call in calls]
        elif message["role"] == "tool":
            id = message.get("tool_call_id") or (open_ids[0] if open_ids else next(fresh))
            open_ids = [other for other in open_ids if other != id]
            message = message | {"tool_call_id": id}
        completed.append(message)
    return completed
