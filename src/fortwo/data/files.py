"""Reads dataset files row by row, in memory that does not grow with the file.

A .jsonl file has one object per line, a .json file is one list of objects, and a .txt file has paragraphs between blank
lines, each of which is a row of plain text. All are UTF-8. Tables (.csv, .tsv, .parquet) are read by `tables`.

Every row comes with its location. A row that cannot be read comes as an InvalidRow, so that the rows after it are read
too; what ends the reading is refused with its line. Row formats are not known here.
"""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fortwo import strict_json
from fortwo.data import tables
from fortwo.data.findings import Finding, Findings, InvalidRow, RowLocation
from fortwo.data.tables import ROW_BYTES, too_long
from fortwo.errors import InvalidDataset

CHUNK_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")

_SYNTAX = "Correct the file there. A .json file is one list; a .jsonl file has one object per line."


def read_rows(path: Path) -> Iterator[tuple[RowLocation, object]]:
    """The rows of a file, each with its location. Raises InvalidDataset when the file cannot be read or parsed."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidDataset(
            f"{path} is none of {', '.join(SUFFIXES)}",
            param="dataset.path",
            hint="Save the rows as a JSON list (.json) or as one JSON object per line (.jsonl), as a table with a "
            "header (.csv, .parquet), or plain text as .txt. Unpack compressed files.",
        )
    try:
        with path.open("rb") as file:
            match suffix:
                case ".jsonl":
                    yield from _lines(path, file)
                case ".json":
                    yield from _list(path, file)
                case ".txt":
                    yield from _paragraphs(path, file)
                case ".csv" | ".tsv":
                    yield from tables.read_csv(path, _text_lines(path, file))
                case _:
                    yield from tables.read_parquet(path, file)
    except OSError as error:
        raise InvalidDataset(
            f"{path} cannot be read: {error.strerror}", param="dataset.path", hint="Make it readable for the server."
        ) from None


def plain_rows(path: Path) -> list[object]:
    """All rows of a file, as they are written. Raises InvalidDataset with everything that could not be read."""
    rows, findings = [], Findings()
    for location, row in read_rows(path):
        rows.append(row)
        if isinstance(row, InvalidRow):
            findings.add(location, row.findings)
    if findings:
        raise findings.error(len(rows))
    return rows


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[RowLocation, object]]:
    """One JSON object per line; blank lines are skipped."""
    count = 0
    for number, line in _text_lines(path, file):
        if line.strip():
            location = RowLocation(f"{path} line {number}", f"dataset[{count}]", number)
            yield location, _row(line, number)
            count += 1


def _row(line: str, number: int) -> object:
    """The value that a line holds, or what is wrong with it."""
    try:
        return strict_json.loads(line)
    except strict_json.RepeatedKey as error:
        return _repeated(error)
    except json.JSONDecodeError as error:
        what = f"it is not JSON: {error.msg} at line {number}, column {error.colno}"
        return InvalidRow([Finding(("not JSON", error.msg), "", what, _SYNTAX)])
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep nesting
        return InvalidRow([Finding(("cannot be parsed", str(error)), "", f"it cannot be parsed: {error}", _SYNTAX)])


def _repeated(error: strict_json.RepeatedKey) -> InvalidRow:
    return InvalidRow([Finding(("repeated", error.path), error.path, str(error), "Leave one of the two.")])


def _paragraphs(path: Path, file: BinaryIO) -> Iterator[tuple[RowLocation, object]]:
    """{"text": ...} for every paragraph, located at its first line."""
    first, count, size = 0, 0, 0
    paragraph: list[str] = []
    for number, line in _text_lines(path, file, end="\n"):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line.rstrip("\r\n"))
            size += len(line)
            if size > ROW_BYTES:
                raise too_long(path, first)
        elif paragraph:
            yield RowLocation(f"{path} line {first}", f"dataset[{count}]", first), {"text": "\n".join(paragraph)}
            paragraph, count, size = [], count + 1, 0


def _text_lines(path: Path, file: BinaryIO, end: str = "") -> Iterator[tuple[int, str]]:
    """The lines with their 1-based numbers; `end`, if it is given, follows as one more line."""
    number, offset = 0, 0
    while raw := file.readline(ROW_BYTES + 1):
        number += 1
        if len(raw) > ROW_BYTES:
            raise too_long(path, number)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start + 1) from None
        offset += len(raw)
    if end:
        yield number + 1, end


def _list(path: Path, file: BinaryIO) -> Iterator[tuple[RowLocation, object]]:
    """The elements of one JSON list."""
    text = _JsonText(path, file)
    if text.peek() != "[":
        raise InvalidDataset(
            f"{path} holds {reprlib.repr(text.value())}, not a list of rows",
            param="dataset.path",
            hint="Put the rows between [ and ], or write one row per line into a .jsonl file.",
        )
    text.advance(1)
    count, delimiter = 0, "]" if text.peek() == "]" else ","
    while delimiter == ",":
        text.peek()
        location = RowLocation(f"{path} row {count + 1} (line {text.line})", f"dataset[{count}]", text.line)
        yield location, text.value()
        count, delimiter = count + 1, text.peek()
        if delimiter not in (",", "]"):
            raise _not_json(path, "Expecting ',' delimiter", text.line, text.column)
        if delimiter == ",":
            text.advance(1)
    text.advance(1)
    if text.peek():
        raise _not_json(path, "Extra data", text.line, text.column)


class _JsonText:
    """A JSON file that is read piece by piece: only the part that is being parsed is in memory.

    line, column: the 1-based position of the next character.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._ended = False
        self._bytes = 0
        self.line = 1
        self.column = 1

    def peek(self) -> str:
        """Skip white space and return the next character without consuming it, or "" at the end."""
        while True:
            rest = self._position
            while rest < len(self._text) and self._text[rest] in " \t\r\n":
                rest += 1
            self.advance(rest - self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_more()

    def advance(self, count: int) -> None:
        """Consume `count` characters of the text that was read."""
        end = self._position + count
        breaks = self._text.count("\n", self._position, end)
        self.line += breaks
        self.column = end - self._text.rindex("\n", self._position, end) if breaks else self.column + count
        self._position = end

    def value(self) -> Any:
        """Consume and return the JSON value that begins here; an InvalidRow if it has a key twice."""
        while True:
            error: json.JSONDecodeError | None = None
            try:
                value, repeated, end = strict_json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as raised:
                error = raised
            except (ValueError, RecursionError) as raised:  # a number of thousands of digits, or too deep nesting
                raise _unparsable(self._path, self.line, raised) from None
            else:
                # A number may continue in the part of the file that was not read yet.
                if self._ended or self._text[end : end + 1] in (" ", "\t", "\r", "\n", ",", "]"):
                    self.advance(end - self._position)
                    return value if repeated is None else _repeated(repeated)
            if self._ended and error is not None:
                self.advance(error.pos - self._position)
                raise _not_json(self._path, error.msg, self.line, self.column)
            if len(self._text) - self._position > ROW_BYTES:
                raise too_long(self._path, self.line)
            self._read_more()

    def _read_more(self) -> None:
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text) - self._position))
        self._ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            undecoded = len(error.object) - len(chunk)
            raise _not_utf8(self._path, self._bytes - undecoded + error.start + 1) from None
        self._bytes += len(chunk)
        self._text = self._text[self._position :] + text
        self._position = 0


def _not_json(path: Path, problem: str, line: int, column: int) -> InvalidDataset:
    return InvalidDataset(
        f"{path} is not JSON: {problem} at line {line}, column {column}", param="dataset.path", hint=_SYNTAX
    )


def _unparsable(path: Path, line: int, error: Exception) -> InvalidDataset:
    return InvalidDataset(f"{path} cannot be parsed at line {line}: {error}", param="dataset.path", hint=_SYNTAX)


def _not_utf8(path: Path, byte: int) -> InvalidDataset:
    return InvalidDataset(f"{path} is not UTF-8: byte {byte}", param="dataset.path", hint="Save the file as UTF-8.")
