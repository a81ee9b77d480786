"""The form in which a base's chat template writes calls of tools.

Families differ in how the assistant calls a tool: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, a list of
such objects after `[TOOL_CALLS]`, `{"name": ..., "parameters": ...}` alone, the name and then the arguments, or an
element for each argument. `data.tool_probes` learns the form from what the template itself writes, so no family has to
be known by name. The form serves three purposes: a grammar holds replies to it, a parser finds calls in replies, and
messages are handed to the template as it wants them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fortwo.data.json_schema import WHITE_SPACE
from fortwo.records import Json

ID = "\0"  # stands in the texts of a form for the id of a call
ID_PATTERN = "[a-zA-Z0-9_-]{1,64}"
SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")

_TOKENS = re.compile(r'\s+|[{}\[\],:"]|[^\s{}\[\],:"]+')
_JSON_BEGINS = re.compile(r"\s*(\[\s*)?\{")
_JSON_ENDS = re.compile(r"\s*\}(\s*\])?")
_TAG = re.compile(r"\s*(\S*[>\]]|\S+)")
_LAST_TAG = re.compile(r"[^\0]*[>\]]")


def pattern(text: str) -> str:
    """A regular expression for a text of a form with JSON. There may be any white space between the signs of JSON,
    because models do not always write as much as the template."""
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


def _beginning(*texts: str) -> str:
    """What the texts have in common at their beginning."""
    alike = itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*texts, strict=False))
    return "".join(signs[0] for signs in alike)


def tag(text: str) -> str:
    """The first tag of a text, or its first word where that is none; "" if there is none."""
    found = _TAG.match(text)
    return found[1] if found else ""


def _escaped(text: str) -> str:
    return re.sub(r"([!-/:;=?@\[-^`{-~])", r"\\\1", text).replace("\n", r"\n")


@dataclass(frozen=True)
class SeparateArguments:
    """How arguments are written one by one: key, `middle`, value; for each further argument `between`, key, `middle`,
    value. A string stands as it is, and any other value as JSON.

    none_between, none_closing: what follows the name of a function without arguments, before another call and after the
    last one. as_text: the template gets values that are no strings as JSON text, because it writes them otherwise.
    """

    middle: str
    between: str
    none_between: str
    none_closing: str
    as_text: bool = False


@dataclass(frozen=True)
class ToolForm:
    """A message's calls are `opening`, name, `middle`, arguments as a JSON object; for each further call `between`,
    name, `middle`, arguments; then `closing`. Control tokens are spelled out, and ID stands for the id of a call.

    between: None where a message holds one call at most. arguments_as_text: the template takes the arguments of a call
    as JSON text, not as an object. short_ids: it takes only ids of nine letters and digits. lead: the white space that
    it writes before the opening. separate: the arguments are no JSON object, but written one by one.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    arguments_as_text: bool = False
    short_ids: bool = False
    lead: str = ""
    separate: SeparateArguments | None = None

    def pattern(self, text: str) -> str:
        """A regular expression, in the syntax that Python and Rust share, for a text of the form. ID stands for any id.
        White space is free between the signs of JSON."""
        return pattern(text) if self.separate is None else _escaped(text).replace(ID, ID_PATTERN)

    @cached_property
    def marker(self) -> str:
        """The text with which calls begin within a reply; "" where their JSON follows nothing, so that only a whole
        reply can be a call."""
        before_id = self.opening.partition(ID)[0]
        if self.separate is not None:
            first = tag(before_id)
            return first if first.endswith((">", "]")) else before_id.rstrip()
        found = _JSON_BEGINS.search(before_id)
        return (before_id[: found.start()] if found else before_id).rstrip()

    @cached_property
    def bare(self) -> tuple[ToolForm, ...]:
        """How calls without their marker begin: so small models write them as a whole reply. Those with JSON are one
        call, alone and in a block of Markdown; of others only the opening is left out. Empty where nothing shows what
        a call is without its marker, or it has none anyway."""
        rest = self.opening.removeprefix(self.marker).lstrip()
        if self.separate is not None:
            return (ToolForm(rest, self.name_end, None, ""),) if rest and self.name_end and ID not in rest else ()
        closers = _JSON_ENDS.match(self.closing)
        if not self.marker or not _JSON_BEGINS.match(rest) or closers is None or ID in rest + self.closing:
            return ()
        fence = "```"
        return (
            ToolForm(rest, self.middle, None, closers[0]),
            ToolForm(f"{fence}json\n{rest}", self.middle, None, f"{closers[0]}\n{fence}"),
        )

    @cached_property
    def value_end(self) -> tuple[str, str]:
        """What ends each value of separate arguments: white space, and the text that no string can contain."""
        assert self.separate is not None
        shared = _beginning(self.separate.between, self.closing, self.between or self.closing).partition(ID)[0]
        mark = tag(shared).rstrip("<[{(")
        return shared[: shared.find(mark)], mark

    @cached_property
    def name_end(self) -> str:
        """The tag that ends the name of a function whether separate arguments follow it or not; "" if there is none."""
        assert self.separate is not None
        none = self.separate.none_closing
        found = _LAST_TAG.match(_beginning(self.middle, none, self.separate.none_between or none))
        return found[0] if found else ""

    def past_value(self, text: str) -> str:
        """What follows the end of a value in a text that begins with it."""
        return text.removeprefix("".join(self.value_end))

    @property
    def texts(self) -> tuple[str, ...]:
        whole = self.opening, self.middle, self.between or "", self.closing
        one = self.separate
        return whole if one is None else (*whole, one.middle, one.between, one.none_between, one.none_closing)

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
        given = call["function"]["arguments"]
        if self.arguments_as_text:
            formed["function"] = call["function"] | {"arguments": json.dumps(given, ensure_ascii=False)}
        if self.separate is not None and self.separate.as_text:
            texts = {
                key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for key, value in given.items()
            }
            formed["function"] = call["function"] | {"arguments": texts}
        if id := call.get("id"):
            formed["id"] = self._id(id)
        return formed

    def _id(self, given: str) -> str:
        if not self.short_ids or SHORT_ID.fullmatch(given):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[:9]


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
