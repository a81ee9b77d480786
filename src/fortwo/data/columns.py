"""Columns under other names: which of fortwo's keys a column is for, as a request says, or as the names suggest.

`columns` of a dataset gives for a column its key, or null to leave the column out: {"question": "prompt", "id": null}.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping

from fortwo.data import tables
from fortwo.data.findings import Finding, InvalidRow, RowLocation
from fortwo.data.row_formats import ROW_FORMATS, RowFormat
from fortwo.errors import InvalidDataset

Columns = Mapping[str, str | None]

MEANT = {
    "prompt": (
        "question",
        "query",
        "input",
        "user",
        "human",
        "ask",
        "request",
        "instruction",
        "problem",
        "q",
        "source",
    ),
    "completion": (
        *("answer", "response", "output", "reply", "assistant", "target", "solution", "label_text", "a", "gpt"),
    ),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "chosen": ("accepted", "preferred", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
    "text": ("content", "document", "body", "passage", "paragraph", "sentence"),
}
_FORMS = (("prompt", "chosen", "rejected"), ("prompt", "completion"), ("messages",), ("text",))  # the first that fits


def read_columns(given: object) -> Columns:
    """The `columns` of a dataset. Raises InvalidDataset for what does not give names for names."""
    right = isinstance(given, dict) and all(
        value is None or (isinstance(value, str) and value) for value in given.values()
    )
    if not right:
        raise InvalidDataset(
            f"dataset.columns = {reprlib.repr(given)} does not give a key for each column",
            param="dataset.columns",
            hint='Give the key for each column, or null to leave it out: {"question": "prompt", "id": null}.',
        )
    columns: Columns = given  # type: ignore[assignment]
    taken = [key for key in columns.values() if key is not None]
    if twice := next((key for key in taken if taken.count(key) > 1), None):
        both = " and ".join(repr(name) for name, key in columns.items() if key == twice)
        raise InvalidDataset(
            f"dataset.columns gives {twice!r} for {both}",
            param="dataset.columns",
            hint="Give each key to one column, and null to those that are left out.",
        )
    return columns


def renamed(row: object, columns: Columns) -> object:
    """The row with the keys that `columns` gives, and without the columns that are left out. A text under a key that
    holds a list is read as JSON, as in tables. Raises InvalidRow where a key is there already."""
    if not isinstance(row, dict):
        return row
    found = {name: value for name, value in row.items() if name not in columns}
    for name, key in columns.items():
        if name not in row or key is None:
            continue
        if key in found:
            what = f"the column {name!r} is for {key!r}, and the row has {key!r} as well"
            raise InvalidRow([Finding(("column", name), name, what, f"Give {key!r} another key, or null.")])
        value = row[name]
        found[key] = tables.cell(key, value) if isinstance(value, str) and key != name else value
    return found


def renamed_rows(rows: Iterable[tuple[RowLocation, object]], columns: Columns) -> Iterator[tuple[RowLocation, object]]:
    """All rows, `renamed`. Raises InvalidDataset at the end for columns that no row has."""
    missing, seen = set(columns), dict[str, None]()
    for location, row in rows:
        if isinstance(row, dict):
            missing -= row.keys()
            seen |= dict.fromkeys(row if len(seen) < len(row) else ())
        try:
            named = renamed(row, columns)
        except InvalidRow as error:
            named = error
        yield location, named
    if missing and seen:
        names = ", ".join(repr(name) for name in columns if name in missing)
        raise InvalidDataset(
            f"dataset.columns names {names}, which no row has",
            param="dataset.columns",
            hint=f"The rows have {', '.join(map(repr, seen))}.",
        )


def suggested(keys: Collection[str]) -> dict[str, str | None]:
    """The keys that the names of columns suggest, and null for columns that nothing is known of; {} where the names are
    those of a format already, or suggest nothing."""
    if any(one.fits(dict.fromkeys(keys)) and _required(one) <= {*keys} for one in ROW_FORMATS):
        return {}
    plain = {name.strip().lower().replace(" ", "_"): name for name in reversed(list(keys))}
    for form in _FORMS:
        columns = [next((plain[name] for name in (key, *MEANT[key]) if name in plain), None) for key in form]
        if None not in columns:
            chosen = dict(zip(columns, form, strict=True))
            return {name: chosen.get(name) for name in keys if chosen.get(name) != name}
    return {}


def _required(row_format: RowFormat) -> set[str]:
    return {name for name, field in row_format.model.model_fields.items() if field.is_required()}
