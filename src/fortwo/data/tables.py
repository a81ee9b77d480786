"""Rows of tables: CSV and Parquet. A column is a key of every row, and an empty cell says nothing.

Row formats are not known here, except for which keys hold lists, because a cell of CSV is text.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fortwo import strict_json
from fortwo.data.findings import Finding, InvalidRow, RowLocation
from fortwo.errors import InvalidDataset

ROW_BYTES = 16 << 20  # a longer "row" is most likely a list where lines should be
BATCH_ROWS = 256
DELIMITERS = ",;\t"
_LISTS = frozenset(
    "messages conversations tools match questions aliases held_out neighbors controls portability "
    "preferred_output non_preferred_output".split()
)
_MAY_BE_MESSAGES = frozenset(("prompt", "chosen", "rejected", "completion", "input"))
_LABELS = {"true": True, "false": False}
_INDEX = re.compile(r"__index_level_\d+__")  # how pandas writes the numbers of rows into a Parquet file


def read_csv(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[RowLocation, object]]:
    """The rows of a table with a header, as objects of text; cells of keys that hold lists are JSON.

    lines: with their 1-based numbers. The header shows whether cells are separated by commas, semicolons or tabs.
    Raises InvalidDataset for a header that leaves a column without a name or names one twice.
    """
    csv.field_size_limit(ROW_BYTES)
    texts = (line for _, line in lines)
    first = next(texts, "")
    reader = csv.reader(_with(first, texts), delimiter=max(DELIMITERS, key=first.count), strict=True)
    header = next(_records(path, reader), None)
    if header is None:
        return
    names = [name.strip() for name in header]
    _check_header(path, names)
    begin = reader.line_num + 1
    for number, cells in enumerate(cells for cells in _records(path, reader)):
        location = RowLocation(f"{path} line {begin}", f"dataset[{number}]", begin)
        begin = reader.line_num + 1
        if len(cells) == len(names):
            yield location, {name: cell(name, text) for name, text in zip(names, cells, strict=True) if text}
        else:
            what = f"it has {len(cells)} cells, and the header names {len(names)} columns"
            hint = "Put a cell that contains the separator into double quotes."
            yield location, InvalidRow([Finding("cells", "", what, hint)])


def _with(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _records(path: Path, reader: Any) -> Iterator[list[str]]:
    """The records that are not empty."""
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidDataset(
                f"{path} is not CSV: {error} at line {reader.line_num}",
                param="dataset.path",
                hint='Close every quote, and double those within a cell: "".',
            ) from None
        if record:
            yield record


def _check_header(path: Path, names: list[str]) -> None:
    problem = next((f"column {number} has no name" for number, name in enumerate(names, 1) if not name), None)
    hint = "Name every column in the first line. pandas leaves its index out with to_csv(..., index=False)."
    if problem is None:
        problem = next((f"the column {name!r} is there twice" for name in names if names.count(name) > 1), None)
        hint = "Leave one of the two out."
    if problem is not None:
        raise InvalidDataset(f"{path} line 1: {problem}", param="dataset.path", hint=hint)


def cell(name: str, text: str) -> Any:
    """What a cell under this name holds: lists are JSON, a label is true or false, and all else is text."""
    if name in ("label", "kto_tag"):
        return _LABELS.get(text.strip().lower(), text)
    if name not in _LISTS and not (name in _MAY_BE_MESSAGES and text.lstrip().startswith(("[", "{"))):
        return text
    try:
        value = strict_json.loads(text)
    except (ValueError, RecursionError):
        return text  # whoever knows the row's format says what is wrong with it
    whole = (
        name in _LISTS or _are_messages(value) or (name == "input" and isinstance(value, dict) and "messages" in value)
    )
    return value if whole else text


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def read_parquet(path: Path, file: BinaryIO) -> Iterator[tuple[RowLocation, object]]:
    """The rows of a Parquet file, with nested lists and objects. Raises InvalidDataset for a file that is damaged, and
    for columns of a type that is no text, number, list or object."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if not _INDEX.fullmatch(name)]
        _check_types(path, [table.schema_arrow.field(name) for name in columns])
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield RowLocation(f"{path} row {number}", f"dataset[{number - 1}]", number), row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InvalidDataset(
            f"{path} is damaged or not a Parquet file: {str(error).splitlines()[0]}",
            param="dataset.path",
            hint="Write the file again, for example with datasets: dataset.to_parquet(...).",
        ) from None


def _check_types(path: Path, fields: list[Any]) -> None:
    wrong = [f"{field.name!r} ({field.type})" for field in fields if not _is_plain(field.type)]
    if wrong:
        raise InvalidDataset(
            f"{path}: the columns {', '.join(wrong)} hold neither text nor numbers",
            param="dataset.path",
            hint="Drop these columns, or write them as text.",
        )


def _is_plain(type: Any) -> bool:
    """Whether a type of Arrow is text, a number, true or false, null, or made of these."""
    from pyarrow import types

    if types.is_dictionary(type) or types.is_list(type) or types.is_large_list(type):
        return _is_plain(type.value_type)
    if types.is_struct(type):
        return all(_is_plain(type.field(index).type) for index in range(type.num_fields))
    plain = (
        types.is_string,
        types.is_large_string,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(one(type) for one in plain)


def too_long(path: Path, line: int) -> InvalidDataset:
    return InvalidDataset(
        f"{path} line {line}: the row is longer than {ROW_BYTES >> 20} MiB, or its JSON is never closed",
        param="dataset.path",
        hint="Correct the file there, or split the row.",
    )
