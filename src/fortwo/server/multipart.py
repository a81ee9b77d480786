"""Reads multipart/form-data whose one file goes to disk while it arrives. The parser is python-multipart's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from fortwo import disk
from fortwo.errors import InvalidRequest, Unavailable
from fortwo.records import Json

MOST_FIELDS = 50
FIELD_BYTES = 64 << 10  # of all fields together that are not the file
HEADER_BYTES = 8 << 10  # of one part


def form_schema(required: list[str], **fields: Json) -> dict[str, Any]:
    """What FastAPI adds to the document of a route that takes a form with a file. fields: JSON Schemas of the others,
    by name."""
    properties = {"file": {"type": "string", "format": "binary"}, **fields}
    schema = {"type": "object", "required": required, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass
class Form:
    """fields: without the file, by name. filename: as the client wrote it, None if no file came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(request: Request, path: Path) -> Form:
    """Write the file of the part named `file` to `path` and return the rest. Raises InvalidRequest for a body that is
    not such a form, and StorageFailed."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _invalid("the Content-Type has no boundary")
    try:
        with path.open("xb") as file:
            reader = _FormReader(boundary, file)
            async for chunk in request.stream():
                await run_in_threadpool(reader.write, chunk)
    except ClientDisconnect:
        raise Unavailable("The client disconnected.", hint="Send the file again.") from None
    except OSError as error:
        raise disk.storage_failed(path, error) from error
    return reader.finish()


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"The body is not a form with one file: {reason}.",
        hint="Send multipart/form-data with the fields file and purpose, as OpenAI's clients do.",
        code="invalid_form",
    )


class _FormReader:
    def __init__(self, boundary: bytes, file: BinaryIO) -> None:
        self._file = file
        self._form = Form()
        self._header, self._headers = (b"", b""), dict[bytes, bytes]()
        self._name = ""
        self._value: bytearray | None = None  # of a field; None inside the file
        self._size = self._header_size = 0
        self._ended = False
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data")
        callbacks = {f"on_{name}": getattr(self, f"_{name}") for name in (*names, "part_end", "end")}
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except MultipartParseError as error:
            raise _invalid(str(error)) from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _invalid(str(error)) from None

    def finish(self) -> Form:
        if not self._ended:
            raise _invalid("it ends before its last boundary")
        return self._form

    def _part_begin(self) -> None:
        self._headers, self._header_size = {}, 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > HEADER_BYTES:
            raise _invalid(f"the headers of a part have more than {HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = (b"", b"")

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise _invalid("a part has no name")
        self._name = options[b"name"].decode(errors="replace")
        if b"filename" not in options:
            if self._name in self._form.fields or len(self._form.fields) >= MOST_FIELDS:
                raise _invalid(f"it has the field {self._name!r} twice, or more than {MOST_FIELDS} fields")
            self._value = bytearray()
            return
        if self._name != "file" or self._form.filename is not None:
            raise _invalid(f"its part {self._name!r} is a second file, or not the one named file")
        self._form.filename = options[b"filename"].decode(errors="replace")
        self._value = None

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._file.write(data[start:end])
            return
        self._size += end - start
        if self._size > FIELD_BYTES:
            raise _invalid(f"its fields have more than {FIELD_BYTES} bytes")
        self._value += data[start:end]

    def _part_end(self) -> None:
        if self._value is not None:
            self._form.fields[self._name] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self._ended = True
