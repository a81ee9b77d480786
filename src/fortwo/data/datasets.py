"""Loads the dataset that a request names, validates it, and stores it in a job.

A dataset is exactly one of {"path": ...}, {"file_id": ...}, {"hub": ...}, {"examples": [...]} or {"facts": [...]}, and
may have `columns` besides (see data.columns); files must lie in a folder that the server allows. The examples of a
large file are not loaded into memory: every iteration reads the file again, and a job stores the file's path and
checksum instead. Tokenizers and training are not known here.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from fortwo.data.columns import Columns, read_columns, renamed_rows
from fortwo.data.files import read_rows
from fortwo.data.findings import Finding, Findings, InvalidRow, RowLocation, in_each
from fortwo.data.row_formats import (
    EXAMPLE_FORMATS,
    FACT_FORMAT,
    ROW_FORMATS,
    RowFormat,
    format_of,
    one_of,
    parse_row,
    without_nulls,
)
from fortwo.errors import InvalidDataset
from fortwo.records import Dataset, Example, Fact, Json, Message

Row = TypeVar("Row")

SOURCE_KEYS = ("path", "file_id", "hub", "examples", "facts")
COLUMNS = "columns"
LARGE_BYTES = 8 << 20  # larger files are streamed, not loaded


def load(spec: object, allowed_dirs: Sequence[Path], check: Callable[[], None] = lambda: None) -> Dataset:
    """The dataset that `spec` describes. A relative path is looked up in `allowed_dirs`, in order. Raises
    InvalidDataset naming the row, the field, the value and a remedy. check: called before each row; it may raise to
    end the reading."""
    kind, value, columns = parse_source(spec)
    if kind == "path":
        return load_file(_find(value, allowed_dirs), check, columns)
    return _dataset(checked(iter_rows(spec, allowed_dirs), check), "inline")


def load_file(path: Path, check: Callable[[], None] = lambda: None, columns: Columns | None = None) -> Dataset:
    """The dataset in a file. Raises InvalidDataset as `load` does."""
    rows = checked(validate_rows(_file_rows(path, columns), str(path), ROW_FORMATS), check)
    return _large(path, rows, columns) if path.stat().st_size > LARGE_BYTES else _dataset(rows, str(path))


def checked(rows: Iterable[Row], check: Callable[[], None]) -> Iterator[Row]:
    """The rows, with a call of `check` before each."""
    for row in rows:
        check()
        yield row


def iter_rows(spec: object, allowed_dirs: Sequence[Path]) -> Iterator[Example | Fact]:
    """The rows of `load`, validated one by one as they are read, for callers that need only the first rows."""
    return validate_rows(*located_rows(spec, allowed_dirs))


def located_rows(
    spec: object, allowed_dirs: Sequence[Path]
) -> tuple[Iterator[tuple[RowLocation, object]], str, tuple[RowFormat, ...]]:
    """The rows as they are written, with their columns renamed, the source's name, and the formats that they may have:
    what `validate_rows` takes."""
    kind, value, columns = parse_source(spec)
    if kind == "path":
        path = _find(value, allowed_dirs)
        return _file_rows(path, columns), str(path), ROW_FORMATS
    rows = _inline(kind, value)
    formats = (FACT_FORMAT,) if kind == "facts" else EXAMPLE_FORMATS
    return rows if columns is None else renamed_rows(rows, columns), "inline", formats


def _file_rows(path: Path, columns: Columns | None) -> Iterator[tuple[RowLocation, object]]:
    rows = read_rows(path)
    return rows if columns is None else renamed_rows(rows, columns)


def parse_source(spec: object) -> tuple[str, object, Columns | None]:
    """The one key of SOURCE_KEYS that the spec has, its value, and its columns. Raises InvalidDataset for any other
    spec."""
    if not isinstance(spec, dict):
        raise InvalidDataset(
            f"dataset is {reprlib.repr(spec)}, not an object", param="dataset", hint=one_of("Give", SOURCE_KEYS)
        )
    if unknown := sorted(str(key) for key in spec if key not in (*SOURCE_KEYS, COLUMNS)):
        raise InvalidDataset(
            f"dataset has the unknown key {unknown[0]!r}",
            param=f"dataset.{unknown[0]}",
            hint=one_of("Give", SOURCE_KEYS),
        )
    sources = {key: value for key, value in spec.items() if key != COLUMNS}
    if len(sources) != 1:
        given = " and ".join(sources) if sources else "no source"
        raise InvalidDataset(f"dataset has {given}", param="dataset", hint=one_of("Give exactly one of", SOURCE_KEYS))
    ((kind, value),) = sources.items()
    if kind == "file_id":
        raise InvalidDataset(
            f"dataset.file_id = {reprlib.repr(value)} is not the id of an uploaded file",
            param="dataset.file_id",
            hint='Upload the file with POST /v1/files and give the id from its answer, or use {"path": ...}.',
        )
    if kind == "hub":
        raise InvalidDataset(
            f"dataset.hub = {reprlib.repr(value)} cannot be read here",
            param="dataset.hub",
            hint="A server downloads datasets of the hub. Download the file and give its path.",
        )
    return kind, value, read_columns(spec[COLUMNS]) if spec.get(COLUMNS) is not None else None


def _inline(kind: str, value: object) -> Iterator[tuple[RowLocation, object]]:
    if not isinstance(value, list):
        raise InvalidDataset(
            f"dataset.{kind} = {reprlib.repr(value)} is not a list",
            param=f"dataset.{kind}",
            hint="Send a list of rows.",
        )
    for number, row in enumerate(value, start=1):
        yield RowLocation(f"{kind} row {number}", f"dataset.{kind}[{number - 1}]", number), row


# ---------------------------------------------------------------- rows


def validate_rows(
    rows: Iterable[tuple[RowLocation, object]], source: str, formats: tuple[RowFormat, ...]
) -> Iterator[Example | Fact]:
    """The rows as Examples or Facts: all are conversations (in any format), or all plain text, or all facts.

    From the first row that is wrong on, no row is yielded any more; the rest is read for further findings, and all of
    them are told at the end. Raises InvalidDataset.
    """
    first: RowFormat | None = None
    findings, count = Findings(), 0
    for location, row in rows:
        count += 1
        try:
            if isinstance(row, InvalidRow):
                raise row
            told = without_nulls(row)
            row_format = format_of(told, formats)
            first = row_format if first is None else first
            if row_format.content != first.content:
                raise InvalidRow([mixed(first, row_format)])
            parsed = parse_row(told, location.line, row_format)
        except InvalidRow as error:
            findings.add(location, error.findings)
        else:
            if not findings:
                yield parsed
    if findings:
        raise findings.error(count)
    if first is None:
        raise InvalidDataset(
            f"the dataset {source} is empty",
            param="dataset",
            hint=f"Give at least one row, for example {formats[0].example}",
        )


def mixed(first: RowFormat, other: RowFormat) -> Finding:
    """What is wrong with a row whose content is not that of the first row."""
    return Finding(
        ("mixed", other.content),
        "",
        f"{first.content} and {other.content} are mixed in one dataset",
        f"Put them into separate datasets, or write this row like {first.example}",
    )


class _Digest:
    """sha256 of the rows as one canonical JSON list. It depends on their content alone, not on how it is written."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[")
        self._separator = b""

    def add(self, row: Example | Fact) -> None:
        content = asdict(row) if isinstance(row, Fact) else _content(row)
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self._hash.update(self._separator + canonical.encode())
        self._separator = b","

    def hexdigest(self) -> str:
        digest = self._hash.copy()
        digest.update(b"]")
        return digest.hexdigest()


_FURTHER = ("name", "tool_calls", "tool_call_id", "tools")  # of a message, where it has them


def _content(example: Example) -> object:
    if example.text is not None:
        return {"text": example.text}
    if example.rejected:
        return {"chosen": _written(example.messages), "rejected": _written(example.rejected)}
    return _written(example.messages) if example.label is None else [_written(example.messages), example.label]


def _written(messages: Iterable[Message]) -> list[Json]:
    return [
        {"role": message.role, "content": message.content}
        | ({} if message.weight else {"weight": 0})
        | {key: value for key in _FURTHER if (value := getattr(message, key))}
        for message in messages
    ]


def _dataset(rows: Iterable[Example | Fact], source: str) -> Dataset:
    digest, examples, facts = _Digest(), [], []
    for row in rows:
        digest.add(row)
        if isinstance(row, Fact):
            facts.append(row)
        else:
            examples.append(row)
    return Dataset(digest.hexdigest(), tuple(examples), tuple(facts), source)


# ---------------------------------------------------------------- large files


@dataclass(frozen=True)
class FileExamples(Collection[Example]):
    """The examples of a large file, which every iteration parses again. sha256, size (bytes), modified: of the file
    when it was loaded; an iteration raises InvalidDataset (code dataset_changed) when the file has changed since.
    """

    path: Path
    rows: int
    sha256: str
    size: int
    modified: int = -1  # nanoseconds; when the file's time differs, its content is compared
    columns: Columns | None = None

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Example]:
        self.check()
        for row in validate_rows(_file_rows(self.path, self.columns), str(self.path), EXAMPLE_FORMATS):
            assert isinstance(row, Example)
            yield row
        self.check()

    def __contains__(self, example: object) -> bool:
        return any(example == one for one in self)

    def check(self) -> None:
        """Raises InvalidDataset (code dataset_changed) when the file has changed or is missing."""
        try:
            stat = self.path.stat()
            same = stat.st_size == self.size and (
                stat.st_mtime_ns == self.modified or file_sha256(self.path) == self.sha256
            )
        except OSError:
            same = False
        if not same:
            raise InvalidDataset(
                f"{self.path} has changed since this dataset was planned, or is missing",
                param="dataset.path",
                hint="Restore the file as it was, or start a new job with the file as it is. Small files are copied "
                "into the job; large ones are read from where they are.",
                code="dataset_changed",
            )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _large(path: Path, rows: Iterator[Example | Fact], columns: Columns | None) -> Dataset:
    stat, sha256 = path.stat(), file_sha256(path)
    digest, count = _Digest(), 0
    facts: list[Fact] = []
    for row in rows:
        digest.add(row)
        count += 1
        if isinstance(row, Fact):
            facts.append(row)
    if facts:
        return Dataset(digest.hexdigest(), (), tuple(facts), str(path))
    examples = FileExamples(path, count, sha256, stat.st_size, stat.st_mtime_ns, columns)
    examples.check()
    return Dataset(digest.hexdigest(), examples, (), str(path))


# ---------------------------------------------------------------- stored in a job

_EXAMPLES = TypeAdapter(tuple[Example, ...])
FACTS = TypeAdapter(tuple[Fact, ...])


def to_json(dataset: Dataset) -> Json:
    """All of it, or of a large file its path and checksum."""
    facts, kept = ([asdict(fact) for fact in facts] for facts in (dataset.facts, dataset.parent_facts))
    body: Json = {"digest": dataset.digest, "source": dataset.source, "facts": facts, "kept": kept}
    if dataset.validation is not None:
        body["validation"] = to_json(dataset.validation)
    held = dataset.examples
    if isinstance(held, FileExamples):
        file = {"path": str(held.path), "rows": held.rows, "sha256": held.sha256, "size": held.size}
        return body | {"file": file if held.columns is None else file | {"columns": dict(held.columns)}}
    return body | {"examples": [asdict(example) for example in held]}


def from_json(body: Json) -> Dataset:
    """Raises InvalidDataset (code dataset_changed) when the file it names is not the same any more."""
    datasets = {"dataset": body}
    if "validation" in body:
        datasets["validation_dataset"] = body["validation"]
    read = in_each(datasets, _from_json)
    return replace(read["dataset"], validation=read.get("validation_dataset"))


def _from_json(body: Json) -> Dataset:
    facts, parent_facts = (FACTS.validate_python(body.get(name, ())) for name in ("facts", "kept"))
    if "file" not in body:
        return Dataset(body["digest"], _EXAMPLES.validate_python(body["examples"]), facts, body["source"], parent_facts)
    file = body["file"]
    examples = FileExamples(Path(file["path"]), file["rows"], file["sha256"], file["size"], columns=file.get("columns"))
    examples.check()
    return Dataset(body["digest"], examples, facts, body["source"], parent_facts)


# ---------------------------------------------------------------- files


def _find(path: object, allowed_dirs: Sequence[Path]) -> Path:
    """The file with links resolved. Raises InvalidDataset unless it is a file inside an allowed folder."""
    folders = ", ".join(str(folder) for folder in allowed_dirs)
    if not isinstance(path, str) or not path.strip():
        raise InvalidDataset(
            f"dataset.path = {reprlib.repr(path)} is not a path", param="dataset.path", hint="Give the name of a file."
        )
    inside = []
    for folder in allowed_dirs:
        try:
            real = (folder / path).resolve()
            if real.is_relative_to(folder.resolve()):
                if real.is_file():
                    return real
                inside.append(real)
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL character, a loop of links
            raise InvalidDataset(
                f"dataset.path = {reprlib.repr(path)} is not a path: {error}",
                param="dataset.path",
                hint="Give the name of a file.",
            ) from None
    if not inside:
        raise InvalidDataset(
            f"dataset.path = {path!r} is outside the allowed folders ({folders})",
            param="dataset.path",
            hint="Move the file into one of them, or allow its folder with FORTWO_DATA_DIRS.",
        )
    what = "is not a file" if any(real.exists() for real in inside) else "does not exist"
    raise InvalidDataset(
        f"dataset.path = {path!r} {what} (looked in {folders})", param="dataset.path", hint="Check the path."
    )
