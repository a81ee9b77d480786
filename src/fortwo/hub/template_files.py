"""The chat template of a model directory: in which of its files templates are, and which of them is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fortwo.errors import UnsupportedModel

JINJA = "chat_template.jinja"
FOLDER = "additional_chat_templates"  # one NAME.jinja for each named template
PROCESSOR = "chat_template.json"  # where older processors kept it
TOKENIZER = "tokenizer_config.json"
DEFAULT = "default"
_FOR_CHAT = (DEFAULT, "chat", "chat_template", "chatml")  # the names of a plain conversation's template


@dataclass(frozen=True)
class TemplateChoice:
    """text: None when the directory has no template. note: what people should know about the choice, if anything."""

    text: str | None
    note: str | None = None


def choose_template(directory: Path) -> TemplateChoice:
    """The template that is used for conversations. Raises UnsupportedModel for files that cannot be read.

    As in transformers, chat_template.jinja goes before tokenizer_config.json. A template without a name is the default
    one. chat_template.json is read when there is no other.
    """
    named = _in_json(directory / TOKENIZER)
    if (folder := directory / FOLDER).is_dir():
        named |= {file.stem: _text(file) for file in sorted(folder.glob("*.jinja"))}
    if (file := directory / JINJA).is_file():
        named[DEFAULT] = _text(file)
    if named:
        return _choose(named)
    if named := _in_json(directory / PROCESSOR):
        choice = _choose(named)
        return TemplateChoice(choice.text, choice.note or f"The chat template is the one in {PROCESSOR}.")
    return TemplateChoice(None, "The base has no chat template; the plain form User: and Assistant: is used.")


def _choose(named: Mapping[str, str]) -> TemplateChoice:
    name = next((name for name in _FOR_CHAT if name in named), next(iter(named)))
    if name == DEFAULT:
        return TemplateChoice(named[name])
    return TemplateChoice(
        named[name],
        f"The base has no default chat template but {', '.join(repr(one) for one in named)}; {name!r} is used. "
        f"To use another one, save it as {JINJA} in the base's directory.",
    )


def _in_json(file: Path) -> dict[str, str]:
    """The templates in a JSON file, by name: a text, an object of texts, or a list of {name, template}."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{file} is not JSON: {error}", hint="Restore the file.") from None
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file} holds no JSON object", hint="Restore the file.")
    found: Any = content.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):
        pairs = [(one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None) for one in found]
    else:
        pairs = list(found.items()) if isinstance(found, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        raise UnsupportedModel(
            f"chat_template in {file} is {str(found)[:80]!r}, which is neither a text nor a list of named texts",
            hint=f"Write the template as text, or save it as {JINJA} beside this file.",
        )
    return {str(name): str(text) for name, text in pairs}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}", hint="Restore the file.") from None
