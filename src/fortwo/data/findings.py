"""Everything that is wrong with the rows of a request, told in one answer: each kind once, with its rows counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fortwo.errors import InvalidDataset, InvalidRequest, all_of

Given = TypeVar("Given")
Found = TypeVar("Found")

LINES_SHOWN = 5  # of each kind, besides the first
KINDS_SHOWN = 10


@dataclass(frozen=True)
class RowLocation:
    """Where a row is: `description` is for people, `param` is the path in the request, `line` is 1-based."""

    description: str
    param: str
    line: int


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row. kind: the same for rows that are wrong in the same way; what: with the value;
    field: its path within the row, "" for the row itself."""

    kind: Hashable
    field: str
    what: str
    hint: str


class InvalidRow(Exception):
    """All that is wrong with one row."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(finding.what for finding in self.findings))


@dataclass
class _Kind:
    """The first finding of a kind, where it is, and the lines of all others."""

    first: Finding
    location: RowLocation
    count: int = 1
    lines: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{self.location.description}: {self.first.what}"
        more = self.count - 1
        if not more:
            return told
        noun = "line" if "line" in self.location.description else "row"
        named = ", ".join(map(str, self.lines))
        rest = f" and {more - len(self.lines)} more" if more > len(self.lines) else ""
        return f"{told} (likewise {noun}{'' if more == 1 else 's'} {named}{rest})"


class Findings:
    """Collects the findings of a dataset while its rows are read; needs little memory however many there are."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._rows = 0

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, location: RowLocation, found: Iterable[Finding]) -> None:
        """What is wrong with one row."""
        self._rows += 1
        for finding in found:
            kind = self._kinds.get(finding.kind)
            if kind is None:
                self._kinds[finding.kind] = _Kind(finding, location)
            else:
                kind.count += 1
                if len(kind.lines) < LINES_SHOWN:
                    kind.lines.append(location.line)

    def listed(self) -> Iterator[tuple[Finding, RowLocation, int, tuple[int, ...]]]:
        """Each kind's first finding and where it is, how many rows have it, and the lines of the next of them."""
        for kind in self._kinds.values():
            yield kind.first, kind.location, kind.count, tuple(kind.lines)

    def error(self, rows: int) -> InvalidDataset:
        """All findings in one error. rows: how many were read."""
        kinds = list(self._kinds.values())
        told = [str(kind) for kind in kinds[:KINDS_SHOWN]]
        if len(kinds) > KINDS_SHOWN:
            told.append(f"and {len(kinds) - KINDS_SHOWN} more kinds of mistakes")
        counted = f" In all, {self._rows} of {rows} rows are wrong." if self._rows > 1 else ""
        first = kinds[0]
        hints = dict.fromkeys(kind.first.hint for kind in kinds[:KINDS_SHOWN])
        return InvalidDataset(
            ("; ".join(told)) + ("." if counted else "") + counted,
            param=f"{first.location.param}.{first.first.field}".rstrip("."),
            hint=" ".join(hints),
        )


def in_each(datasets: Mapping[str, Given], read: Callable[[Given], Found]) -> dict[str, Found]:
    """What `read` returns for each of the datasets of a request. datasets: by the field that gives them. Raises one
    InvalidRequest with what is wrong with any of them; where there are several, it says which one is meant."""
    found: dict[str, Found] = {}
    errors: list[InvalidRequest] = []
    for name, given in datasets.items():
        try:
            found[name] = read(given)
        except InvalidRequest as error:
            errors.append(error if len(datasets) == 1 else in_field(error, name))
    if errors:
        raise all_of(errors)
    return found


def in_field(error: InvalidRequest, name: str) -> InvalidRequest:
    """An error about the field "dataset" as one about the field `name`."""
    inside = error.param or ""
    param = f"{name}{inside.removeprefix('dataset')}" if inside.startswith("dataset") else error.param
    rest = error.message.removeprefix("dataset")
    named = rest != error.message and rest[:1] in (".", " ")  # "dataset.path = ..." or "dataset has ..."
    message = f"{name}{rest}" if named else f"{name}: {error.message}"
    return type(error)(message, param=param, hint=error.hint, code=error.code)
