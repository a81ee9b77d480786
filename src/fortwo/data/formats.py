"""Datasets as requests name them, to records: found, validated, and kept in a job.

A dataset is exactly one of {"path": ...}, {"file_id": ...}, {"examples": [...]} or {"facts": [...]}; files lie in a
folder the server allows. Examples of a large file are not kept in memory: they are read again each time they are gone
through, and a job keeps the file's path and checksum in place of them. This module knows neither tokenizers nor
training.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from fortwo.data.files import read
from fortwo.data.shapes import EXAMPLES, FACT, SHAPES, Place, Shape, one_of, parse, shape_of
from fortwo.errors import InvalidDataset
from fortwo.records import Dataset, Example, Fact, Json

SOURCES = ("path", "file_id", "examples", "facts")
LARGE_BYTES = 8 << 20  # files beyond this are gone through, not loaded


def load(spec: object, allowed_dirs: Sequence[Path]) -> Dataset:
    """The dataset that `spec` describes. A relative path is looked up in `allowed_dirs`, in order.

    Raises InvalidDataset.
    """
    kind, value = source(spec)
    if kind == "path":
        return load_file(_find(value, allowed_dirs))
    only = (FACT,) if kind == "facts" else EXAMPLES
    return _dataset(validated(_inline(kind, value), "inline", only), "inline")


def load_file(path: Path) -> Dataset:
    """The dataset in a file. Raises InvalidDataset."""
    rows = validated(read(path), str(path), SHAPES)
    return _large(path, rows) if path.stat().st_size > LARGE_BYTES else _dataset(rows, str(path))


def rows_of(spec: object, allowed_dirs: Sequence[Path]) -> Iterator[Example | Fact]:
    """As load, row after row, each validated when its turn comes: for whoever needs the first ones only."""
    kind, value = source(spec)
    if kind == "path":
        path = _find(value, allowed_dirs)
        return validated(read(path), str(path), SHAPES)
    return validated(_inline(kind, value), "inline", (FACT,) if kind == "facts" else EXAMPLES)


def source(spec: object) -> tuple[str, object]:
    """Which of SOURCES the spec names, and what it says there."""
    if not isinstance(spec, dict):
        raise InvalidDataset(
            f"dataset is {reprlib.repr(spec)}, not an object", param="dataset", hint=one_of("Give", SOURCES)
        )
    if unknown := sorted(str(key) for key in spec if key not in SOURCES):
        raise InvalidDataset(
            f"dataset has the unknown key {unknown[0]!r}",
            param=f"dataset.{unknown[0]}",
            hint=one_of("Give", SOURCES),
        )
    if len(spec) != 1:
        found = " and ".join(spec) if spec else "no source"
        raise InvalidDataset(f"dataset has {found}", param="dataset", hint=one_of("Give exactly one of", SOURCES))
    ((kind, value),) = spec.items()
    if kind == "file_id":
        raise InvalidDataset(
            f"dataset.file_id = {value!r}: uploaded files are not served yet",
            param="dataset.file_id",
            hint='Name a file in an allowed folder with {"path": ...}, or send the rows with {"examples": [...]}.',
        )
    return kind, value


def _inline(kind: str, value: object) -> Iterator[tuple[Place, object]]:
    if not isinstance(value, list):
        raise InvalidDataset(
            f"dataset.{kind} = {reprlib.repr(value)} is not a list",
            param=f"dataset.{kind}",
            hint="Send a list of rows.",
        )
    for number, row in enumerate(value, start=1):
        yield Place(f"{kind} row {number}", f"dataset.{kind}[{number - 1}]", number), row


# ---------------------------------------------------------------- rows


def validated(rows: Iterable[tuple[Place, object]], source: str, shapes: tuple[Shape, ...]) -> Iterator[Example | Fact]:
    """What the rows mean: all conversations, in whatever shape, or all plain text, or all facts."""
    first: Shape | None = None
    for place, row in rows:
        shape = shape_of(row, place, shapes)
        first = shape if first is None else first
        if shape.holds != first.holds:
            raise InvalidDataset(
                f"{place.words}: {first.holds} and {shape.holds} are mixed in one dataset",
                param=place.param,
                hint=f"Put them into separate datasets, or write this row like {first.example}",
            )
        yield parse(row, place, shape)
    if first is None:
        raise InvalidDataset(
            f"the dataset {source} is empty",
            param="dataset",
            hint=f"Give at least one row, for example {shapes[0].example}",
        )


class _Digest:
    """sha256 of the rows as one canonical JSON list: of what they say alone, however they are written."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[")
        self._between = b""

    def add(self, row: Example | Fact) -> None:
        content = asdict(row) if isinstance(row, Fact) else _content(row)
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self._hash.update(self._between + canonical.encode())
        self._between = b","

    def hexdigest(self) -> str:
        whole = self._hash.copy()
        whole.update(b"]")
        return whole.hexdigest()


def _content(example: Example) -> object:
    if example.text is not None:
        return {"text": example.text}
    return [
        {"role": message.role, "content": message.content} | ({} if message.weight else {"weight": 0})
        for message in example.messages
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
    """Examples that stay in their file: they are parsed anew each time they are gone through.

    The file must be as it was: going through it raises InvalidDataset (code dataset_changed) when it is not.
    """

    path: Path
    rows: int
    sha256: str
    size: int
    modified: int = -1  # nanoseconds; where it is not that time, the content is compared

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Example]:
        self.check()
        for row in validated(read(self.path), str(self.path), EXAMPLES):
            assert isinstance(row, Example)
            yield row
        self.check()

    def __contains__(self, example: object) -> bool:
        return any(example == one for one in self)

    def check(self) -> None:
        """Raises InvalidDataset when the file is not as it was."""
        try:
            found = self.path.stat()
            same = found.st_size == self.size and (
                found.st_mtime_ns == self.modified or checksum(self.path) == self.sha256
            )
        except OSError:
            same = False
        if not same:
            raise InvalidDataset(
                f"{self.path} has changed since this dataset was planned, or is gone",
                param="dataset.path",
                hint="Restore the file as it was, or start a new job on it as it is. Small files are kept with the "
                "job; large ones stay where they are.",
                code="dataset_changed",
            )


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _large(path: Path, rows: Iterator[Example | Fact]) -> Dataset:
    stat, sha256 = path.stat(), checksum(path)
    digest, count = _Digest(), 0
    facts: list[Fact] = []
    for row in rows:
        digest.add(row)
        count += 1
        if isinstance(row, Fact):
            facts.append(row)
    if facts:
        return Dataset(digest.hexdigest(), (), tuple(facts), str(path))
    examples = FileExamples(path, count, sha256, stat.st_size, stat.st_mtime_ns)
    examples.check()
    return Dataset(digest.hexdigest(), examples, (), str(path))


# ---------------------------------------------------------------- kept with a job

_EXAMPLES = TypeAdapter(tuple[Example, ...])
_FACTS = TypeAdapter(tuple[Fact, ...])


def to_json(dataset: Dataset) -> Json:
    """All of it, or of a large file its path and checksum."""
    facts, kept = ([asdict(fact) for fact in facts] for facts in (dataset.facts, dataset.parent_facts))
    body: Json = {"digest": dataset.digest, "source": dataset.source, "facts": facts, "kept": kept}
    held = dataset.examples
    if isinstance(held, FileExamples):
        file = {"path": str(held.path), "rows": held.rows, "sha256": held.sha256, "size": held.size}
        return body | {"file": file}
    return body | {"examples": [asdict(example) for example in held]}


def from_json(body: Json) -> Dataset:
    """Raises InvalidDataset (code dataset_changed) when the file it names is not the same any more."""
    facts, parent_facts = (_FACTS.validate_python(body.get(name, ())) for name in ("facts", "kept"))
    if "file" not in body:
        return Dataset(body["digest"], _EXAMPLES.validate_python(body["examples"]), facts, body["source"], parent_facts)
    file = body["file"]
    examples = FileExamples(Path(file["path"]), file["rows"], file["sha256"], file["size"])
    examples.check()
    return Dataset(body["digest"], examples, facts, body["source"], parent_facts)


# ---------------------------------------------------------------- files


def _find(path: object, allowed_dirs: Sequence[Path]) -> Path:
    """The file itself, links resolved; it must lie inside an allowed folder."""
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
        except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL, loop of links
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
