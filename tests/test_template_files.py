"""In whatever file and form a base keeps its chat templates, one is chosen, or the file at fault is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import UnsupportedModel
from fortwo.hub.catalog import Catalog
from fortwo.hub.template_files import FOLDER, JINJA, PROCESSOR, choose_template
from fortwo.records import Message
from fortwo.settings import Settings
from tests.tiny import TEMPLATE, save_directory


def write(directory: Path, in_config: Any = None, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": in_config}))
    for name, text in files.items():
        file = directory / {"jinja": JINJA, "processor": PROCESSOR}.get(name, f"{FOLDER}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return directory


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


PROCESSOR_FILE = json.dumps({"chat_template": "P"})
FORMS: dict[str, tuple[Any, dict[str, str], str | None, str]] = {
    "text": ("T", {}, "T", ""),
    "list with default": (named(tool_use="U", default="D"), {}, "D", ""),
    "list without default": (named(tool_use="U", rag="R"), {}, "U", "'tool_use', 'rag'; 'tool_use' is used"),
    "list with one for chat": (named(tool_use="U", chatml="C"), {}, "C", "'chatml' is used"),
    "object with default": ({"default": "D", "rag": "R"}, {}, "D", ""),
    "object without default": ({"tool_use": "U"}, {}, "U", "'tool_use' is used"),
    "empty list": ([], {}, None, "has no chat template; the plain form"),
    "empty object": ({}, {}, None, "has no chat template"),
    "null": (None, {}, None, "has no chat template"),
    "file": (None, {"jinja": "J"}, "J", ""),
    "file goes first": ("T", {"jinja": "J"}, "J", ""),
    "file and a folder": (None, {"jinja": "J", "tool_use": "U"}, "J", ""),
    "a folder alone": (None, {"tool_use": "U"}, "U", "'tool_use' is used"),
    "a folder beside a text": ("T", {"tool_use": "U"}, "T", ""),
    "processor": (None, {"processor": PROCESSOR_FILE}, "P", "the one in chat_template.json"),
    "processor goes last": ("T", {"processor": PROCESSOR_FILE}, "T", ""),
}


@pytest.mark.parametrize(("in_config", "files", "chosen", "note"), FORMS.values(), ids=FORMS.keys())
def test_a_template_is_chosen(
    tmp_path: Path, in_config: Any, files: dict[str, str], chosen: str | None, note: str
) -> None:
    choice = choose_template(write(tmp_path, in_config, **files))
    assert choice.text == chosen
    assert (choice.note is None) == (note == "")
    assert note in (choice.note or "")


@pytest.mark.parametrize("wrong", [42, True, ["a"], [{"name": "a"}], {"a": 1}, [{"name": 1, "template": "x"}]])
def test_what_is_no_template_is_named(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"chat_template in .*tokenizer_config\.json is .*neither a text nor"
    ) as caught:
        choose_template(write(tmp_path, wrong))
    assert JINJA in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer_config.json", PROCESSOR):
        folder = write(tmp_path / name)
        (folder / name).write_bytes(content)
        with pytest.raises(UnsupportedModel, match=name):
            choose_template(folder)


def test_named_templates_are_linked_and_used(home: Path, tmp_path: Path) -> None:
    directory = save_directory(tmp_path / "base")
    (directory / JINJA).unlink()
    write(directory, None, tool_use=TEMPLATE)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    catalog = Catalog(Settings(home=home).models_dir)
    catalog.add("mine", directory)
    renderer = ChatTemplateRenderer(catalog.prepare("mine"))
    assert renderer.decode_with_control_tokens(renderer.encode_prompt([Message("user", "a")])).startswith(
        "<|im_start|>user"
    )
    assert [warning.code for warning in renderer.warnings] == ["chat_template"]
    first = catalog.model_info("mine")
    (directory / FOLDER / "tool_use.jinja").write_text(TEMPLATE + " ")
    assert catalog.model_info("mine") is None
    catalog.prepare("mine")
    assert first is not None
    assert catalog.model_info("mine") not in (None, first)


# ---------------------------------------------------------------- tokens that the model does not have


def extended(directory: Path, *, special: bool, template: str = TEMPLATE) -> Path:
    """A base whose tokenizer has one token more than its embedding has rows (262)."""
    save_directory(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    token = {**content["added_tokens"][0], "id": 262, "content": "<|extra|>", "special": special}
    file.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], token]}))
    (directory / JINJA).write_text(template)
    return directory


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "where", ["{{ '<|extra|>' }}" + TEMPLATE, TEMPLATE.replace("assistant\n", "assistant<|extra|>")]
)
def test_a_template_that_writes_a_token_beyond_the_embedding_is_refused(
    tmp_path: Path, special: bool, where: str
) -> None:
    with pytest.raises(UnsupportedModel, match=r"writes '<\|extra\|>', token 262, .*has only 262 rows") as caught:
        ChatTemplateRenderer(extended(tmp_path, special=special, template=where))
    assert "resized" in str(caught.value.hint)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_beyond_the_embedding_that_users_write_is_read_as_characters(tmp_path: Path, special: bool) -> None:
    renderer = ChatTemplateRenderer(extended(tmp_path, special=special))
    chat = [Message("user", "a<|extra|>"), Message("assistant", "<|extra|>")]
    tokens, _ = renderer.encode_conversation(chat)
    assert max(tokens) < 262
    assert "a<|extra|>" in renderer.decode(tokens)


def test_words_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    save_directory(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 260}))
    with pytest.raises(UnsupportedModel, match="token 260, but the base's embedding has only 260 rows"):
        ChatTemplateRenderer(tmp_path)


# ---------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize(
    ("content", "ids", "warned"),
    [
        ({}, {2}, False),
        ({"eos_token_id": None}, {2}, False),
        ({"eos_token_id": 5}, {2, 5}, False),
        ({"eos_token_id": [5, None, 0]}, {0, 2, 5}, False),
        ({"eos_token_id": [5, 999, -1]}, {2, 5}, True),
    ],
)
def test_declared_end_tokens_that_exist_end_a_reply(tmp_path: Path, content: Any, ids: set[int], warned: bool) -> None:
    save_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    renderer = ChatTemplateRenderer(tmp_path)
    assert renderer.stop_ids == ids
    assert [warning.code for warning in renderer.warnings] == ["eos_token"] * warned
    assert renderer.constraint('{"type": "boolean"}') is not None


@pytest.mark.parametrize(
    "content", ["{", "[]", "", '{"eos_token_id": "2"}', '{"eos_token_id": [2.5]}', '{"eos_token_id": true}']
)
def test_a_generation_config_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    save_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json"):
        ChatTemplateRenderer(tmp_path)
