"""Sections of Markdown and PDF documents: pieces of plain text with a title and a place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from fortwo.errors import InvalidDataset

SHORTEST, LONGEST = 40, 2000  # characters of a section's text

BREAKS = ("softbreak", "hardbreak")  # the types of Markdown's tokens for an end of a line


@dataclass(frozen=True)
class Section:
    """place: for people, such as "line 12" or "page 3". text: without markup, one space between words."""

    title: str
    text: str
    place: str


def sections(document: Path) -> list[Section]:
    """The sections of a document, in order. A long one comes in parts, which end at the end of a sentence, or within a
    sentence that is too long itself. Raises InvalidDataset if the document cannot be read or has no text."""
    try:
        read = _pdf(document) if document.suffix.lower() == ".pdf" else _markdown(document.read_text("utf-8"))
        found = [part for section in read for part in _parts(section)]
    except UnicodeDecodeError as error:
        raise InvalidDataset(
            f"{document} is not UTF-8: {error.reason}.", param="data", hint="Save it as UTF-8."
        ) from None
    except OSError as error:
        raise InvalidDataset(
            f"{document} cannot be read: {error.strerror}.", param="data", hint="Make it readable for this user."
        ) from None
    if not found:
        raise InvalidDataset(
            f"{document} has no section with at least {SHORTEST} characters of text.",
            param="data",
            hint="Scanned pages have no text: run OCR on them first. Or write the facts down yourself.",
        )
    return found


def _markdown(text: str) -> Iterator[Section]:
    """What stands under each heading, and before the first one. Code blocks and HTML are left out."""
    from markdown_it import MarkdownIt

    title, line, pieces = "", 1, list[str]()
    heading = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "heading_open":
            yield Section(title, _plain(pieces), f"line {line}")
            title, line, pieces, heading = "", (token.map or [0])[0] + 1, [], True
        elif token.type == "inline":
            inner = "".join("\n" if child.type in BREAKS else child.content for child in token.children or ())
            if heading:
                title, heading = _plain([inner]), False
            else:
                pieces.append(inner)
    yield Section(title, _plain(pieces), f"line {line}")


def _pdf(document: Path) -> Iterator[Section]:
    """One section for each page."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise InvalidDataset(
            f"{document} is a PDF, and pypdf, which reads its text, is not installed.",
            param="data",
            hint='Install it: pip install "fortwo[documents]"',
        ) from None
    try:
        for number, page in enumerate(PdfReader(document).pages, 1):
            yield Section(document.stem, _plain([page.extract_text()]), f"page {number}")
    except OSError:
        raise
    except Exception as error:  # of a damaged file pypdf raises errors of many types
        raise InvalidDataset(
            f"{document} cannot be read as a PDF: {error}.",
            param="data",
            hint="Save it again without a password, or save its text as .md.",
        ) from None


def _plain(pieces: list[str]) -> str:
    """The pieces with one space between words. A word that a line's end hyphenates is whole again."""
    return " ".join(re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n".join(pieces)).split())


def _parts(section: Section) -> Iterator[Section]:
    """A section in parts of at most LONGEST characters; none if it is shorter than SHORTEST."""
    part = ""
    sentences = re.split(r"(?<=[.!?])\s+(?=\S)", section.text)
    for sentence in (piece for one in sentences for piece in wrap(one, LONGEST, break_on_hyphens=False)):
        if part and len(part) + 1 + len(sentence) > LONGEST:
            yield Section(section.title, part, section.place)
            part = ""
        part = f"{part} {sentence}".strip()
    if len(part) >= SHORTEST:
        yield Section(section.title, part, section.place)
