"""Finds the calls of tools in a reply while it arrives: its text, the names that are called, and their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fortwo.data.tool_form import ToolForm
from fortwo.data.tool_function import ANY, Function

_NAME = "([a-zA-Z0-9_.-]+)"


@dataclass(frozen=True)
class CallDelta:
    """A part of the call with this index. name: only in a call's first part, which has no arguments. arguments: the
    next piece of their JSON text."""

    index: int
    name: str = ""
    arguments: str = ""


class ToolCallParser:
    """Reads one reply in a form. White space between text and a call is part of neither.

    functions: those that a reply may call. calls: how many calls are complete.
    """

    def __init__(self, form: ToolForm, functions: Iterable[Function]) -> None:
        self._form = form
        self._functions = {function.name: function for function in functions}
        self._marker = form.marker
        self._marked = re.compile(form.pattern(form.opening))
        if form.marker:
            heads = {bare.opening + name + bare.middle: bare.opening for name in self._functions for bare in form.bare}
        else:
            heads = {form.opening: form.opening}
        self._heads = heads  # what a reply that is a call by itself begins with, and its part before the name
        self._named = re.compile(_NAME + form.pattern(form.middle) + ("" if form.separate else r"(?=\s*\{)"))
        self._between: re.Pattern[str] | None = None  # what stands between the last call and a further one
        self._state: Literal["text", "name", "arguments", "after"] = "text"
        self._at_start = True
        self._buffer = ""
        self._reader: _ObjectReader | _ArgumentReader = _ObjectReader()
        self._index = 0
        self.calls = 0

    @property
    def finished(self) -> bool:
        """Whether the reply has calls and none of them is incomplete."""
        return self._state == "after"

    def push(self, text: str) -> list[str | CallDelta]:
        """What the text adds to the reply: texts and parts of calls, in order."""
        self._buffer += text
        found: list[str | CallDelta] = []
        while self._step(found):
            pass
        return found

    def flush(self) -> list[str | CallDelta]:
        """What was held back, when the reply has ended: a text that did not become a call, or a call that nothing
        follows."""
        found: list[str | CallDelta] = []
        if self._state == "name":
            self._read_no_arguments(found, ended=True)
        rest, self._buffer = self._buffer if self._state == "text" else "", ""
        return [rest] if rest else found

    def _step(self, found: list[str | CallDelta]) -> bool:
        """Read as much of the buffer as the state allows. Returns whether the state changed."""
        before = self._state, self._index
        match self._state:
            case "text":
                self._read_text(found)
            case "name":
                if named := self._named.match(self._buffer):
                    found.append(CallDelta(self._index, named[1]))
                    self._buffer = self._buffer[named.end() :]
                    self._state, self._reader = "arguments", self._reader_of(named[1])
                else:
                    self._read_no_arguments(found)
            case "arguments":
                piece, self._buffer = self._reader.take(self._buffer)
                if piece:
                    found.append(CallDelta(self._index, arguments=piece))
                if self._reader.done:
                    between = self._form.between or ""
                    self._finish_call(between if self._form.separate is None else self._form.past_value(between))
            case "after":
                if self._between is not None and (further := self._between.match(self._buffer)):
                    self._buffer = self._buffer[further.end() :]
                    self._state, self._index = "name", self._index + 1
        return (self._state, self._index) != before

    def _finish_call(self, between: str) -> None:
        """A call is complete. between: what follows it if there is a further one."""
        self._state, self.calls = "after", self.calls + 1
        self._between = None if self._form.between is None else re.compile(self._form.pattern(between))

    def _reader_of(self, name: str) -> _ObjectReader | _ArgumentReader:
        if self._form.separate is None:
            return _ObjectReader()
        return _ArgumentReader(self._form, self._functions.get(name, Function(name, {})))

    def _read_no_arguments(self, found: list[str | CallDelta], ended: bool = False) -> None:
        """Complete a call whose name is not followed by arguments that are written one by one. ended: nothing more
        comes."""
        named, separate = re.match(_NAME, self._buffer), self._form.separate
        if named is None or separate is None:
            return
        rest = self._buffer[named.end() :]
        if rest == separate.none_closing if ended else not self._form.middle.startswith(rest):
            found += [CallDelta(self._index, named[1]), CallDelta(self._index, arguments="{}")]
            self._buffer = rest
            self._finish_call(separate.none_between)

    def _read_text(self, found: list[str | CallDelta]) -> None:
        """Show the text of the buffer up to what is, or may become, the opening of a call."""
        head = next((head for head in self._heads if self._at_start and _may_begin(self._buffer, head)), None)
        if head is None:
            end = _find(self._buffer, self._marker) if self._marker else len(self._buffer)
            shown = len(self._buffer[:end].rstrip())
            if shown:
                found.append(self._buffer[:shown])
                self._buffer, self._at_start = self._buffer[shown:], False
        text = self._buffer.lstrip()
        if head is not None and re.match(self._form.pattern(head), text):
            opened = re.match(self._form.pattern(self._heads[head]), text)
        else:
            opened = self._marked.match(text) if head is None and self._marker else None
        if opened:
            self._buffer, self._state = text[opened.end() :], "name"


def _may_begin(text: str, head: str) -> bool:
    """Whether the text begins with the head, or can still become so, whatever the white space."""
    said, wanted = "".join(text.split()), "".join(head.split())
    return said.startswith(wanted) or wanted.startswith(said)


def _find(text: str, marker: str) -> int:
    """Where the marker begins in the text, whole or cut off by the text's end; the text's length if it does not."""
    whole = text.find(marker)
    if whole >= 0:
        return whole
    longest = min(len(text), len(marker) - 1)
    return len(text) - next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


class _ObjectReader:
    """Reads a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False
        self.done = False

    def take(self, text: str) -> tuple[str, str]:
        """The part of the text that belongs to the object, and the rest."""
        text = text if self._begun else text.lstrip()
        self._begun |= bool(text)
        for position, character in enumerate(text, 1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return text[:position], text[position:]
        return text, ""


class _ArgumentReader:
    """Reads arguments that are written one by one and arrive in pieces, from the first one's key on."""

    def __init__(self, form: ToolForm, function: Function) -> None:
        assert form.separate is not None
        self._function = function
        self._middle = form.separate.middle
        self._white, self._mark = form.value_end
        self._more = form.past_value(form.separate.between)
        self._state: Literal["key", "value", "structure", "mark", "next"] = "key"
        self._key = ""
        self._argument = ANY
        self._structure = _ObjectReader()
        self._value = ""
        self._keys: set[str] = set()
        self.done = False

    def take(self, text: str) -> tuple[str, str]:
        """What the text adds to the JSON text of the arguments, and the rest of the text, which is not yet, or no
        longer, a part of them."""
        added = ""
        while not self.done:
            match self._state:
                case "key" if self._middle in text:
                    self._key, _, text = text.partition(self._middle)
                    function = self._function
                    self._argument = function.arguments.get(self._key) or function.others or ANY
                    self._state = "value"
                case "value" if self._argument.may_be_structure(text):
                    self._state, self._value, self._structure = "structure", "", _ObjectReader()
                case "value" if self._mark in text:
                    value, _, text = text.partition(self._mark)
                    added += self._written(value.removesuffix(self._white))
                    self._state = "next"
                case "structure" if text:
                    piece, text = self._structure.take(text)
                    self._value += piece
                    self._state = "mark" if self._structure.done else "structure"
                case "mark" if self._mark in text:
                    added += self._written(self._value)
                    text = text.partition(self._mark)[2]
                    self._state = "next"
                case "next" if text.startswith(self._more):
                    text = text.removeprefix(self._more)
                    self._state = "key"
                case "next" if not self._more.startswith(text):
                    added += "}"
                    self.done = True
                case _:
                    break
        return added, text

    def _written(self, value: str) -> str:
        """The JSON text of an argument, after what stands before it; "" for one that was given before."""
        if self._key in self._keys:
            return ""
        before = ", " if self._keys else "{"
        self._keys.add(self._key)
        return f"{before}{json.dumps(self._key, ensure_ascii=False)}: {self._argument.value(value)}"
