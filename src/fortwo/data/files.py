"""Dataset files, row after row, in memory that does not grow with the file.

.jsonl has an object a line, .json one list of objects, .txt paragraphs between blank lines, each a row of plain text.
UTF-8. A row comes with its place; what cannot be read is refused with its line. Knows no kinds of row.
"""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fortwo.data.shapes import Place
from fortwo.errors import InvalidDataset

CHUNK_BYTES = 1 << 20
ROW_BYTES = 16 << 20  # a longer row is no row: a list where lines should be, most likely

_DECODER = json.JSONDecoder()
_SYNTAX = "Correct the file there; a .json file is one list, a .jsonl file has one object a line."


def read(path: Path) -> Iterator[tuple[Place, object]]:
    """The file's rows. Raises InvalidDataset."""
    readers = {".jsonl": _lines, ".json": _list, ".txt": _paragraphs}
    if path.suffix not in readers:
        raise InvalidDataset(
            f"{path} is neither .json, .jsonl nor .txt",
            param="dataset.path",
            hint="Save the rows as a JSON list (.json) or one JSON object a line (.jsonl), or plain text as .txt; "
            "unpack what is compressed.",
        )
    try:
        with path.open("rb") as file:
            yield from readers[path.suffix](path, file)
    except OSError as error:
        raise InvalidDataset(
            f"{path} cannot be read: {error.strerror}", param="dataset.path", hint="Make it readable for the server."
        ) from None


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[Place, object]]:
    """One JSON object a line; blank lines are passed over."""
    count = 0
    for number, line in _text_lines(path, file):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(path, error.msg, number, error.colno) from None
            except (ValueError, RecursionError) as error:
                raise _unparsable(path, number, error) from None
            yield Place(f"{path} line {number}", f"dataset[{count}]", number), row
            count += 1


def _paragraphs(path: Path, file: BinaryIO) -> Iterator[tuple[Place, object]]:
    """{"text": ...} for every paragraph; its line is its first."""
    began, count, size = 0, 0, 0
    paragraph: list[str] = []
    for number, line in _text_lines(path, file, end="\n"):
        if line.strip():
            began = began if paragraph else number
            paragraph.append(line.rstrip("\r\n"))
            size += len(line)
            if size > ROW_BYTES:
                raise _too_long(path, began)
        elif paragraph:
            yield Place(f"{path} line {began}", f"dataset[{count}]", began), {"text": "\n".join(paragraph)}
            paragraph, count, size = [], count + 1, 0


def _text_lines(path: Path, file: BinaryIO, end: str = "") -> Iterator[tuple[int, str]]:
    """Numbered lines; `end` comes after the last one."""
    number, place = 0, 0
    while raw := file.readline(ROW_BYTES + 1):
        number += 1
        if len(raw) > ROW_BYTES:
            raise _too_long(path, number)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, place + error.start + 1) from None
        place += len(raw)
    if end:
        yield number + 1, end


def _list(path: Path, file: BinaryIO) -> Iterator[tuple[Place, object]]:
    """The elements of one JSON list."""
    text = _Window(path, file)
    if text.peek() != "[":
        raise InvalidDataset(
            f"{path} holds {reprlib.repr(text.value())}, not a list of rows",
            param="dataset.path",
            hint="Put the rows between [ and ], or one row a line into a .jsonl file.",
        )
    text.advance(1)
    count, mark = 0, "]" if text.peek() == "]" else ","
    while mark == ",":
        text.peek()
        place = Place(f"{path} row {count + 1} (line {text.line})", f"dataset[{count}]", text.line)
        yield place, text.value()
        count, mark = count + 1, text.peek()
        if mark not in (",", "]"):
            raise _not_json(path, "Expecting ',' delimiter", text.line, text.column)
        if mark == ",":
            text.advance(1)
    text.advance(1)
    if text.peek():
        raise _not_json(path, "Extra data", text.line, text.column)


class _Window:
    """A text file through a window that slides: what was taken is forgotten, what is needed is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False
        self._bytes = 0
        self.line = 1
        self.column = 1

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in " \t\r\n":
                rest += 1
            self.advance(rest - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def advance(self, count: int) -> None:
        end = self._at + count
        breaks = self._text.count("\n", self._at, end)
        self.line += breaks
        self.column = end - self._text.rindex("\n", self._at, end) if breaks else self.column + count
        self._at = end

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            error: json.JSONDecodeError | None = None
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as found:
                error = found
            except (ValueError, RecursionError) as found:  # a number of thousands of digits, nesting without end
                raise _unparsable(self._path, self.line, found) from None
            else:
                # A number may go on behind the window.
                if self._ended or self._text[end : end + 1] in (" ", "\t", "\r", "\n", ",", "]"):
                    self.advance(end - self._at)
                    return value
            if self._ended and error is not None:
                self.advance(error.pos - self._at)
                raise _not_json(self._path, error.msg, self.line, self.column)
            if len(self._text) - self._at > ROW_BYTES:
                raise _too_long(self._path, self.line)
            self._more()

    def _more(self) -> None:
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text) - self._at))
        self._ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            held = len(error.object) - len(chunk)
            raise _not_utf8(self._path, self._bytes - held + error.start + 1) from None
        self._bytes += len(chunk)
        self._text = self._text[self._at :] + text
        self._at = 0


def _not_json(path: Path, problem: str, line: int, column: int) -> InvalidDataset:
    return InvalidDataset(
        f"{path} is not JSON: {problem} at line {line}, column {column}", param="dataset.path", hint=_SYNTAX
    )


def _unparsable(path: Path, line: int, error: Exception) -> InvalidDataset:
    return InvalidDataset(f"{path} cannot be parsed at line {line}: {error}", param="dataset.path", hint=_SYNTAX)


def _not_utf8(path: Path, byte: int) -> InvalidDataset:
    return InvalidDataset(f"{path} is not UTF-8: byte {byte}", param="dataset.path", hint="Save the file as UTF-8.")


def _too_long(path: Path, line: int) -> InvalidDataset:
    return InvalidDataset(
        f"{path} line {line}: the row is longer than {ROW_BYTES >> 20} MiB, or the JSON in it never ends",
        param="dataset.path",
        hint="Correct the file there, or split the row.",
    )
