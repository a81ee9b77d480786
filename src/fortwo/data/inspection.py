"""What is in a dataset before anybody plans with it: its format, its columns, and all that is wrong with its rows.

Unlike `datasets.load` this refuses no row: what is wrong is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fortwo.data import columns, datasets
from fortwo.data.findings import Findings, InvalidRow
from fortwo.data.row_formats import RowFormat, format_of, parse_row, without_nulls

MOST_KEYS = 100
FIRST_ROWS = 50  # whose keys are the columns


@dataclass(frozen=True)
class Problem:
    """One kind of mistake. line: where it is first, 1-based; lines: the next few; rows: how many have it; field: ""
    for the row itself."""

    line: int
    lines: tuple[int, ...]
    rows: int
    field: str
    message: str
    hint: str


@dataclass(frozen=True)
class Inspection:
    """rows: how many there are. content: what the first readable row is (conversations, plain text, facts, ...), None
    if no row has a known format. keys: the columns of the first rows, after renaming. suggested: a `columns` that would
    make a format of them, {} for none."""

    rows: int
    content: str | None
    keys: tuple[str, ...]
    suggested: dict[str, str | None] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def inspect(spec: object, allowed_dirs: Sequence[Path], check: Callable[[], None] = lambda: None) -> Inspection:
    """Read all rows of the dataset that `spec` describes (see datasets.load). Raises InvalidDataset for what ends the
    reading, such as a file that is not there. check: called before each row; it may raise to end the reading."""
    rows, _, formats = datasets.located_rows(spec, allowed_dirs)
    findings, count = Findings(), 0
    keys: dict[str, None] = {}
    first: RowFormat | None = None
    for location, row in rows:
        check()
        count += 1
        try:
            if isinstance(row, InvalidRow):
                raise row
            told = without_nulls(row)
            if count <= FIRST_ROWS and isinstance(told, dict):
                keys |= dict.fromkeys(str(key) for key in told)
            row_format = format_of(told, formats)
            first = row_format if first is None else first
            if row_format.content != first.content:
                raise InvalidRow([datasets.mixed(first, row_format)])
            parse_row(told, location.line, row_format)
        except InvalidRow as error:
            findings.add(location, error.findings)
    names = tuple(keys)[:MOST_KEYS]
    problems = tuple(
        Problem(location.line, lines, rows, one.field, one.what, one.hint)
        for one, location, rows, lines in findings.listed()
    )
    content = None if first is None else first.content
    return Inspection(count, content, names, columns.suggested(names), problems)
