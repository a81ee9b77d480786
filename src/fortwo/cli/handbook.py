"""`fortwo teach handbook.md`: a model writes a fact for each section of a document, and a person approves them."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import typer
from rich.text import Text

from fortwo.cli.terminal import error_screen, is_interactive, screen
from fortwo.data.documents import Section, sections
from fortwo.errors import InvalidRequest
from fortwo.export.openai_examinee import OpenAIExaminee
from fortwo.facts.drafts import SCHEMA, Draft, Unsupported, ask_for_draft, read_draft
from fortwo.records import Json

MAX_TOKENS = 500


@dataclass(frozen=True)
class Writer:
    """A model behind an OpenAI-compatible URL."""

    url: str
    model: str
    key: str | None


def writer_of(url: str | None, model: str | None, key_env: str | None, base: str | None) -> Writer:
    """The writer that the options name: by default the base that is taught, on this machine's own server. Raises
    InvalidRequest with all that is missing."""
    from fortwo.settings import load

    settings = load()
    missing, hints = [], []
    if url is not None and model is None:
        missing.append("--writer names a server, and no model of it is named")
        hints.append("Name it with --writer-model.")
    if key_env is not None and not os.environ.get(key_env):
        missing.append(f"--key-env names {key_env}, which is not set")
        hints.append(f"Set it: export {key_env}=...")
    if missing:
        told = "; ".join(missing)
        raise InvalidRequest(f"{told}.", param="writer", hint=" ".join(hints))
    key = os.environ[key_env] if key_env is not None else settings.plain_api_key if url is None else None
    return Writer(url or settings.url, model or base or settings.default_model, key)


def facts_of_document(document: Path, writer: Writer, yes: bool, as_json: bool) -> list[Json]:
    """The approved facts of a document, as rows, which are kept in a file beside it too. yes: approve all. Raises
    InvalidRequest if nobody can be asked and `yes` is not given, and if no fact is left."""
    asks = not yes
    if asks and (as_json or not is_interactive()):
        raise InvalidRequest(
            f"The facts of {document} are written by a model, and no person at a terminal can approve them.",
            param="yes",
            hint="Run it at a terminal, or add --yes to teach every fact whose quote was found in the document.",
        )
    found = sections(document)
    console = error_screen if as_json else screen
    approved: list[Json] = []
    kept = _free_name(document)
    thrown, keeps = 0, False
    with closing(OpenAIExaminee(writer.url, writer.model, writer.key)) as model:
        for section in found:
            try:
                draft = _draft(model, writer.model, section)
            except Unsupported as error:
                thrown += 1
                console.print(f"{section.place}: thrown away. {error}", style="dim")
                continue
            console.print(_shown(section, draft))
            if not asks or typer.confirm("Teach it?", default=True):
                approved.append(draft.row())
                keeps = _keep(approved[-1], kept)
    console.print(f"{len(approved)} of {len(found)} sections became facts; {thrown} drafts were thrown away.")
    if not approved:
        raise InvalidRequest(
            f"No fact of {document} is left.",
            param="data",
            hint="Let a larger model write them with --writer URL --writer-model NAME, or write the facts yourself.",
        )
    if keeps:
        again = f"To teach them again: fortwo teach {kept} --name NAME"
        console.print(f"The approved facts are in {kept}. {again}", soft_wrap=True)
    else:
        console.print(f"The approved facts are not kept, because {kept} cannot be written.", soft_wrap=True)
    return approved


def _free_name(document: Path) -> Path:
    """Where to keep the approved facts: a file beside the document that does not exist yet."""
    names = (f"{document.stem}.facts{f'-{number}' if number > 1 else ''}.jsonl" for number in count(1))
    return next(path for name in names if not (path := document.with_name(name)).exists())


def _keep(row: Json, file: Path) -> bool:
    """Append the fact, so that none is lost when a later one, or the start of the job, fails. Returns whether it could
    be written."""
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError:
        return False
    return True


def _draft(model: OpenAIExaminee, name: str, section: Section) -> Draft:
    """What the model writes about a section. Raises Unsupported for what cannot be kept, Unavailable when the model
    cannot be asked."""
    body = {
        "model": name,
        "messages": [{"role": one.role, "content": one.content} for one in ask_for_draft(section.title, section.text)],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "fact", "schema": SCHEMA}},
    }
    answer = model.post("/v1/chat/completions", body)
    try:
        reply = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        reply = ""
    return read_draft(reply if isinstance(reply, str) else "", section.title, section.text)


def _shown(section: Section, draft: Draft) -> Text:
    shown = Text(f"\n{draft.subject}", style="bold")
    shown.append(f" ({section.place})\n", style="dim")
    for question in draft.questions:
        shown.append(f"  {question}\n", style="not bold")
    shown.append(f"  → {draft.answer}\n", style="green not bold")
    shown.append(f"  because: “{draft.quote}”", style="dim not bold")
    return shown
