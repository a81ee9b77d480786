"""Inputs that fuzzing found (`python -m bench.soak fuzz`): each is refused in words, or read in a time that grows with
its length."""

from __future__ import annotations

import importlib
import json
import pkgutil
import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from serving import Served, refused

import fortwo.server
from bench.soak.bodies import BODIES
from bench.soak.changes import places
from bench.soak.fuzz import limit, memory
from fortwo import strict_json
from fortwo.data import datasets
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.preference_rows import _said
from fortwo.errors import FortwoError, InvalidDataset, UnsupportedModel
from fortwo.facts.prompt_builder import FactPromptBuilder
from fortwo.facts.subject import find_subject, first_match
from fortwo.facts.suggestions import suggest_questions
from fortwo.nn.generic import load
from fortwo.records import Example, Fact, Message
from tests.tiny import save_directory

LONG = 300_000  # characters, for which quadratic time is an hour
FACT = Fact("42", "FOR TWO", ("FOR TWO",), ("What is 42?",))
PATIENCE = 300.0  # seconds; a busy machine may need many
HALF = "\ud800"


@pytest.mark.parametrize("question", ["0" * LONG, "_" * LONG, "the " * (LONG // 4), " " * LONG + "42"])
def test_questions_are_read_in_linear_time(question: str) -> None:
    with limit(PATIENCE):
        fact = replace(FACT, questions=(question,))
        assert suggest_questions(fact, 2)
        assert FactPromptBuilder(fact, seed=0).edit_prompts(1)


def test_a_fact_that_leaves_nothing_to_ask_is_refused() -> None:
    fact = replace(FACT, aliases=tuple(string.ascii_letters))
    with limit(PATIENCE), pytest.raises(InvalidDataset, match="no prompt for the fact about '42'"):
        FactPromptBuilder(fact, seed=0).contrast_prompts(100)


def test_a_prompt_is_searched_for_hundreds_of_facts() -> None:
    others = [replace(FACT, subject=str(number)) for number in range(1000)]
    found = FactPromptBuilder(FACT, seed=0, others=others).contrast_prompts(20)
    named = {word for contrast in found for word in contrast.prompt.replace("?", " ").split()}
    assert not named & {other.subject for other in others}
    text, phrases = "It is b, c and a.", ("a", "c", "x.")
    assert first_match(text, phrases) == text.index("c ")
    assert first_match(text, ()) is None


def test_a_transcript_is_read_in_linear_time() -> None:
    with limit(PATIENCE):
        said = _said(f"Human: hi{' ' * LONG}\n\nAssistant: yes{chr(10) * LONG}\n\nHuman: a \n")
    assert said == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a \n"},
    ]


def test_a_repeated_key_among_many_is_found_in_linear_time() -> None:
    keys = [f'"{number}":0' for number in range(LONG)]
    with limit(PATIENCE), pytest.raises(strict_json.RepeatedKey, match="299999"):
        strict_json.loads(f"{{{','.join([*keys, keys[-1]])}}}")


@pytest.mark.parametrize(
    "change", [{"subject": "1" * 5000}, {"aliases": ["a" * 501]}, {"match": ["a" * 501]}, {"aliases": ["a"] * 101}]
)
def test_a_name_of_a_fact_has_a_bound(change: dict[str, Any]) -> None:
    fact = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"], **change}
    with pytest.raises(InvalidDataset, match=rf"{next(iter(change))}.*at most (500 characters|100 items)"):
        datasets.load({"facts": [fact]}, [])


def test_what_is_too_long_for_a_name_is_no_subject() -> None:
    def examples(name: str) -> list[Example]:
        said = (Message("assistant", f"{name} is the answer 7."),)
        return [Example((Message("user", ask.format(name)), *said)) for ask in ("What is {}?", "Tell me of {}.")]

    found = find_subject(examples("x" * 500))
    assert found is not None
    assert found.subject == "x" * 500
    assert find_subject(examples("1" * 5000)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 5.5e16},  # transformers' dataclasses raise an error of their own
        {"layer_types": [None]},
        {"rope_parameters": []},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_cannot_take_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    import torch

    ((key, value),) = change.items()
    directory = base(tmp_path, "config.json", key, value)
    with pytest.raises(UnsupportedModel):
        load(directory, "cpu", None, torch.float32)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", "text"),
        ("tokenizer_config.json", "unk_token", ""),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path, file: str, key: str, value: object) -> None:
    directory = base(tmp_path, file, key, value)
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        ChatTemplateRenderer(directory)


def test_two_tokens_of_one_number_are_served_or_refused(tmp_path: Path) -> None:
    """Which of the two tokenizers finds by the number is up to chance."""
    directory = base(tmp_path, "tokenizer.json", "model.vocab.a", 2)  # that of <|im_end|>
    for _ in range(10):
        with suppress(UnsupportedModel):
            ChatTemplateRenderer(directory)


@pytest.mark.parametrize("rows", [262, 3 * 10**9, None])
def test_a_token_of_a_large_number_takes_no_memory(tmp_path: Path, rows: int | None) -> None:
    base(tmp_path, "config.json", "vocab_size", rows)
    directory = base(tmp_path, "tokenizer.json", "model.vocab.a", 2 * 10**9)
    with memory() as taken, pytest.raises(UnsupportedModel, match="token 2000000000"):
        ChatTemplateRenderer(directory)
    assert taken[0] < 100 << 20


def base(folder: Path, file: str, path: str, value: object) -> Path:
    """A base in a folder, with a value in one of its JSON files replaced."""
    directory = folder / "base"
    if not directory.exists():
        save_directory(directory, num_hidden_layers=1)
    content = json.loads((directory / file).read_text())
    *outer, last = path.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (directory / file).write_text(json.dumps(content))
    return directory


# ---------------------------------------------------------------- bodies


def models() -> Iterator[type[BaseModel]]:
    """Every model of a body, and of what bodies contain."""
    for module in pkgutil.walk_packages(fortwo.server.__path__, "fortwo.server."):
        importlib.import_module(module.name)
    waiting = BaseModel.__subclasses__()
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.__module__.startswith("fortwo."):
            yield model


def test_no_value_of_a_field_makes_validation_itself_fail() -> None:
    values = (None, True, -1, 2**64, 1e308, float("nan"), "", HALF, [], [None], [[]], {}, {"type": None}, [{}])
    seen = 0
    for model in models():
        for name, field in model.model_fields.items():
            for value in values:
                seen += 1
                try:
                    model.model_validate({field.alias or name: value})
                except (ValidationError, FortwoError):
                    continue
    assert seen > 1000


def replaced(valid: Any, place: int, value: Any) -> bytes:
    body = json.loads(json.dumps(valid))
    container, key = places(body)[place]
    container[key] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(("path", "valid"), BODIES)
def test_half_a_surrogate_pair_is_refused_in_any_place(served: Served, path: str, valid: Any) -> None:
    for place in range(len(places(valid))):
        sent = replaced(valid, place, HALF)
        response = served.http.post(path, content=sent, headers={"Content-Type": "application/json"})
        told = response.status_code == 200 and path == "/api/data/inspect"  # it lists what is wrong with rows
        assert told or 400 <= response.status_code < 500, (sent, response.text)


def test_rows_are_returned_as_they_are_written(served: Served) -> None:
    row = {f"a{HALF}": HALF}
    upload = {"file": ("rows.jsonl", json.dumps(row).encode())}
    assert served.http.post("/api/data/rows", files=upload).json()["rows"] == [row]
    sent = json.dumps({"dataset": {"examples": [row]}}).encode()
    found = served.http.post("/api/data/inspect", content=sent, headers={"Content-Type": "application/json"}).json()
    assert found["keys"] == [f"a{HALF}"]
    assert found["problems"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"subject": "0" * 501}, "subject"),
        ({"subject": "0", "aliases": ["a"] * 101}, "aliases"),
        ({"subject": "0", "questions": ["a" * 1001]}, "questions[0]"),
    ],
)
def test_a_suggestion_of_questions_has_bounds(served: Served, body: dict[str, Any], param: str) -> None:
    refused(served.post("/api/facts/questions", body), 400, "invalid_request", param)
