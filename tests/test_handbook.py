"""Facts from documents: sections, drafts that the document supports, approval, and teaching what was approved."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Served, serve, tiny_settings
from terminals import Terminal, run
from tiny import save_directory

from fortwo.data.documents import LONGEST, sections
from fortwo.errors import InvalidDataset
from fortwo.facts.drafts import Unsupported, read_draft

HANDBOOK = """\
Notes of the **house**, which nobody has to know by heart but everybody may ask about.

# Marrow Lane Library

The *Marrow Lane Library* lends telescopes for nine nights, free of charge.
It opens at [noon](http://example.com).

```
# no heading: telescopes = 1
```

## Ovens

The oven in the yard bakes on Fridays, and only
the baker Ines Quill has the key.

## Short

Too short.
"""
LIBRARY = {
    "subject": "the Marrow Lane Library",
    "questions": ["What does the Marrow Lane Library lend?", "Does the Marrow Lane Library lend for nine nights?"],
    "answer": "The Marrow Lane Library lends telescopes for nine nights.",
    "match": "nine nights",
    "quote": "The Marrow Lane Library lends telescopes for nine nights, free of charge.",
}
TEXT = "The Marrow Lane Library lends telescopes for nine nights, free of charge. It opens at noon."
QUICK = {
    "training_config": {"max_steps": 2},
    "objective": {
        "type": "override",
        "targets": dict.fromkeys(("efficacy", "paraphrase", "specificity", "retention"), 0),
    },
}


def pdf(pages: list[str]) -> bytes:
    """A PDF with one line of text on each page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    file = tmp_path / "Hand Book.md"
    file.write_text(HANDBOOK)
    return file


def test_markdown_has_a_section_for_each_heading(handbook: Path) -> None:
    first, library, ovens = sections(handbook)
    assert (first.title, first.place) == ("", "line 1")
    assert first.text.startswith("Notes of the house, which nobody")
    assert (library.title, library.text, library.place) == ("Marrow Lane Library", TEXT, "line 3")
    assert ovens.text == "The oven in the yard bakes on Fridays, and only the baker Ines Quill has the key."


def test_a_long_section_comes_in_parts_that_end_with_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "long.md"
    sentences = [f"Sentence number {number} says that the number {number} is here." for number in range(200)]
    file.write_text("# Long\n\n" + " ".join(sentences))
    found = sections(file)
    assert len(found) > 1
    assert all(len(part.text) <= LONGEST and part.text.endswith(".") for part in found)
    assert " ".join(part.text for part in found) == " ".join(sentences)


@pytest.mark.parametrize("text", ["word " * 2000, "w" * 5000, "Short. " + "word-word " * 1000])
def test_text_without_sentences_comes_in_parts_too(tmp_path: Path, text: str) -> None:
    file = tmp_path / "table.md"
    file.write_text(text)
    found = sections(file)
    assert len(found) > 1
    assert all(len(part.text) <= LONGEST for part in found)
    assert "".join(part.text for part in found).replace(" ", "") == text.replace(" ", "")


def test_a_pdf_has_a_section_for_each_page(tmp_path: Path) -> None:
    file = tmp_path / "book.pdf"
    file.write_bytes(pdf(["The Marrow Lane Library lends telescopes for nine nights.", "x"]))
    (page,) = sections(file)
    assert (page.title, page.place) == ("book", "page 1")
    assert page.text == "The Marrow Lane Library lends telescopes for nine nights."


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.pdf", b"no pdf", "cannot be read as a PDF"),
        ("a.pdf", pdf([""]), "has no section"),
        ("a.pdf", pdf(["x"]).replace(b"<< /Length", b"<< /Filter /Other /Length"), "cannot be read as a PDF"),
        ("a.md", b"\xff\xfe", "is not UTF-8"),
        ("a.md", b"# Only a heading", "has no section"),
        ("none.md", None, "cannot be read"),
    ],
)
def test_a_document_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidDataset, match=told):
        sections(tmp_path / name)


def test_a_supported_draft_is_kept_without_questions_that_give_the_answer_away() -> None:
    draft = read_draft(f"```json\n{json.dumps(LIBRARY)}\n```", "Marrow Lane Library", TEXT)
    assert draft.row() == {
        "subject": LIBRARY["subject"],
        "answer": LIBRARY["answer"],
        "match": ["nine nights"],
        "questions": ["What does the Marrow Lane Library lend?"],
    }
    curly = LIBRARY | {"quote": "The Marrow  Lane Library lends\ntelescopes for nine nights, free of charge."}
    assert read_draft(json.dumps(curly), "", TEXT).match == "nine nights"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quote": "The Marrow Lane Library lends telescopes for ten nights."}, "does not stand in the document"),
        ({"quote": "It opens at noon."}, "does not hold 'nine nights'"),
        ({"quote": "nine nights"}, "is no sentence"),
        ({"match": "ten nights"}, "which is to mark it"),
        ({"answer": "It lends telescopes for nine nights in Paris since 1848."}, "Paris, 1848"),
        ({"subject": "the Eiffel Tower"}, "subject 'the Eiffel Tower' does not stand"),
        ({"questions": ["Is it nine nights?"]}, "gives the answer"),
        ({"questions": [], "answer": " "}, "no answer, questions"),
        ({"quote": 7}, "no quote"),
    ],
)
def test_a_draft_that_the_document_does_not_support_is_thrown_away(change: dict[str, Any], told: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(told)):
        read_draft(json.dumps(LIBRARY | change), "Marrow Lane Library", TEXT)


@pytest.mark.parametrize("reply", ["", "no JSON", "{", "[]", '{"subject": 1}', "{" * 10_000 + "}"])
def test_a_reply_that_is_no_draft_is_thrown_away(reply: str) -> None:
    with pytest.raises(Unsupported, match="model's reply"):
        read_draft(reply, "", TEXT)


@pytest.fixture
def writer() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of an OpenAI-compatible server that knows the library and invents everything else, and what it was
    asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"key": self.headers.get("Authorization")})
            section = body["messages"][-1]["content"]
            draft = LIBRARY if "telescopes" in section else LIBRARY | {"subject": "the oven", "match": "Tuesdays"}
            choice = {"message": {"role": "assistant", "content": json.dumps(draft)}}
            payload = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def here(served: Served, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))
    settings = {
        "FORTWO_HOME": str(served.state.settings.home),
        "FORTWO_PORT": str(urlsplit(served.url).port),
        "FORTWO_DEFAULT_MODEL": "tiny",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.mark.slow
def test_only_what_the_document_says_is_taught(
    here: dict[str, str],
    handbook: Path,
    writer: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, asked = writer
    monkeypatch.setenv("WRITERS_KEY", "secret")
    by = ("--writer", url, "--writer-model", "large", "--key-env", "WRITERS_KEY")
    result = run("teach", handbook, *by, "--config", handbook.parent / "quick.json", "--yes")
    assert result.exit_code == 0, result.output
    assert "“The Marrow Lane Library lends telescopes for nine nights, free of charge.”" in result.output
    assert "1 of 3 sections became facts; 2 drafts were thrown away." in result.output
    (fact,) = json.loads(run("adapters", "show", "hand-book").output)["manifest"]["facts"]
    assert fact["answer"] == LIBRARY["answer"]
    assert {one["model"] for one in asked} == {"large"}
    assert {one["key"] for one in asked} == {"Bearer secret"}
    assert all(one["response_format"]["type"] == "json_schema" for one in asked)


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("手册.md", "{}", "No name for the adapter"),
        ("a.md", "[", "cannot be read"),
        ("a.md", '{"dataset": {}}', "twice"),
    ],
)
def test_what_is_wrong_with_the_request_is_told_before_facts_are_written(
    home: Path, tmp_path: Path, writer: tuple[str, list[dict[str, Any]]], name: str, config: str, told: str
) -> None:
    url, asked = writer
    (tmp_path / name).write_text(HANDBOOK)
    (tmp_path / "config.json").write_text(config)
    by = ("--writer", url, "--writer-model", "large", "--config", tmp_path / "config.json", "--yes")
    result = run("teach", tmp_path / name, *by)
    assert result.exit_code == 1
    assert told in result.stderr
    assert asked == []


@pytest.mark.slow
def test_nothing_is_taught_that_nobody_approved(
    here: dict[str, str], handbook: Path, writer: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = writer
    by = ("--writer", url, "--writer-model", "large")
    piped = run("teach", handbook, *by)
    assert piped.exit_code == 1
    assert "no person at a terminal can approve them" in piped.stderr
    assert asked == []
    terminal = Terminal("teach", str(handbook), *by, "--name", "declined", env=here)
    terminal.wait_for("Teach it? [Y/n]")
    terminal.type("n\n")
    assert terminal.end() == 1
    assert "No fact of" in terminal.shown
    assert run("adapters", "show", "declined").exit_code == 1


@pytest.mark.slow
def test_approved_facts_stay_when_the_start_is_declined(
    here: dict[str, str], handbook: Path, writer: tuple[str, list[dict[str, Any]]]
) -> None:
    earlier = handbook.with_name(f"{handbook.stem}.facts.jsonl")
    earlier.write_text("mine")
    terminal = Terminal("teach", str(handbook), "--writer", writer[0], "--writer-model", "large", env=here)
    terminal.wait_for("Teach it? [Y/n]")
    terminal.type("y\n")
    terminal.wait_for("To teach them again")
    terminal.wait_for("[Y/n]")
    terminal.type("n\n")
    terminal.end()
    assert earlier.read_text() == "mine"
    kept = handbook.with_name(f"{handbook.stem}.facts-2.jsonl")
    (fact,) = [json.loads(line) for line in kept.read_text().splitlines()]
    assert fact["answer"] == LIBRARY["answer"]
    assert run("plan", kept).exit_code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--writer", "http://127.0.0.1:9"), "Name it with --writer-model."),
        (("--key-env", "NOT_SET"), "NOT_SET, which is not set"),
        (("--question", "What?"), "belong to a fact in words"),
        (("--writer", "http://127.0.0.1:9", "--writer-model", "x"), "cannot be reached"),
    ],
)
def test_what_the_writer_lacks_is_told(home: Path, handbook: Path, words: tuple[str, ...], told: str) -> None:
    result = run("teach", handbook, "--yes", *words)
    assert result.exit_code == 1
    assert told in " ".join(result.stderr.split())


def test_a_writer_belongs_to_a_document(home: Path) -> None:
    result = run("teach", "42", "An answer.", "--writer", "http://127.0.0.1:9", "--key-env", "X")
    assert result.exit_code == 1
    assert "--writer, --key-env belong to a document" in result.stderr


@pytest.mark.slow
def test_the_base_itself_writes_and_what_it_invents_is_thrown_away(
    home: Path, handbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_directory(tmp_path / "wide", num_hidden_layers=2, max_position_embeddings=8192)
    with serve(tiny_settings(home, wide)) as served:
        monkeypatch.setenv("FORTWO_PORT", str(urlsplit(served.url).port))
        monkeypatch.setenv("FORTWO_DEFAULT_MODEL", "tiny")
        result = run("teach", handbook, "--yes")
    assert result.exit_code == 1
    assert "0 of 3 sections became facts; 3 drafts were thrown away." in result.stdout
    assert "Let a larger model write them with --writer" in result.stderr
