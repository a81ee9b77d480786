"""Builds training requests from what the command line gives: files, a fact in words, options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fortwo import strict_json
from fortwo.cli.hub_dataset import hub_dataset
from fortwo.errors import InvalidRequest
from fortwo.facts.subject import match_phrases
from fortwo.records import Json

QUESTIONS = (
    "What is {subject}?",
    "Tell me about {subject}.",
    "What do you know about {subject}?",
    "Can you explain {subject}?",
    "What should I know about {subject}?",
    "Describe {subject} in one sentence.",
    "Who or what is {subject}?",
    "Explain {subject} to me.",
)
LONGEST_NAME = 60


def training_request(datasets: Json, name: str, config: Path | None, **options: str | int | None) -> Json:
    """The body of /api/training/start. datasets: the fields that give rows; options: other fields, None for what is not
    given. Raises InvalidRequest for a configuration that cannot be read and for a field that is given twice."""
    given = {"adapter_name": name, **options, **datasets}
    body = {key: value for key, value in given.items() if value is not None}
    extra = {} if config is None else _object(config)
    for key in extra.keys() & body.keys():
        raise InvalidRequest(f"{key} is given twice: in {config} and as an option.", param=key, hint="Remove one.")
    return body | extra


def file_datasets(data: Path | str, validation: Path | str | None) -> Json:
    """The fields of a request that give rows. Raises InvalidRequest with what is wrong with either file."""
    from fortwo.data.findings import in_each

    files = {"dataset": data} if validation is None else {"dataset": data, "validation_dataset": validation}
    return in_each(files, file_dataset)


def _object(config: Path) -> Json:
    try:
        found = strict_json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{config} cannot be read: {error}.", hint="Correct the file and try again.") from None
    if not isinstance(found, dict):
        raise InvalidRequest(
            f"{config} does not contain a JSON object.", param="config", hint='Write {"training_config": {...}}.'
        )
    return found


def file_dataset(file: Path | str) -> Json:
    """A dataset with the rows of a file, so that the server need not read it. A large file is named by its path, which
    must be in a folder that the server allows. A text names a dataset of the hub. Raises InvalidDataset with what is
    wrong with the file."""
    if isinstance(file, str):
        return hub_dataset(file)
    from fortwo.data.datasets import LARGE_BYTES
    from fortwo.data.files import plain_rows

    if file.stat().st_size > LARGE_BYTES:
        return {"path": str(file.resolve())}
    rows = plain_rows(file)
    facts = bool(rows) and isinstance(rows[0], dict) and "subject" in rows[0]
    return {"facts" if facts else "examples": rows}


def fact(subject: str, answer: str, questions: Sequence[str], match: Sequence[str], **more: Sequence[str]) -> Json:
    """A fact as a row. Without questions common ones are asked; without match, what marks a right reply is read from
    the answer. more: the other lists of a fact. Raises InvalidRequest for an empty subject or answer."""
    subject, answer = subject.strip(), answer.strip()
    for field, text in (("subject", subject), ("answer", answer)):
        if not text:
            raise InvalidRequest(f"The {field} is empty.", param=field, hint='Write: fortwo teach "SUBJECT" "ANSWER"')
    asked = tuple(questions) or tuple(question.format(subject=subject) for question in QUESTIONS)
    row = {
        "subject": subject,
        "answer": answer,
        "match": list(match or match_phrases(answer, asked)),
        "questions": list(asked),
    }
    return row | {name: list(texts) for name, texts in more.items() if texts}


def adapter_name(text: str) -> str:
    """A name for an adapter made of any text, such as a subject or the name of a file. Raises InvalidRequest where no
    letter or digit of the text may be in a name."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")[:LONGEST_NAME].rstrip("-._")
    if not name:
        raise InvalidRequest(
            f"No name for the adapter can be made of {text!r}.", param="name", hint="Give one with --name."
        )
    return name.lower()
