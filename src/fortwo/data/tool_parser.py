"""Finds the calls of tools in a reply while it arrives: its text, the names that are called, and their arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fortwo.data.tool_form import ToolForm, pattern


@dataclass(frozen=True)
class CallDelta:
    """A part of the call with this index. name: only in a call's first part, which has no arguments. arguments: the
    next piece of their JSON text."""

    index: int
    name: str = ""
    arguments: str = ""


class ToolCallParser:
    """Reads one reply in a form. White space between text and a call is part of neither.

    names: of the functions that a call without a marker may name. calls: how many calls are complete.
    """

    def __init__(self, form: ToolForm, names: Iterable[str]) -> None:
        self._marker = form.marker
        self._marked = re.compile(pattern(form.opening))
        if form.marker:
            heads = {bare.opening + name + bare.middle: bare.opening for name in names for bare in form.bare}
        else:
            heads = {form.opening: form.opening}
        self._heads = heads  # what a reply that is a call by itself begins with, and its part before the name
        self._named = re.compile("([a-zA-Z0-9_.-]+)" + pattern(form.middle) + r"(?=\s*\{)")
        self._between = None if form.between is None else re.compile(pattern(form.between))
        self._state: Literal["text", "name", "arguments", "after"] = "text"
        self._at_start = True
        self._buffer = ""
        self._scanner = _ObjectScanner()
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
        """The text that was held back and did not become a call, when the reply has ended."""
        rest, self._buffer = self._buffer if self._state == "text" else "", ""
        return [rest] if rest else []

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
                    self._state, self._scanner = "arguments", _ObjectScanner()
            case "arguments":
                text = self._buffer if self._scanner.begun else self._buffer.lstrip()
                piece = self._scanner.take(text)
                self._buffer = text[len(piece) :]
                if piece:
                    found.append(CallDelta(self._index, arguments=piece))
                if self._scanner.done:
                    self._state, self.calls = "after", self.calls + 1
            case "after":
                if self._between is not None and (between := self._between.match(self._buffer)):
                    self._buffer = self._buffer[between.end() :]
                    self._state, self._index = "name", self._index + 1
        return (self._state, self._index) != before

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
        if head is not None and re.match(pattern(head), text):
            opened = re.match(pattern(self._heads[head]), text)
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


class _ObjectScanner:
    """Finds the end of a JSON object that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = False
        self.done = False

    def take(self, text: str) -> str:
        """The part of the text that belongs to the object."""
        self.begun |= bool(text)
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
                    return text[:position]
        return text
